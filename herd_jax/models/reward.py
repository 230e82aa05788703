"""The reward of a token: a number from its last hidden state, in place of the logits of what follows (section 4.1.2 of the paper).

Each tp rank has a part of the weights, and multiplies that part of the hidden state, which is whole on all of them: so no gradient is counted
more than once.
"""

import jax
import jax.numpy as jnp
from jax import lax

from herd_jax.parallel import tensor


def rewards(hidden_BTD: jax.Array, reward_D: jax.Array) -> jax.Array:
    """Returns the reward of each token, FP32 [B, T], the same on every tp rank; `reward_D` is this rank's part of the weights."""
    size = reward_D.shape[0]
    own_BTD = lax.dynamic_slice_in_dim(hidden_BTD, lax.axis_index("tp") * size, size, 2)
    return tensor.sum_of_parts(jnp.einsum("btd,d->bt", own_BTD, reward_D, preferred_element_type=jnp.float32))
