"""The step on every mesh against one device, and one device against autodiff through a plain forward."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax.parallel import ring, tensor
from herd_jax.parallel.schedule import PipelineConfig

MESHES = [m for m in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(m) in (1, 2, 4, 8)]
name = lambda mesh: "tp{}-cp{}-pp{}-dp{}".format(*mesh)
# By default each axis alone and the meshes of eight devices whose axes are at most 2; `pytest -m slow` has the other 23.
TYPICAL = [m for m in MESHES if np.prod(m) == 2 or np.prod(m) == 8 and max(m) in (2, 8)]
slow_unless = lambda typical, *values: pytest.param(*values, marks=() if typical else pytest.mark.slow)


@pytest.fixture(scope="module")
def rows():
    return tiny.make_rows()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def oracle(request, rows):
    """(config, loss, gradient) of the plain forward."""
    config = tiny.tied() if request.param else tiny.CONFIG
    params = tiny.canonical_params(tiny.make_steps(config=config))
    loss, gradient = tiny.plain_loss_and_gradient(params, rows, config)
    return config, float(loss), jax.tree.map(np.asarray, gradient)


@pytest.mark.parametrize("gather", ["step", "layer"])
@pytest.mark.parametrize("remat", ["none", "attention", "layer"])
def test_one_device_against_plain_forward(oracle, rows, gather, remat):
    config, loss, gradient = oracle
    steps = tiny.make_steps(config=config, gather=gather, remat=remat)
    got_loss, got = tiny.loss_and_gradient(steps, rows, 2)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    tiny.assert_close(got, gradient)


@pytest.fixture(scope="module")
def one_device(rows):
    return tiny.one_device_row_by_row(rows)


@pytest.mark.parametrize("mesh", [slow_unless(mesh in TYPICAL, mesh) for mesh in MESHES], ids=name)
def test_every_mesh_against_one_device(mesh, rows, one_device):
    gather = ("step", "layer")[sum(mesh) % 2]
    loss, gradient = tiny.loss_and_gradient(tiny.make_steps(*mesh, gather=gather), rows, 2)
    assert loss == pytest.approx(one_device[0], rel=1e-5)
    tiny.assert_close(gradient, one_device[1])


@pytest.mark.parametrize("mesh", [(2, 2, 2, 1), slow_unless(False, (1, 2, 2, 2)), slow_unless(False, (2, 1, 2, 2))], ids=name)
@pytest.mark.parametrize("gather", ["step", "layer"])
@pytest.mark.parametrize("remat", ["none", slow_unless(False, "attention"), "layer"])
def test_gather_and_remat_on_meshes(mesh, gather, remat, rows, one_device):
    steps = tiny.make_steps(*mesh, gather=gather, remat=remat, attention="blockwise")
    loss, gradient = tiny.loss_and_gradient(steps, rows, 2)
    assert loss == pytest.approx(one_device[0], rel=1e-5)
    tiny.assert_close(gradient, one_device[1])


def test_tied_embeddings_on_a_mesh(rows):
    expected = tiny.one_device_row_by_row(rows, tiny.tied())
    loss, gradient = tiny.loss_and_gradient(tiny.make_steps(2, 1, 2, 2, config=tiny.tied()), rows, 4)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    tiny.assert_close(gradient, expected[1])


@pytest.mark.parametrize("pp, num_micro_batches", [slow_unless((pp, m) in ((4, 2), (4, 16), (1, 2)), pp, m) for pp in (1, 4) for m in (1, 2, 4, 8, 16)])
def test_micro_batches_of_unequal_target_counts(num_micro_batches, pp, rows, one_device):
    loss, gradient = tiny.loss_and_gradient(tiny.make_steps(pp=pp), rows, num_micro_batches)
    assert loss == pytest.approx(one_device[0], rel=1e-5)
    tiny.assert_close(gradient, one_device[1])


# (mesh, micro-batches, pipeline, rest): every schedule with tp, cp and dp on, odd M, M smaller than PP, each remat. Half of them by default.
SCHEDULES = [
    ((1, 1, 4, 2), 8, PipelineConfig("gpipe"), {}),
    ((2, 2, 2, 1), 3, PipelineConfig("gpipe"), {"remat": "attention"}),
    ((1, 1, 4, 2), 3, PipelineConfig("1f1b", overlap=True), {}),
    ((1, 1, 8, 1), 5, PipelineConfig("1f1b"), {"remat": "layer"}),
    ((1, 1, 2, 4), 4, PipelineConfig("interleaved", 2), {}),
    ((2, 1, 4, 1), 10, PipelineConfig("interleaved", 2, 5), {"attention": "blockwise"}),
    ((1, 2, 2, 2), 5, PipelineConfig("interleaved", 3, 2), {"gather": "layer"}),
    ((2, 2, 2, 1), 7, PipelineConfig("interleaved", 2, 7, overlap=True), {"remat": "layer"}),
    ((1, 1, 4, 1), 2, PipelineConfig("interleaved", 4), {}),
    ((1, 1, 4, 2), 8, PipelineConfig("zero_bubble"), {}),
    ((2, 2, 2, 1), 3, PipelineConfig("zero_bubble"), {"gather": "layer", "remat": "layer"}),
    ((1, 2, 4, 1), 2, PipelineConfig("zero_bubble", overlap=True), {"remat": "attention", "attention": "blockwise"}),
    ((2, 1, 2, 2), 6, PipelineConfig("zero_bubble", 2), {"gather": "layer"}),
    ((1, 1, 4, 2), 9, PipelineConfig("zero_bubble", 3, 4, overlap=True), {"attention": "blockwise"}),
]


@pytest.mark.parametrize(
    "mesh, num_micro_batches, schedule, options", [slow_unless(i in (1, 2, 5, 6, 10, 11, 13), *case) for i, case in enumerate(SCHEDULES)]
)
def test_every_schedule_against_one_device(mesh, num_micro_batches, schedule, options):
    """Packed documents, tied embeddings, 5 layers: on most of these pipelines some stages have fewer layers than others, or none."""
    config = tiny.tied()
    rows = tiny.make_rows(seed=1, num_rows=num_micro_batches * mesh[3])
    expected = tiny.one_device_row_by_row(rows, config)
    steps = tiny.make_steps(*mesh, config=config, pipeline=schedule, **options)
    loss, gradient = tiny.loss_and_gradient(steps, rows, num_micro_batches)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    tiny.assert_close(gradient, expected[1])
    sums, counts = steps.evaluate(steps.plan.init(0).params, tiny.to_batch(steps, rows, num_micro_batches))
    assert float(sums["loss"]) / float(counts["targets"]) == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize(
    "mesh, num_micro_batches, options",
    [
        ((1, 1, 1, 1), 2, {}),
        ((2, 2, 1, 2), 2, {"gather": "layer", "attention": "blockwise"}),
        ((1, 2, 2, 2), 4, {"pipeline": PipelineConfig("zero_bubble"), "remat": "layer"}),
    ],
    ids=["one device", "meshed", "zero bubble"],
)
def test_gradients_in_bfloat16_are_those_of_float32_but_for_rounding(mesh, num_micro_batches, options, rows, one_device):
    """A backend may take another way for its products than in FP32."""
    loss, gradient = tiny.loss_and_gradient(tiny.make_steps(*mesh, dtype=jnp.bfloat16, **options), rows, num_micro_batches)
    assert loss == pytest.approx(one_device[0], rel=1e-2)
    for (path, got), expected in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(one_device[1]), strict=True):
        error = np.linalg.norm(np.float64(got) - np.float64(expected)) / np.linalg.norm(np.float64(expected))
        assert error < 0.06, (jax.tree_util.keystr(path), error)


def test_packed_documents_are_as_if_alone(rows):
    """Each document of a packed row, cut out and padded to a row of its own, gives the same loss and gradient."""
    packed = tiny.make_rows(seed=3, num_rows=4)
    alone = {field: [] for field in packed}
    for r in range(4):
        for segment in np.unique(packed["segment_ids"][r]):
            where = np.flatnonzero(packed["segment_ids"][r] == segment)
            for field, array in packed.items():
                alone[field].append(np.pad(array[r, where], (0, tiny.SEQ_LEN - len(where))))
    alone = {field: np.stack(arrays) for field, arrays in alone.items()}
    assert len(alone["tokens"]) > 4
    expected = tiny.one_device_row_by_row(alone)
    for mesh in ((1, 1, 1, 1), (1, 4, 1, 1)):
        loss, gradient = tiny.loss_and_gradient(tiny.make_steps(*mesh, attention="blockwise"), packed, 1)
        assert loss == pytest.approx(expected[0], rel=1e-5)
        tiny.assert_close(gradient, expected[1])


def test_training_on_a_mesh_follows_one_device(rows):
    """Several optimizer steps with clipping: losses and norms agree, so the norm counts each parameter once on every mesh."""
    runs = []
    for mesh in ((1, 1, 1, 1), (2, 2, 2, 1), (1, 1, 2, 4)):
        steps = tiny.make_steps(*mesh, clip_norm=0.5)
        state, batch = steps.plan.init(0), tiny.to_batch(steps, rows, 2)
        seen = []
        for _ in range(4):
            state, metrics = steps.train(state, batch)
            seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        assert int(state.step) == 4 and seen[-1][0] < seen[0][0]
        runs.append(seen)
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)
    np.testing.assert_allclose(runs[2], runs[0], rtol=1e-5)


def test_non_finite_step_changes_nothing_but_the_count(rows):
    steps = tiny.make_steps(2, 1, 2, 2)
    state, batch = steps.plan.init(0), tiny.to_batch(steps, rows, 2)
    state = state._replace(params=jax.tree.map(lambda p: p, state.params))
    before = jax.tree.map(np.array, (state.params, state.optimizer))
    poisoned = state.params["layers"]["down"].at[0, 0, 0].set(jnp.inf)
    bad = state._replace(params={**state.params, "layers": {**state.params["layers"], "down": poisoned}})
    after, metrics = steps.train(bad, batch)
    assert not bool(metrics["finite"]) and int(after.step) == 1
    after = jax.tree.map(np.array, (after.params, after.optimizer))
    after[0]["layers"]["down"][0, 0, 0] = before[0]["layers"]["down"][0, 0, 0]
    chex.assert_trees_all_equal(after, before)


def test_padded_vocabulary_and_empty_slots_stay_zero(rows):
    steps = tiny.make_steps(8, 1, 1, 1)
    state, _ = steps.train(steps.plan.init(0), tiny.to_batch(steps, rows, 2))
    table = np.asarray(state.params["ends"]["embed"]["table"])
    assert table.shape[0] == 64 and (table[61:] == 0).all() and (table[:61] != 0).any()
    steps = tiny.make_steps(1, 1, 8, 1)
    state, _ = steps.train(steps.plan.init(0), tiny.to_batch(steps, rows, 2))
    empty = steps.layout.slots(steps.model.declared["layers"]["qkv"]) < 0
    down = np.asarray(state.params["layers"]["down"])
    assert empty.sum() == 3 and (down[empty] == 0).all() and (down[~empty] != 0).any()


def test_evaluate_is_the_training_loss(rows, one_device):
    for mesh in ((1, 1, 1, 1), (2, 2, 2, 1), (1, 1, 4, 2)):
        steps = tiny.make_steps(*mesh)
        sums, counts = steps.evaluate(steps.plan.init(0).params, tiny.to_batch(steps, rows, 2))
        assert float(counts["targets"]) == rows["loss_mask"].sum()
        assert float(sums["loss"]) / float(counts["targets"]) == pytest.approx(one_device[0], rel=1e-5)


def test_no_weight_is_among_the_residuals(rows):
    """What waits between forward and backward grows with tokens, not with weights."""
    from herd_jax.parallel.stage import LayerVjp

    for remat, most in (("none", 9), ("attention", 3), ("layer", 1)):
        steps = tiny.make_steps(attention="blockwise", remat=remat)
        stored = []

        def probe(params, batch):
            micro_batch = jax.tree.map(lambda a: a[0], steps.model.micro_batches(batch))
            program = steps.model.program(steps.layout.layers_per_stage, None)
            weights = jax.tree.map(lambda w: w[0], params["layers"])
            x_BTD = program.embed(params["ends"], micro_batch)
            stored.extend(LayerVjp.trace(program.layer, weights, x_BTD, micro_batch).stored)
            return x_BTD

        state = steps.plan.init(0)
        batch = tiny.to_batch(steps, tiny.make_rows(num_rows=7), 1)
        specs = (steps.plan.specs.params, jax.tree.map(lambda _: steps.batch_sharding.spec, batch))
        mapped = jax.shard_map(probe, mesh=steps.layout.mesh, in_specs=specs, out_specs=jax.P(), check_vma=False)
        jax.eval_shape(mapped, state.params, batch)
        assert all(7 in leaf.shape for leaf in stored if leaf.shape), stored
        assert len(stored) <= most, stored


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (1, 2, 1, 2), (2, 1, 1, 2)], ids=name)
@pytest.mark.parametrize("gather", ["step", "layer"])
def test_one_micro_batch_writes_what_several_add_up(mesh, gather, rows, one_device):
    loss, gradient = tiny.loss_and_gradient(tiny.make_steps(*mesh, gather=gather), rows, 1)
    assert loss == pytest.approx(one_device[0], rel=1e-5)
    tiny.assert_close(gradient, one_device[1])


@pytest.mark.parametrize("mesh, remat, least", [((2, 1, 1, 1), "none", 1), ((4, 1, 1, 2), "layer", 1), ((2, 2, 1, 2), "attention", 1), ((2, 1, 1, 2), "none", 99)])
def test_products_around_a_ring_give_the_same(mesh, remat, least, rows, one_device, monkeypatch):
    """As on GPUs: messages beside the products that they belong to."""
    monkeypatch.setattr(tensor, "split_sequence", lambda: tensor.OVERLAPPED_SEQUENCE)
    monkeypatch.setattr(ring, "LEAST_COLUMNS", least)
    loss, gradient = tiny.loss_and_gradient(tiny.make_steps(*mesh, remat=remat), rows, 2)
    assert loss == pytest.approx(one_device[0], rel=1e-5)
    tiny.assert_close(gradient, one_device[1])
