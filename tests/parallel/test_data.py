"""FSDP: weights gathered in the compute dtype, gradients summed in FP32 over the devices that saw other tokens and no others."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from herd_jax.mesh import AXES, FSDP_AXES, MeshConfig, make_mesh
from herd_jax.parallel import data

# As the model's weights lie: tp on another dim than FSDP, FSDP alone, not sharded at all, and stacked by pipeline stage.
SPECS = {
    "both": P(FSDP_AXES, "tp"),
    "behind": P("tp", FSDP_AXES),
    "fsdp": P(None, FSDP_AXES),
    "norm": P(None),
    "stacked": P("pp", FSDP_AXES, None),
}
SHAPES = {"both": (8, 4), "behind": (4, 8), "fsdp": (3, 8), "norm": (5,), "stacked": (2, 8, 3)}
MESHES = pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 2, 2, 2), (2, 1, 2, 2), (1, 4, 1, 2), (1, 1, 1, 1)])
EVERY_DEVICE = P(AXES)  # one entry a device, in mesh order


def make(sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])


def mapped(mesh, function, in_specs, out_specs):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def without(spec, *axes):
    return P(*[None if entry in axes else entry for entry in spec])


@MESHES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gather_weights(sizes, dtype):
    """Every device has the FSDP dim whole and in order; tp and pp parts stay parts."""
    mesh, rng = make(sizes), np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    shards = {name: jax.device_put(w, NamedSharding(mesh, SPECS[name])) for name, w in weights.items()}
    out_specs = {name: without(spec, FSDP_AXES) for name, spec in SPECS.items()}
    gathered = mapped(mesh, lambda w: data.gather_weights(w, SPECS, dtype), (SPECS,), out_specs)(shards)
    for name, weight in weights.items():
        assert gathered[name].dtype == dtype
        for shard in gathered[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, weight.astype(dtype)[shard.index])


def reduction(mesh, dtype):
    """`reduce_gradients` of gradients in `dtype`; leaves [devices, *local shape], in mesh order."""

    def reduce(gradients):
        mine = jax.tree.map(lambda g: g[0].astype(dtype), gradients)
        return jax.tree.map(lambda g: g[None], data.reduce_gradients(mine, SPECS))

    return mapped(mesh, reduce, (EVERY_DEVICE,), EVERY_DEVICE)


def reduced(mesh, gradients, dtype):
    """`gradients`: per leaf [tp, cp, pp, dp, *local shape], what each device found. Returns the same of `reduce_gradients`."""
    got = reduction(mesh, dtype)({name: g.reshape(mesh.size, *g.shape[4:]) for name, g in gradients.items()})
    assert all(g.dtype == jnp.float32 for g in got.values())
    return {name: np.asarray(g).reshape(*mesh.devices.shape, *g.shape[1:]) for name, g in got.items()}


def expected_sum(gradient, spec):
    """The sum over cp and dp, and over tp unless the weight is split over it; of which (dp, cp) rank i keeps part i."""
    over = (1, 3) if "tp" in spec else (0, 1, 3)
    total = np.broadcast_to(gradient.sum(over, keepdims=True), gradient.shape)
    if FSDP_AXES not in spec:
        return total
    num_cp, num_dp = gradient.shape[1], gradient.shape[3]
    parts = np.split(total, num_cp * num_dp, axis=4 + list(spec).index(FSDP_AXES))
    kept = np.empty(parts[0].shape)
    for dp in range(num_dp):
        for cp in range(num_cp):
            kept[:, cp, :, dp] = parts[dp * num_cp + cp][:, cp, :, dp]
    return kept


def local_shapes(mesh):
    """One device's part of each weight, whole over FSDP: what a gradient is shaped like before it is reduced."""
    return {name: NamedSharding(mesh, without(SPECS[name], FSDP_AXES)).shard_shape(shape) for name, shape in SHAPES.items()}


@MESHES
def test_reduce_gradients(sizes):
    mesh, rng = make(sizes), np.random.default_rng(1)
    gradients = {name: rng.normal(size=(*sizes, *shape)).astype(np.float32) for name, shape in local_shapes(mesh).items()}
    for name, got in reduced(mesh, gradients, jnp.float32).items():
        np.testing.assert_allclose(got, expected_sum(gradients[name].astype(np.float64), SPECS[name]), rtol=1e-5, atol=1e-6)


def test_bf16_gradients_are_summed_in_fp32():
    """Each device's gradient is exact in BF16, the sums of 256s and ones are not: only FP32 sums come out exact.

    A CPU sums in FP32 anyhow, so the program is read too.
    """
    mesh, rng = make((2, 2, 1, 2)), np.random.default_rng(2)
    gradients = {name: rng.choice([1.0, 3.0, 256.0], (2, 2, 1, 2, *shape)) for name, shape in local_shapes(mesh).items()}
    for name, got in reduced(mesh, gradients, jnp.bfloat16).items():
        exact = expected_sum(gradients[name], SPECS[name])
        assert (exact != np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)).any()
        np.testing.assert_array_equal(got, exact)
    flat = {name: g.reshape(8, *g.shape[4:]) for name, g in gradients.items()}
    program = str(jax.make_jaxpr(reduction(mesh, jnp.bfloat16))(flat))
    sums = re.findall(r":(\w+)\[[^\]]*\] = (?:psum|reduce_scatter)\w*\[", program)
    assert len(sums) >= len(SPECS) and set(sums) == {"f32"}
