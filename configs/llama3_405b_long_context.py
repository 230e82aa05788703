"""Llama 3 405B from the first token to a context of 128K, on 16,384 GPUs: rows 2 and 3 of Table 4 of the paper, and six stages between them.

The lengths between 8K and 128K, and their meshes, are ours: the paper does not say them.
"""

import dataclasses

from herd_jax.training.recipes import long_context, pretraining


def get_config():
    run = pretraining("llama3-405b", peak_learning_rate=8e-5, tp=8, pp=16, dp=128, num_chunks=8)
    run = dataclasses.replace(run, workdir="runs/llama3-405b-long-context")
    return long_context(run, seq_lens=tuple(k * 1024 for k in (16, 32, 48, 64, 96, 128)), cps=(2, 4, 8, 8, 16, 16))
