"""The end of the 405B's pre-training: continues the run of llama3_405b.py. Average its checkpoints with `python -m herd_jax.average --last 3`.

The paper says 40M tokens, which are 2.5 steps of its batch and may be a misprint of 40B (its test of a small data set has 40B): choose.
"""

from herd_jax.training.recipes import ANNEALING_MIX, annealing, pretraining


def get_config():
    run = pretraining("llama3-405b", peak_learning_rate=8e-5, tp=8, pp=16, dp=64, num_chunks=8)
    return annealing(run, 40_000_000, ANNEALING_MIX, num_checkpoints=3)
