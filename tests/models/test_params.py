"""The one declaration: exact parameter counts, where each parameter lies, the same first values and checkpoints on every mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from herd_jax.mesh import FSDP_AXES, MeshConfig, make_mesh
from herd_jax.models.config import MODELS
from herd_jax.models.llama import Llama
from herd_jax.models.params import Declaration, Layout, count, normal, ones

MESHES = pytest.mark.parametrize("mesh", [(2, 1, 1, 1), (1, 1, 2, 1), (2, 2, 2, 1), (1, 1, 8, 1), (1, 2, 1, 4)], ids=str)
FSDP = FSDP_AXES


def layout(tp=1, cp=1, pp=1, dp=1, num_layers=5, num_chunks=1):
    return Layout.make(make_mesh(MeshConfig(tp, cp, pp, dp), jax.devices()[: tp * cp * pp * dp]), num_layers, num_chunks)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
    ],
)
def test_parameter_counts(name, expected):
    declared = Llama.make(MODELS[name]).declared
    assert count(declared) == expected
    shapes = [d.canonical_shape for d in jax.tree.leaves(declared, is_leaf=lambda node: isinstance(node, Declaration))]
    assert sum(np.prod(shape, dtype=np.int64) for shape in shapes) == expected


def test_every_parameter_by_hand():
    """What is declared for the tiny model, and its placement."""
    where = layout(2, 2, 2, 1)
    declared = Llama.make(tiny.CONFIG).declared
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): (d.canonical_shape, where.spec(d), d.decays)
        for path, d in jax.tree.leaves_with_path(declared, is_leaf=lambda node: isinstance(node, Declaration))
    }
    assert found == {
        "ends.embed.table": ((61, 32), P("tp", FSDP), True),
        "ends.head.norm": ((32,), P(None), False),
        "ends.head.output": ((32, 61), P(FSDP, "tp"), True),
        "layers.attention_norm": ((5, 32), P("pp", None), False),
        "layers.qkv": ((5, 32, 8, 4, 4), P("pp", FSDP, "tp", None, None), True),
        "layers.out": ((5, 8, 2, 4, 32), P("pp", "tp", None, None, FSDP), True),
        "layers.ffn_norm": ((5, 32), P("pp", None), False),
        "layers.gate_up": ((5, 32, 2, 48), P("pp", FSDP, None, "tp"), True),
        "layers.down": ((5, 48, 32), P("pp", "tp", FSDP), True),
    }
    assert "output" not in Llama.make(tiny.tied()).declared["ends"]["head"]


def of_layers(layers):
    return Declaration((2, 3), (None, None), normal(1.0), layers=tuple(layers))


def test_layers_in_slots_by_hand():
    five = of_layers(range(5))
    assert layout(num_layers=5).slots(five).tolist() == [0, 1, 2, 3, 4]
    assert layout(pp=2).slots(five).tolist() == [0, 1, 2, 3, 4, -1]
    assert layout(pp=4).slots(five).tolist() == [0, -1, 1, 2, 3, -1, 4, -1]
    # Rank 0 has stages 0 and 2, rank 1 has stages 1 and 3.
    assert layout(pp=2, num_chunks=2).slots(five).tolist() == [0, -1, 3, -1, 1, 2, 4, -1]
    assert layout(pp=2, num_layers=4).is_canonical(of_layers(range(4))) and not layout(pp=2).is_canonical(five)
    assert not layout(pp=2, num_chunks=2, num_layers=6).is_canonical(of_layers(range(6)))  # no slot is empty, but ranks come first
    # Of layers 1 to 3, which alone have a parameter, rank 0 (layers 0 to 2) has two and rank 1 (3 and 4) one.
    assert layout(pp=2).slots(of_layers((1, 2, 3))).tolist() == [1, 2, 3, -1]
    assert layout().is_canonical(of_layers((1, 2, 3))) and not layout(pp=2).is_canonical(of_layers((1, 2, 3)))


def test_the_papers_balance():
    """126 layers on 16 ranks of 8 chunks: none on the first and the last stage, one on each other."""
    mesh = type("Mesh", (), {"shape": {"pp": 16}})()
    where = Layout.make(mesh, 126, 8)
    assert where.layers_per_stage == (0, *[1] * 126, 0)
    assert sorted(where.slots(of_layers(range(126)))) == [-1, -1, *range(126)]


def test_stored_shapes_are_those_of_the_mesh():
    """The vocabulary padded to a multiple of tp, layers to equal slots; nothing else changes."""
    table, down = Declaration((61, 32), ("vocab", "embed"), ones), Declaration((48, 32), ("ffn", "embed"), ones, layers=tuple(range(5)))
    assert layout().stored_shape(table) == (61, 32) and layout().stored_shape(down) == (5, 48, 32)
    assert layout(tp=4).stored_shape(table) == (64, 32)
    assert layout(pp=4).stored_shape(down) == (8, 48, 32)


@pytest.fixture(scope="module")
def one_device():
    return tiny.canonical_params(tiny.make_steps(), seed=7)


@MESHES
def test_first_values_are_the_same_on_every_mesh(mesh, one_device):
    """Bit for bit, padding and empty slots left out."""
    chex.assert_trees_all_equal(tiny.canonical_params(tiny.make_steps(*mesh), seed=7), one_device)


def test_first_values(one_device):
    """Norms one, matrices normal with the configured spread, those that write to the residual stream divided by sqrt(2 L)."""
    layers, ends, std = one_device["layers"], one_device["ends"], tiny.CONFIG.init_std
    for norm in (layers["attention_norm"], layers["ffn_norm"], ends["head"]["norm"]):
        assert (norm == 1).all()
    spread = {"qkv": std, "gate_up": std, "out": std / np.sqrt(10), "down": std / np.sqrt(10)}
    for name, expected in spread.items():
        assert layers[name].std() == pytest.approx(expected, rel=0.05)
        assert not (layers[name][0] == layers[name][1]).any()
    assert ends["embed"]["table"].std() == pytest.approx(std, rel=0.1)
    assert not (ends["embed"]["table"].T == ends["head"]["output"]).any()
    other = tiny.canonical_params(tiny.make_steps(), seed=8)
    assert not (other["layers"]["qkv"] == layers["qkv"]).any()


@settings(deadline=None, max_examples=15)
@given(
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2]),
    num_layers=st.integers(1, 9),
    num_chunks=st.integers(1, 3),
    vocab_size=st.integers(1, 9),
    some=st.lists(st.integers(0, 8), min_size=1, unique=True),
)
def test_canonical_round_trip(tp, pp, num_layers, num_chunks, vocab_size, some):
    """Whatever the layers (all, or some), slots and padding, a checkpoint's array comes back, and what is stored beside it is zero."""
    where = layout(tp=tp, pp=pp, num_layers=num_layers, num_chunks=num_chunks)
    table = Declaration((vocab_size, 3), ("vocab", None), normal(1.0))
    for declaration in (of_layers(range(num_layers)), of_layers(sorted({layer % num_layers for layer in some})), table):
        canonical = 1 + np.arange(declaration.size, dtype=np.float32).reshape(declaration.canonical_shape)
        stored = where.from_canonical(declaration, jnp.asarray(canonical))
        assert stored.shape == where.stored_shape(declaration) and np.count_nonzero(stored) == declaration.size
        np.testing.assert_array_equal(where.to_canonical(declaration, stored), canonical)
        np.testing.assert_array_equal(where.from_canonical(declaration, where.to_canonical(declaration, stored)), stored)
        if declaration.layers:
            numbers = jnp.asarray(declaration.layers)[:, None, None] + jnp.ones((1, 2, 3))
            np.testing.assert_array_equal(where.from_canonical(declaration, numbers)[:, 0, 0], where.slots(declaration) + 1)
            key = jax.random.key(0)
            first = where.to_canonical(declaration, where.init(declaration, key))
            expected = [declaration.init(jax.random.fold_in(key, layer), declaration.shape) for layer in declaration.layers]
            np.testing.assert_array_equal(first, np.stack(expected))  # a layer's first value does not depend on the others


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (2, 1, 4, 1), (4, 2, 1, 1)], ids=str)
def test_a_state_restored_on_a_mesh(mesh):
    """A state goes through its canonical form and lies on the mesh as before, values and shardings."""
    plan = tiny.make_steps(*mesh).plan
    state = plan.init(0)
    before = jax.tree.map(np.array, state)
    canonical = plan.to_canonical(state)
    for leaf, abstract in zip(jax.tree.leaves(canonical), jax.tree.leaves(plan.abstract_canonical()), strict=True):
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
    restored = plan.from_canonical(canonical)
    chex.assert_trees_all_equal(jax.tree.map(np.array, restored), before)
    for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(plan.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_no_rank_holds_all_layers_of_a_canonical_state():
    """5 layers do not divide by pp 4 or 2: the dim that FSDP shards takes pp too, where it divides."""
    for mesh in ((1, 1, 4, 2), (2, 1, 2, 2), (1, 2, 2, 2)):
        steps = tiny.make_steps(*mesh)
        state = steps.plan.to_canonical(steps.plan.init(0))
        for name in ("qkv", "out", "gate_up", "down"):
            leaf = state.params["layers"][name]
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size, (mesh, name)
