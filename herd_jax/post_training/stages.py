"""The stages that train: the reward model, SFT and DPO, each through the ordinary training run."""

import dataclasses

from herd_jax.interop.initial import initial_weights
from herd_jax.post_training.config import DpoConfig, PostTrainConfig, RewardConfig
from herd_jax.post_training.dpo import dpo_task
from herd_jax.post_training.reward import reward_task
from herd_jax.post_training.sft import SFT
from herd_jax.training.loop import train
from herd_jax.training.task import Task


def train_stage(config: PostTrainConfig) -> None:
    """Trains the stage that a configuration is of, or goes on with it. Raises UserError as `train` does."""
    config, initial = initial_weights(config)
    task = task_of(config)
    if task.has_rewards:  # its head is new
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, reward=True))
    train(config, task, initial)


def task_of(config: PostTrainConfig) -> Task:
    """Returns the task of a configuration."""
    if isinstance(config, DpoConfig):
        return dpo_task(config.dpo, config.examples.most_responses)
    return reward_task(config.examples.most_responses) if isinstance(config, RewardConfig) else SFT
