"""What a step minimises: functions from the last hidden state to a scalar and the sums that are logged (`herd_jax.training.task.Objective`)."""

import jax

from herd_jax.models.cross_entropy import cross_entropy_sum
from herd_jax.training.task import Fields


def next_token(vocab_size: int, weight: jax.Array | float):
    """Returns the objective of pre-training: the sum of masked token losses times `weight`; what is logged is unweighted, in nats."""

    def objective(hidden_BTD: jax.Array, output_DV: jax.Array, fields: Fields):
        loss = cross_entropy_sum(hidden_BTD, output_DV, fields["targets"], fields["loss_mask"], vocab_size)
        return loss * weight, {"loss": loss}

    return objective
