"""DPO and the reward model: known numbers, autodiff of a plain forward on any mesh, and the faults of others that must not be ours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax.data.batches import TOKENS
from herd_jax.data.packing import join
from herd_jax.data.preferences import Preference, Response, preference_example
from herd_jax.errors import UserError
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.training import objectives
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.objectives import dpo_loss
from herd_jax.training.task import Task, means_over

MOST, STOP = 8, 7
MODEL_FIELDS = {name: TOKENS for name in ("tokens", "segment_ids", "positions", "branch_ids")}
MESHES = pytest.mark.parametrize(
    "mesh, options",
    [
        ((1, 1, 1, 1), {}),
        ((2, 2, 1, 2), {"remat": "layer", "gather": "layer"}),
        ((1, 2, 2, 2), {"pipeline": PipelineConfig("zero_bubble")}),
        ((2, 1, 2, 2), {"attention": "blockwise"}),
        pytest.param((1, 4, 2, 1), {"pipeline": PipelineConfig("interleaved", 2)}, marks=pytest.mark.slow),
    ],
    ids=str,
)


def dpo_task(beta=0.1, label_smoothing=0.0, kind="sigmoid", by_length=False, nll=0.2):
    fields = MODEL_FIELDS | {name: TOKENS for name in ("targets", "loss_mask", "scored", "response_ids", "reference")}
    objective = objectives.preference(beta, label_smoothing, kind, by_length, nll, MOST)
    counts = lambda fields: objectives.count_preferences(fields, MOST)
    return Task("dpo", fields, objective, counts, objectives.preference_means(nll), None)


RANKING = Task(
    "reward", MODEL_FIELDS | {name: TOKENS for name in ("response_ids", "levels", "prompt_ids")}, objectives.ranking(MOST),
    lambda fields: objectives.count_comparisons(fields, MOST), means_over("pairs"), None,
)  # fmt: skip
REWARD_CONFIG = dataclasses.replace(tiny.CONFIG, reward=True)


def make_preferences(num=24, seed=0, num_responses=(2,)):
    rng = np.random.default_rng(seed)
    word = lambda n: rng.integers(8, tiny.CONFIG.vocab_size, n).tolist()
    found = []
    for _ in range(num):
        ranks = range(rng.choice(num_responses), 0, -1)
        responses = tuple(Response([*word(rng.integers(1, 5)), STOP], [True] * 9, rank) for rank in ranks)
        found.append(Preference(word(rng.integers(1, 5)), tuple(r._replace(mask=[True] * len(r.ids)) for r in responses)))
    return found


def make_rows(preferences, share_prompt, seed=0, per_row=2, seq_len=48):
    rng = np.random.default_rng(seed)
    examples = [preference_example(p, rng.permutation(len(p.responses)), share_prompt, (STOP,)) for p in preferences]
    rows = [join(examples[i : i + per_row], seq_len) for i in range(0, len(examples), per_row)]
    rows = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return rows | {"reference": np.where(rows["scored"], -np.abs(np.sin(rows["targets"].astype(np.float32) * rows["tokens"])) * 4, 0).astype(np.float32)}


def only(task, rows):
    return {name: rows[name] for name in task.fields}


def plain_token_log_p(params, rows):
    return jnp.take_along_axis(jax.nn.log_softmax(tiny.plain_logits(params, rows)), rows["targets"][..., None], -1)[..., 0]


def plain_dpo(params, rows, beta=0.1, nll=0.2, by_length=False, kind="sigmoid", label_smoothing=0.0):
    """Pair by pair, in numpy's order of things."""
    log_p, losses = plain_token_log_p(params, rows), []
    for row in range(len(rows["tokens"])):
        of = lambda number: (rows["response_ids"][row] == number) & rows["scored"][row]
        for chosen in range(1, rows["response_ids"][row].max() + 1, 2):
            masks = of(chosen), of(chosen + 1)
            if not all(mask.any() for mask in masks):
                continue
            scale = [1 / mask.sum() if by_length or kind == "ipo" else 1.0 for mask in masks]
            policy = [jnp.where(m, log_p[row], 0).sum() * s for m, s in zip(masks, scale)]
            reference = [np.where(m, rows["reference"][row], 0).sum() * s for m, s in zip(masks, scale)]
            margin = (policy[0] - reference[0]) - (policy[1] - reference[1])
            if kind == "ipo":
                losses.append((margin - 1 / (2 * beta)) ** 2)
            else:
                losses.append(-(1 - label_smoothing) * jax.nn.log_sigmoid(beta * margin) - label_smoothing * jax.nn.log_sigmoid(-beta * margin))
    return sum(losses) / len(losses) - nll * jnp.where(rows["loss_mask"], log_p, 0).sum() / rows["loss_mask"].sum()


@pytest.fixture(scope="module")
def params():
    return tiny.canonical_params(tiny.make_steps())


def test_known_numbers():
    np.random.seed(0)
    policy, reference = (np.random.normal(0, 5, (8, 4)).sum(-1) for _ in range(2))
    loss_B = dpo_loss(policy[:4], policy[4:], reference[:4], reference[4:])
    assert loss_B.shape == (4,) and float(loss_B.mean()) == pytest.approx(0.753059, abs=1e-6)
    margin = (policy - reference)[:4] - (policy - reference)[4:]
    assert (margin > 0).mean() == 0.75
    same = dpo_loss(policy[:4], policy[4:], policy[:4], policy[4:])
    np.testing.assert_allclose(same, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(dpo_loss(policy[:4], policy[4:], policy[:4], policy[4:], kind="ipo"), 25.0)
    smooth = dpo_loss(policy[:4], policy[4:], reference[:4], reference[4:], label_smoothing=0.3)
    np.testing.assert_allclose(smooth, np.log1p(np.exp(-0.1 * margin)) * 0.7 + 0.3 * np.log1p(np.exp(0.1 * margin)), rtol=1e-5)
    for wrong in ({"kind": "hinge"}, {"beta": 0.0}, {"label_smoothing": 0.5}, {"kind": "ipo", "label_smoothing": 0.1}):
        with pytest.raises(UserError):
            dpo_loss(policy[:4], policy[4:], reference[:4], reference[4:], **wrong)


@MESHES
@pytest.mark.parametrize("share_prompt", [True, False])
def test_dpo_is_autodiff_of_a_plain_forward(mesh, options, share_prompt, params):
    rows, task = make_rows(make_preferences(), share_prompt), DPO
    expected, gradient = jax.value_and_grad(plain_dpo)(params, rows)
    steps = tiny.make_steps(*mesh, task=task, **options)
    micro_batches = 12 // (mesh[3] * 2)
    loss, found = tiny.loss_and_gradient(steps, only(task, rows), num_micro_batches=micro_batches)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    tiny.assert_close(found, gradient, 1e-4)


DPO = dpo_task()


@pytest.mark.parametrize("options", [{"by_length": True}, {"kind": "ipo"}, {"label_smoothing": 0.2, "nll": 0.0}, {"beta": 0.5}], ids=str)
def test_the_variants_are_autodiff_of_a_plain_forward(options, params):
    rows, task = make_rows(make_preferences(), True), dpo_task(**options)
    expected, gradient = jax.value_and_grad(lambda p: plain_dpo(p, rows, **options))(params)
    loss, found = tiny.loss_and_gradient(tiny.make_steps(2, 2, 1, 1, task=task), only(task, rows), num_micro_batches=2)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    tiny.assert_close(found, gradient, 1e-4)


def test_the_number_of_micro_batches_and_the_order_of_responses_change_nothing():
    steps = tiny.make_steps(task=DPO)
    preferences = make_preferences(32)
    losses = [tiny.loss_and_gradient(steps, only(DPO, make_rows(preferences, True, seed)), number) for seed, number in ((0, 1), (0, 2), (1, 4), (2, 8))]
    for loss, gradient in losses[1:]:
        assert loss == pytest.approx(losses[0][0], rel=1e-5)
        tiny.assert_close(gradient, losses[0][1], 1e-4)


def test_a_pair_with_nothing_scored_has_no_loss_and_is_not_counted(params):
    rows = make_rows(make_preferences(), True)
    rows["scored"][0] &= rows["response_ids"][0] != 2  # of one pair the rejected response
    rows["scored"][1] = False
    expected, gradient = jax.value_and_grad(plain_dpo)(params, rows)
    steps = tiny.make_steps(1, 2, 1, 1, task=DPO)
    loss, found = tiny.loss_and_gradient(steps, only(DPO, rows), num_micro_batches=2)
    assert loss == pytest.approx(float(expected), rel=1e-5) and np.isfinite(loss)
    tiny.assert_close(found, gradient, 1e-4)
    _, counts = steps.evaluate(steps.plan.init(0).params, tiny.to_batch(steps, only(DPO, rows), 2))
    assert float(counts["pairs"]) == 24 - 1 - 2
    nothing = only(DPO, rows | {"scored": np.zeros_like(rows["scored"]), "loss_mask": np.zeros_like(rows["loss_mask"])})
    assert tiny.loss_and_gradient(steps, nothing, num_micro_batches=2)[0] == 0


def test_the_format_mask_hides_the_end_of_turn_from_the_preference(params):
    """The gradient at the logits of an unscored token of a rejected response is exactly 0, and changing them changes no bit of the loss."""
    rows, task = make_rows(make_preferences(4, num_responses=(2,)), True), dpo_task(nll=0.0)
    rejected_end = (rows["targets"] == STOP) & (rows["response_ids"] % 2 == 0) & (rows["response_ids"] > 0)
    assert rejected_end.any() and not rows["scored"][rejected_end].any()
    rng = np.random.default_rng(0)
    hidden, output = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((*rows["tokens"].shape, 16), (16, tiny.CONFIG.vocab_size)))
    mesh = tiny.make_steps(task=task).layout.mesh
    from jax.sharding import PartitionSpec

    def run(hidden):
        objective = task.objective(tiny.CONFIG.vocab_size, {"pairs": 1.0, "targets": 1.0})
        inside = lambda hidden: jax.value_and_grad(lambda h: objective(h, output, {name: jnp.asarray(rows[name]) for name in task.fields})[0])(hidden)
        return jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False))(hidden)

    loss, gradient = run(hidden)
    assert (np.asarray(gradient)[rejected_end] == 0).all() and (np.asarray(gradient)[rows["scored"]] != 0).any()
    changed, _ = run(jnp.where(rejected_end[..., None], -3 * hidden, hidden))
    assert float(changed) == float(loss)


def test_policy_and_reference_of_the_same_program_have_no_margin():
    steps, rows = tiny.make_steps(task=DPO), make_rows(make_preferences(), True)
    reference = plain_token_log_p(jax.tree.map(jnp.asarray, tiny.canonical_params(steps)), rows)
    batch = tiny.to_batch(steps, only(DPO, rows | {"reference": np.asarray(reference)}), 2)
    sums, counts = steps.evaluate(steps.plan.init(0).params, batch)
    means = jax.tree.map(float, DPO.means(sums, counts))
    assert abs(means["margin"]) < 1e-5 and means["accuracy"] == 0 and means["preference_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert means["loss"] - means["preference_loss"] == pytest.approx(0.2 * means["nll"], rel=1e-5)


def plain_ranking(params, rows):
    """Each two responses of unequal level to a prompt, from the last hidden state at the end of each."""
    head = params["ends"]["head"]
    identity = params | {"ends": params["ends"] | {"head": {"norm": head["norm"], "output": head["reward"][:, None]}}}
    reward = tiny.plain_logits(identity, rows, tiny.CONFIG)[..., 0]
    losses = []
    for row in range(len(rows["tokens"])):
        ends = np.flatnonzero(rows["levels"][row])
        for i in ends:
            for j in ends:
                if rows["prompt_ids"][row][i] == rows["prompt_ids"][row][j] and rows["levels"][row][i] > rows["levels"][row][j]:
                    losses.append(-jax.nn.log_sigmoid(reward[row, i] - reward[row, j]))
    return sum(losses) / len(losses), len(losses)


@MESHES
def test_the_reward_model_is_autodiff_of_a_plain_forward(mesh, options):
    rows = make_rows(make_preferences(num_responses=(2, 3)), True)
    steps = tiny.make_steps(*mesh, task=RANKING, config=REWARD_CONFIG, **options)
    params = tiny.canonical_params(steps)
    (expected, pairs), gradient = jax.value_and_grad(plain_ranking, has_aux=True)(params, rows)
    loss, found = tiny.loss_and_gradient(steps, only(RANKING, rows), num_micro_batches=12 // (mesh[3] * 2))
    assert loss == pytest.approx(float(expected), rel=1e-5)
    tiny.assert_close(found, gradient, 1e-4)
    _, counts = steps.evaluate(steps.plan.init(0).params, tiny.to_batch(steps, only(RANKING, rows), 12 // (mesh[3] * 2)))
    assert float(counts["pairs"]) == pairs


def test_shared_prompts_are_separate_rows():
    preferences, steps = make_preferences(num_responses=(3,)), tiny.make_steps(task=RANKING, config=REWARD_CONFIG)
    shared, apart = (tiny.loss_and_gradient(steps, only(RANKING, make_rows(preferences, share, seed=share, seq_len=64)), 2) for share in (True, False))
    assert shared[0] == pytest.approx(apart[0], rel=1e-5)
    tiny.assert_close(shared[1], apart[1], 1e-4)


def test_a_model_of_the_reward_learns_what_is_better():
    assert NEXT_TOKEN.fields.keys() - RANKING.fields.keys() == {"targets", "loss_mask"}
    rows, steps = make_rows(make_preferences(num_responses=(2,)), True), tiny.make_steps(task=RANKING, config=REWARD_CONFIG)
    state, batch = steps.plan.init(0), tiny.to_batch(steps, only(RANKING, rows), 2)
    for _ in range(30):
        state, metrics = steps.train(state, batch)
    assert float(metrics["accuracy"]) == 1 and float(metrics["loss"]) < 0.2 and float(metrics["margin"]) > 1
