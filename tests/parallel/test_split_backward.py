"""The two parts of a split backward against the whole one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from herd_jax.parallel.split_backward import SplitBackward, origins


def names(eqns):
    return [eqn.primitive.name for eqn in eqns]


def block(weights, x):
    h = jax.checkpoint(lambda x, w: jnp.tanh(x * weights["scale"]) @ w)(x, weights["first"])
    return x + jax.nn.silu(h) @ weights["second"] + weights["unused"] * 0


def parts(function, weights, x, dy):
    """(gradients of the whole backward, of the two parts, the split)."""
    _, vjp = jax.vjp(function, weights, x)
    leaves, tree = jax.tree.flatten(vjp)
    backward = lambda known, dy: jax.tree.unflatten(tree, known)(dy)
    found = {}

    def both(leaves, dy):
        found["split"] = SplitBackward(backward, leaves, dy)
        dx, kept = found["split"].input_part(dy)
        assert [k.shape for k in kept] == [s.shape for s in found["split"].kept_shapes]
        return found["split"].weight_part(kept), dx

    return vjp(dy), jax.jit(both)(leaves, dy), found["split"]


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    weights = {"scale": draw(5), "first": draw(5, 7), "second": draw(7, 5), "unused": draw(5)}
    return weights, draw(3, 5), draw(3, 5)


def test_parts_make_the_whole(arrays):
    weights, x, dy = arrays
    whole, split, _ = parts(block, weights, x, dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), split, whole)


def test_no_product_is_computed_twice_and_weights_products_wait(arrays):
    _, _, split = parts(block, *arrays)
    assert names(split.late).count("dot_general") == 2  # one for each matrix
    assert names(split.early).count("dot_general") == 2 and not set(map(id, split.early)) & {id(e) for e in split.late if e.primitive.name == "dot_general"}


def test_small_gradients_are_not_postponed(arrays):
    """A norm's weight needs a sum, not a product: keeping its sum is cheaper than what it is summed from."""
    _, _, split = parts(block, *arrays)
    assert (5,) in [shape.shape for shape in split.kept_shapes]
    assert "reduce_sum" not in names(split.late)


def test_a_weight_that_is_the_identity():
    """The gradient of a bias without reduction is the cotangent itself, which the second part does not have: it is kept."""
    weights, x = {"bias": jnp.ones((3, 5))}, jnp.ones((3, 5))
    dy = jnp.arange(15.0).reshape(3, 5)
    whole, split, cut = parts(lambda w, x: x + w["bias"], weights, x, dy)
    chex.assert_trees_all_equal(split, whole)
    assert len(cut.kept) == 1


def test_loops_stay_in_one_part(arrays):
    weights, x, dy = arrays

    def looped(weights, x):
        def body(carry, _):
            return jnp.tanh(carry @ weights["first"] @ weights["second"]), None

        return jax.lax.scan(body, x, None, length=3)[0]

    whole, split, _ = parts(looped, weights, x, dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), split, whole)


def test_origins_are_what_calls_hand_through():
    @jax.jit
    def call(x, y):
        z = x + y
        return z, x, z, x * y

    def outer(x, y):
        first, same_as_x, second, product = call(x, y)
        return first, second, same_as_x, x, product, jax.jit(lambda a: a)(product), jnp.sin(first)

    jaxpr = jax.make_jaxpr(outer)(1.0, 2.0).jaxpr
    first, second, same_as_x, x, product, handed, other = origins(jaxpr)
    assert first == second and same_as_x == x == jaxpr.invars[0] and product == handed
    assert len({first, x, product, other}) == 4
