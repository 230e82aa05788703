"""Pre-training of Llama 3 405B on 8,192 GPUs: the first row of Table 4 of the paper."""

from herd_jax.training.recipes import pretraining


def get_config():
    return pretraining("llama3-405b", peak_learning_rate=8e-5, tp=8, pp=16, dp=64, num_chunks=8)
