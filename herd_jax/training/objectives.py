"""What a step minimises: functions from the last hidden state to a scalar and the sums that are logged."""

import jax

from herd_jax.models.cross_entropy import cross_entropy_sum
from herd_jax.models.llama import MicroBatch


def next_token(vocab_size: int, weight: jax.Array | float):
    """Pre-training: the sum of masked token losses times `weight`.

    With weight = 1 / (global number of targets) the scalars of all devices and micro-batches sum to the mean loss of the step,
    however the batch is cut. The sum that is logged is unweighted, in nats.
    """

    def objective(hidden_BTD: jax.Array, output_DV: jax.Array, batch: MicroBatch):
        loss = cross_entropy_sum(hidden_BTD, output_DV, batch.targets_BT, batch.loss_mask_BT, vocab_size)
        return loss * weight, {"loss": loss}

    return objective
