"""The reward model, on all preferences so far (section 4.1.2). The rate and the steps are ours: the paper does not say."""

from herd_jax.data.rows import DataConfig
from herd_jax.post_training.config import RewardConfig
from herd_jax.training.checkpoints.checkpoint import CheckpointConfig
from herd_jax.training.config import EvalConfig, TrainConfig
from herd_jax.training.optimizer import OptimizerConfig


def get_config():
    return RewardConfig(
        workdir="runs/reward",
        init_from="runs/pretrained",
        data=DataConfig({"data/preferences": 1.0}),
        train=TrainConfig(num_steps=2000, global_batch_size=64, seq_len=4096),
        optimizer=OptimizerConfig(peak_learning_rate=1e-5, final_learning_rate=1e-6, warmup_steps=100, decay_steps=2000, weight_decay=0.1, clip_norm=1.0),
        checkpoint=CheckpointConfig(every_steps=500, keep=3),
        eval=EvalConfig(every_steps=250, num_batches=8),
    )
