"""DPO on the newest preferences: the paper's rate, beta, format mask and share of the cross-entropy (section 4.1.4). It has fewer steps than SFT; how many
is ours."""

from herd_jax.data.rows import DataConfig
from herd_jax.post_training.config import DpoConfig
from herd_jax.training.checkpoints.checkpoint import CheckpointConfig
from herd_jax.training.config import EvalConfig, TrainConfig
from herd_jax.training.optimizer import OptimizerConfig


def get_config():
    return DpoConfig(
        workdir="runs/dpo",
        init_from="runs/sft",
        data=DataConfig({"data/newest-preferences": 1.0}),
        train=TrainConfig(num_steps=1000, global_batch_size=64, seq_len=4096),
        optimizer=OptimizerConfig(peak_learning_rate=1e-5, final_learning_rate=1e-6, warmup_steps=100, decay_steps=1000, weight_decay=0.0, clip_norm=1.0),
        checkpoint=CheckpointConfig(every_steps=250, keep=3),
        eval=EvalConfig(every_steps=100, num_batches=8),
    )
