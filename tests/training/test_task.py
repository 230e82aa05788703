"""Tasks whose loss is of rows and of pairs of rows, and rows with several responses: on any mesh as autodiff of a plain forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax.data.batches import ROWS, TOKENS
from herd_jax.models.log_probabilities import log_probabilities
from herd_jax.parallel import collectives, context
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.task import Task, means_over

ZERO_BUBBLE = PipelineConfig("zero_bubble")
MESHES = pytest.mark.parametrize(
    "mesh, options",
    [
        ((1, 1, 1, 1), {}),
        ((2, 2, 1, 2), {"remat": "layer", "gather": "layer"}),
        ((1, 2, 2, 2), {"pipeline": ZERO_BUBBLE}),
        ((2, 1, 2, 2), {"remat": "attention", "attention": "blockwise"}),
        ((1, 4, 2, 1), {"attention": "blockwise", "pipeline": PipelineConfig("interleaved", 2)}),
        pytest.param((4, 2, 1, 1), {}, marks=pytest.mark.slow),
    ],
    ids=str,
)


def loss_of_rows(log_p_B, sign_B):
    """Not linear in the sum over a row, so that no mean of parts gives it."""
    return jax.nn.softplus(-sign_B * log_p_B / 20)


def loss_of_pairs(log_p_B, sign_B):
    """Rows 2i and 2i + 1 of a device's micro-batch: the same for both orders of a pair."""
    first, second = log_p_B.reshape(-1, 2).T
    return jax.nn.softplus(-(first - second) * sign_B[::2] / 5)


def task_of(loss_of) -> Task:
    def objective(vocab_size, weights):
        def of_micro_batch(hidden_BTD, output_DV, fields):
            log_p_BT = log_probabilities(hidden_BTD, output_DV, fields["targets"], vocab_size)
            log_p_B = context.sum_over_rows(jnp.where(fields["loss_mask"], log_p_BT, 0))
            share = 1 / collectives.axis_size("cp")  # each cp rank knows the whole row
            loss = loss_of(log_p_B, fields["sign"]).sum() * share
            return loss * weights["rows"], {"loss": loss, "likely": (log_p_B > -50).sum(dtype=jnp.float32) * share}

        return of_micro_batch

    counts = lambda fields: {"rows": jnp.float32(fields["sign"].size) / collectives.axis_size("cp")}
    return Task(loss_of.__name__, {**NEXT_TOKEN.fields, "sign": ROWS}, objective, counts, means_over("rows"), None)


def rows_with_signs():
    rows = tiny.make_rows()
    return rows | {"sign": np.random.default_rng(1).choice([-1.0, 1.0], tiny.NUM_ROWS).astype(np.float32)}


def plain_log_p(params, rows):
    log_p = jax.nn.log_softmax(tiny.plain_logits(params, rows))
    taken = jnp.take_along_axis(log_p, rows["targets"][..., None], -1)[..., 0]
    return jnp.where(rows["loss_mask"], taken, 0).sum(-1)


@pytest.fixture(scope="module")
def params():
    return tiny.canonical_params(tiny.make_steps())


@MESHES
@pytest.mark.parametrize("loss_of", [loss_of_pairs, pytest.param(loss_of_rows, marks=pytest.mark.slow)])
def test_losses_of_rows_and_pairs_are_those_of_a_plain_forward(mesh, options, loss_of, params):
    rows = rows_with_signs()
    expected, gradient = jax.value_and_grad(lambda p: loss_of(plain_log_p(p, rows), rows["sign"]).sum() / tiny.NUM_ROWS)(params)
    steps = tiny.make_steps(*mesh, task=task_of(loss_of), **options)
    loss, found = tiny.loss_and_gradient(steps, rows, num_micro_batches=4)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    tiny.assert_close(found, gradient, 1e-4)


def test_all_that_a_task_logs_is_a_mean_over_its_count(params):
    rows, steps = rows_with_signs(), tiny.make_steps(1, 2, 2, 2, task=task_of(loss_of_rows))
    batch, likely = tiny.to_batch(steps, rows, 2), np.asarray(plain_log_p(params, rows) > -50)
    assert 0 < likely.mean() < 1
    sums, counts = jax.tree.map(float, steps.evaluate(steps.plan.init(0).params, batch))
    assert counts["rows"] == tiny.NUM_ROWS and sums["likely"] == likely.sum()
    _, metrics = steps.train(steps.plan.init(0), batch)
    assert float(metrics["likely"]) == pytest.approx(likely.mean()) and float(metrics["loss"]) == pytest.approx(sums["loss"] / tiny.NUM_ROWS)


BRANCHES = Task("next token of branches", {**NEXT_TOKEN.fields, "branch_ids": TOKENS}, NEXT_TOKEN.objective, NEXT_TOKEN.counts, NEXT_TOKEN.means, None)


@MESHES
def test_responses_see_their_prompt_and_themselves(mesh, options, params):
    """Rows of two segments, each a prompt with up to three responses, whose positions all go on where the prompt ends."""
    rows = tiny.make_rows(max_documents=1)
    shape = rows["tokens"].shape
    branch, position = np.zeros((2, *shape), np.int32)
    for row in range(shape[0]):
        for half in range(2):
            cuts = np.sort(np.random.default_rng([row, half]).choice(np.arange(2, 16), 3, replace=False))
            lengths = np.diff([0, *cuts, 16])
            place = slice(16 * half, 16 * half + 16)
            branch[row, place] = np.repeat(np.arange(4), lengths)
            position[row, place] = np.concatenate([np.arange(n) + (lengths[0] if i else 0) for i, n in enumerate(lengths)])
    rows |= {"segment_ids": np.broadcast_to(1 + np.arange(32) // 16, shape).astype(np.int32), "positions": position, "branch_ids": branch}
    expected, gradient = tiny.plain_loss_and_gradient(params, rows)
    loss, found = tiny.loss_and_gradient(tiny.make_steps(*mesh, task=BRANCHES, **options), rows, num_micro_batches=4)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    tiny.assert_close(found, gradient, 1e-4)
    without = float(tiny.plain_loss(params, {name: field for name, field in rows.items() if name != "branch_ids"}))
    assert abs(without - loss) > 1e-3  # the responses would have seen each other
