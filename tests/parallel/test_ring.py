"""Products taken apart around a ring against the plain ones, which gather first and scatter last: outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.parallel import ring, tensor

WHOLE, SEQUENCE, COLUMNS, ROWS = P(), P(None, "tp"), P(None, "tp"), P("tp")


def run(tp, function, specs, *arrays):
    """Returns the function's output and gradients, put together from all devices."""
    (*in_specs, out_spec), dy = specs, arrays[-1]

    def both(*arguments):
        y, vjp = jax.vjp(function, *arguments[:-1])
        return y, *vjp(arguments[-1])

    mesh = make_mesh(MeshConfig(tp=tp), jax.devices()[:tp])
    mapped = jax.shard_map(both, mesh=mesh, in_specs=(*in_specs, out_spec), out_specs=(out_spec, *in_specs), check_vma=False)
    return jax.jit(mapped)(*arrays[:-1], dy)


@pytest.fixture(params=[1, 1024], ids=["ring", "few columns"])
def least_columns(request, monkeypatch):
    monkeypatch.setattr(ring, "LEAST_COLUMNS", request.param)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_gathered_product(tp, dtype, tolerance, least_columns):
    keys = jax.random.split(jax.random.key(tp), 3)
    x, w, dy = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, [(2, 16, 6), (6, 24), (2, 16, 24)]))
    specs = SEQUENCE, COLUMNS, P(None, None, "tp")
    plain = lambda x, w: lax.dot_general(tensor.gather_sequence(x), w, (((2,), (0,)), ((), ())))
    for found, expected in zip(run(tp, ring.gather_product, specs, x, w, dy), run(tp, plain, specs, x, w, dy), strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_scattered_product(tp, dtype, tolerance, least_columns):
    keys = jax.random.split(jax.random.key(tp), 3)
    x, w, dy = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, [(2, 16, 24), (24, 6), (2, 16, 6)]))
    specs = P(None, None, "tp"), ROWS, SEQUENCE
    plain = lambda x, w: tensor.scatter_sequence(lax.dot_general(x, w, (((2,), (0,)), ((), ()))))
    for found, expected in zip(run(tp, ring.product_scatter, specs, x, w, dy), run(tp, plain, specs, x, w, dy), strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=tolerance, atol=8 * tolerance)
