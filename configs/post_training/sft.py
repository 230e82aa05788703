"""Supervised fine-tuning of the pre-trained model on dialogs: the paper's rate and steps for its largest models (section 4.1.3); smaller models take larger
rates. A source's number says how often an epoch has it."""

from herd_jax.data.rows import DataConfig
from herd_jax.mesh import MeshConfig
from herd_jax.post_training.config import SftConfig
from herd_jax.training.checkpoints.checkpoint import CheckpointConfig
from herd_jax.training.config import EvalConfig, TrainConfig
from herd_jax.training.optimizer import OptimizerConfig


def get_config():
    return SftConfig(
        workdir="runs/sft",
        init_from="runs/pretrained",
        data=DataConfig({"data/sft": 1.0}),
        mesh=MeshConfig(),
        train=TrainConfig(num_steps=9000, global_batch_size=64, seq_len=8192),
        optimizer=OptimizerConfig(peak_learning_rate=1e-5, final_learning_rate=1e-6, warmup_steps=100, decay_steps=9000, weight_decay=0.1, clip_norm=1.0),
        checkpoint=CheckpointConfig(every_steps=500, keep=3),
        eval=EvalConfig(every_steps=500, num_batches=8),
    )
