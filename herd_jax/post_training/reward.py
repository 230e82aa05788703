"""The reward model: which of two responses is better, learned from preferences (section 4.1.2 of the paper)."""

import functools

import numpy as np

from herd_jax.data.batches import TOKENS
from herd_jax.data.dialogs import Problem, make_examples
from herd_jax.data.packing import Example
from herd_jax.data.preferences import Preference, preference_example, read_preference
from herd_jax.post_training.config import RewardConfig
from herd_jax.post_training.packed_data import PackedData
from herd_jax.text.tokenizer import Tokenizer
from herd_jax.training.objectives import count_comparisons, ranking
from herd_jax.training.step import Steps
from herd_jax.training.task import Task, means_over

MODEL_FIELDS = ("tokens", "segment_ids", "positions", "branch_ids")


def open_preferences(config: RewardConfig, steps: Steps) -> PackedData:
    """Returns the preferences of a run, of the two highest levels. Raises UserError as `PackedData` does."""

    def read(path: str, tokenizer: Tokenizer, seq_len: int) -> tuple[list[Example], list[Problem]]:
        def make(record) -> list[Example]:
            preference = read_preference(record, tokenizer)
            return [preference_example(preference, places(preference, config.seed), config.examples.share_prompt, ())] if preference else []

        return make_examples(path, make, seq_len)

    return PackedData(config, steps, read, {"response_ids": config.examples.most_responses})


def places(preference: Preference, seed: int) -> list[int]:
    """Returns the order in which the responses stand: random, and always the same for the same preference and seed."""
    number = int.from_bytes(preference.key[:8], "big")
    return np.random.default_rng([number, seed]).permutation(len(preference.responses)).tolist()


@functools.cache
def reward_task(most_responses: int) -> Task:
    """Returns the task of a reward model whose rows have up to so many responses."""
    return Task(
        "reward model",
        {name: TOKENS for name in (*MODEL_FIELDS, "response_ids", "levels", "prompt_ids")},
        ranking(most_responses),
        functools.partial(count_comparisons, most_responses=most_responses),
        means_over("pairs"),
        open_preferences,
        has_rewards=True,
    )
