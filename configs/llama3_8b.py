"""Pre-training of Llama 3 8B; the mesh (256 GPUs, pure FSDP with weights gathered layer by layer) is ours."""

from herd_jax.training.recipes import pretraining


def get_config():
    return pretraining("llama3-8b", peak_learning_rate=3e-4, tp=1, pp=1, dp=256, gather="layer")
