"""Pre-training of Llama 3 70B; the mesh (2,048 GPUs) is ours."""

from herd_jax.training.recipes import pretraining


def get_config():
    return pretraining("llama3-70b", peak_learning_rate=1.5e-4, tp=8, pp=4, dp=64, num_chunks=2)
