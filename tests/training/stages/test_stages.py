"""A run as a list of stages: on to the next by itself, gone on with wherever it stopped, held back by its gate."""

import json
import os
import random
import shutil
import signal
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest

import herd_jax
from herd_jax.config import parse, to_dict
from herd_jax.data.tokenization import tokenize_files
from herd_jax.errors import StartAgain, UserError
from herd_jax.mesh import make_mesh
from herd_jax.models.rope import RopeScaling
from herd_jax.reliability.goodput import furthest_step, read_goodput
from herd_jax.training.checkpoints.checkpoint import Checkpointer
from herd_jax.training.config import RunConfig, build_steps
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.optimizer import learning_rate
from herd_jax.training.stages.config import StageConfig
from herd_jax.training.stages.decisions import Verdict
from herd_jax.training.stages.stages import _StageBefore, devices_of, stage_configs, train_stages

SHORT = {"seq_len": 32, "tokens": 8 * 32 * 6}
LONG = {
    "seq_len": 64, "tokens": 8 * 64 * 6, "mesh": {"cp": 2, "dp": 4}, "rope_theta": 1e6,
    "learning_rate": 2e-3, "final_learning_rate": 1e-3, "warmup_steps": 2,
}  # fmt: skip
RESULTS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "val_loss")


class Judge:
    """A gate that lets a stage pass when it has taken so many steps, and remembers what it was asked."""

    def __init__(self, *num_steps):
        self.num_steps, self.asked = num_steps or (0, 0), []

    def check(self, stages):
        pass

    def __call__(self, stages, number, short_loss_before):
        step = Checkpointer(f"{stages[number - 1].workdir}/checkpoints", keep=1).steps()[-1]
        self.asked.append((number, step, short_loss_before))
        enough = step >= self.num_steps[number - 1]
        return Verdict(enough, "it has seen enough" if enough else "it has not learned", short_loss=number + step / 100)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    base, words = tmp_path_factory.mktemp("stages"), random.Random(0)
    (base / "text").mkdir()
    for i in range(10):
        (base / "text" / f"{i}.txt").write_text(" ".join(words.choices("the cat sat on a mat and then it ran".split(), k=90)))
    tokenize_files([str(base / "text")], "bytes", base / "data", validation_fraction=0.2, processes=1)
    return base / "data"


def config(data, workdir, *stages, checkpoint=None, **train):
    return parse(RunConfig, {
        "workdir": str(workdir),
        "data": {"sources": str(data)},
        "model": {"name": "llama-tiny", "dim": 32, "ffn_dim": 64, "num_layers": 2, "vocab_size": 259},
        "mesh": {"dp": 8},
        "train": {"global_batch_size": 8, "stages": stages or (SHORT, LONG), **train},
        "optimizer": {"peak_learning_rate": 1e-2, "warmup_steps": 4, "decay_steps": 24},
        "checkpoint": {"every_steps": 2, **(checkpoint or {})},
        "eval": {"every_steps": 3, "num_batches": 1},
        "log": {"every_steps": 1},
    })  # fmt: skip


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    judge = Judge()
    train_stages(config(data, workdir), NEXT_TOKEN, judge)
    assert judge.asked == [(1, 6, None), (2, 6, 1.06)]
    return workdir


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(stage):
    return [{name: line[name] for name in RESULTS if name in line} for line in lines(stage / "metrics.jsonl")]


def final_state(data, workdir, number, mesh=None):
    """Of a stage, on the mesh of another if it is named."""
    stages = stage_configs(config(data, workdir))
    steps = build_steps(stages[number - 1], make_mesh((stages[number - 1] if mesh is None else stages[mesh - 1]).mesh), NEXT_TOKEN)
    checkpointer = Checkpointer(f"{stages[number - 1].workdir}/checkpoints", keep=3)
    restored = checkpointer.restore(steps.plan.abstract_canonical())
    checkpointer.close()
    return restored.step, restored.state


def assert_same(state, expected):
    for (path, leaf), (_, wanted) in zip(jax.tree.leaves_with_path(state), jax.tree.leaves_with_path(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted), err_msg=jax.tree_util.keystr(path))


def test_two_stages_on_two_meshes(data, whole):
    first, second = (results(whole / "stages" / name) for name in ("1-32", "2-64"))
    assert [line["tokens"] for line in first] == [256 * step for step in range(1, 7)]
    assert [line["tokens"] for line in second] == [512 * step for step in range(1, 7)]
    assert first[-1]["loss"] < first[0]["loss"] and second[0]["loss"] < first[1]["loss"]  # it goes on with the weights
    rates = [line["learning_rate"] for line in second]
    assert rates[:2] == pytest.approx([1e-3, 2e-3]) and rates[-1] == pytest.approx(1e-3)
    saved = Checkpointer(whole / "stages" / "2-64" / "checkpoints", keep=1).config()
    assert saved["model"]["rope_theta"] == 1e6 and saved["mesh"]["cp"] == 2 and saved["seed"] != 0


def test_decisions_are_recorded(whole):
    first, second = lines(whole / "stages.jsonl")
    assert first.items() >= {"stage": 1, "seq_len": 32, "steps": 6, "tokens": 1536, "verdict": "passed", "short_loss": 1.06}.items()
    assert second.items() >= {
        "stage": 2, "seq_len": 64, "steps": 6, "tokens": 3072, "short_loss_before": 1.06, "short_loss": 2.06, "verdict": "passed",
        "reason": "it has seen enough", "trains_to": None,
    }.items()  # fmt: skip


def test_a_stage_begins_with_the_state_of_the_one_before(data, whole):
    """Every parameter and moment, on the new mesh; the steps of the schedule begin anew, the age of the moments does not."""
    stages = stage_configs(config(data, whole))
    steps = build_steps(stages[1], make_mesh(stages[1].mesh), NEXT_TOKEN)
    begun = steps.plan.to_canonical(_StageBefore(1, stages[0], 6).load_state(steps, seed=5))
    step, ended = final_state(data, whole, 1, mesh=2)
    assert step == 6 and int(begun.step) == 0
    moments, ended_moments = begun.optimizer[0], ended.optimizer[0]
    assert int(moments.count) == 6
    assert_same((begun.params, moments), (ended.params, ended_moments))
    with pytest.raises(UserError, match="the last checkpoint of stage 1 cannot be read: the same command trains the end"):
        _StageBefore(1, stages[0], 7).load_state(steps, seed=5)


def killed(whole, workdir, step):
    """The workdir of a run that was killed in stage 2 after the checkpoint of `step`, or before the first one (0)."""
    shutil.copytree(whole, workdir)
    for path in (workdir / "stages" / "2-64" / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    (workdir / "stages.jsonl").write_text((workdir / "stages.jsonl").read_text().splitlines(keepends=True)[0])
    return workdir


@pytest.mark.parametrize("step", [0, 4])
def test_killed_in_the_second_stage(step, data, whole, tmp_path):
    workdir, judge = killed(whole, tmp_path / "run", step), Judge()
    train_stages(config(data, workdir), NEXT_TOKEN, judge)
    assert judge.asked == [(2, 6, 1.06)]
    assert results(workdir / "stages" / "2-64") == results(whole / "stages" / "2-64")
    assert_same(final_state(data, workdir, 2), final_state(data, whole, 2))


def test_the_last_checkpoint_of_a_passed_stage_is_damaged(data, whole, tmp_path):
    """Its end is trained again before the next stage begins."""
    workdir = killed(whole, tmp_path / "run", 0)
    files = (workdir / "stages" / "1-32" / "checkpoints" / "6" / "state").rglob("*")
    largest = max(files, key=lambda path: path.stat().st_size * path.is_file())
    os.truncate(largest, largest.stat().st_size // 2)
    train_stages(config(data, workdir), NEXT_TOKEN, Judge())
    assert_same(final_state(data, workdir, 2), final_state(data, whole, 2))


def test_a_finished_run_has_nothing_to_do(data, whole, capsys):
    judge, before = Judge(), (whole / "stages.jsonl").read_text()
    train_stages(config(data, whole), NEXT_TOKEN, judge)
    assert "nothing to do: 6 steps are done" in capsys.readouterr().out
    assert not judge.asked and (whole / "stages.jsonl").read_text() == before


def test_load_opens_the_newest_stage(data, whole, tmp_path):
    model = herd_jax.load(whole)
    assert model.config.rope_theta == 1e6 and model.context_length == 64
    assert herd_jax.load(killed(whole, tmp_path / "run", 0)).context_length == 32
    expected = final_state(data, whole, 2)[1].params["ends"]["head"]["norm"]
    np.testing.assert_array_equal(model.params["ends"]["head"]["norm"], np.asarray(expected))


def test_progress_is_counted_over_all_stages(whole):
    assert furthest_step(whole) == 12
    goodput = read_goodput(whole)
    assert goodput.seconds["lost work"] == 0 and goodput.seconds["evaluation"] > 0
    assert all(earlier.end <= later.start + 1e-3 for earlier, later in zip(goodput.intervals, goodput.intervals[1:]))


@pytest.mark.slow
def test_the_gate_holds_back_until_the_limit(data, tmp_path, capsys):
    """A stage of 6 steps that would pass after 9 trains on for 1 step at a time, twice; with a higher limit it gets there."""
    limits = {"round_tokens": 256, "max_rounds": 2}
    local = {"local_directory": str(tmp_path / "local"), "local_every_steps": 1}
    run = config(data, tmp_path / "run", SHORT, LONG, gate=limits, checkpoint=local)
    judge = Judge(9, 0)
    with pytest.raises(UserError, match=r"stage 1 of train.stages did not pass its gate \(it has not learned\), also after 2 further"):
        train_stages(run, NEXT_TOKEN, judge)
    assert [step for _, step, _ in judge.asked] == [6, 7, 8]
    assert "stage 1, 32 tokens, step 6: trains on to step 7: it has not learned" in capsys.readouterr().out
    decisions = lines(tmp_path / "run" / "stages.jsonl")
    assert [(line["verdict"], line["steps"], line["trains_to"]) for line in decisions] == [
        ("trains on", 6, 7), ("trains on", 7, 8), ("stopped", 8, None),
    ]  # fmt: skip
    with pytest.raises(UserError, match="also after 2 further"):
        train_stages(run, NEXT_TOKEN, judge)
    assert len(judge.asked) == 3  # nothing has changed, so it is not asked again
    train_stages(config(data, tmp_path / "run", SHORT, LONG, gate={**limits, "max_rounds": 3}, checkpoint=local), NEXT_TOKEN, judge)
    assert judge.asked[3:] == [(1, 8, None), (1, 9, None), (2, 6, 1.09)]
    assert [line["verdict"] for line in lines(tmp_path / "run" / "stages.jsonl")[3:]] == ["trains on", "passed", "passed"]
    assert not list((tmp_path / "local").iterdir())  # no stage that has passed leaves any there


def test_a_stage_annealed_to_0_does_not_train_on(data, whole, tmp_path):
    workdir, annealed = killed(whole, tmp_path / "run", 0), {**LONG, "tokens": 512 * 3, "final_learning_rate": 0.0}
    with pytest.raises(UserError, match="stage 2 of train.stages did not pass its gate .* after 0 further rounds"):
        train_stages(config(data, workdir, SHORT, annealed), NEXT_TOKEN, Judge(0, 9))
    assert [line["learning_rate"] for line in results(workdir / "stages" / "2-64")] == pytest.approx([1e-3, 2e-3, 0])
    passes = {"short_margin": 1.0}  # asked for something else, it is asked again
    train_stages(config(data, workdir, SHORT, {**annealed, "gate": passes}), NEXT_TOKEN, Judge(0, 3))
    assert [line["verdict"] for line in lines(workdir / "stages.jsonl")] == ["passed", "stopped", "passed"]


@pytest.mark.parametrize("number, error", [(signal.SIGTERM, StartAgain), (signal.SIGINT, UserError)])
def test_a_signal_at_the_gate(number, error, data, whole, tmp_path):
    class Told(Judge):
        def __call__(self, *asked):
            os.kill(os.getpid(), number)

    workdir, handler = killed(whole, tmp_path / "run", 6), signal.getsignal(number)
    with pytest.raises(error, match="the same command continues there"):
        train_stages(config(data, workdir), NEXT_TOKEN, Told())
    assert signal.getsignal(number) is handler
    train_stages(config(data, workdir), NEXT_TOKEN, Judge())
    assert len(lines(workdir / "stages.jsonl")) == 2


def test_a_gate_that_hangs_is_ended(data, whole, tmp_path, monkeypatch, capsys):
    """By the watchdog, which leaves a flight record."""
    ended = threading.Event()

    class Hanging(Judge):
        def __call__(self, *asked):
            assert ended.wait(timeout=60)
            raise UserError("as if it were not the end")

    monkeypatch.setattr("herd_jax.reliability.watchdog.os._exit", lambda status: ended.set())
    monkeypatch.setattr("herd_jax.training.stages.stages.train", lambda *_: None)  # there is nothing to do
    workdir = killed(whole, tmp_path / "run", 6)
    with pytest.raises(UserError, match="as if it were not the end"):
        train_stages(config(data, workdir, watchdog={"other_seconds": 0.5}), NEXT_TOKEN, Hanging())
    record = next((workdir / "stages" / "2-64" / "flight").glob("step-6-*.txt")).read_text()
    assert "in activity 'evaluation' after step 6: no progress for" in record


def test_what_a_stage_changes(data):
    gate = {"short_margin": 0.5}
    first, second = stage_configs(config(data, "runs/x", SHORT, {**LONG, "gate": gate, "rope_scaling": {"factor": 4.0}}))
    assert first.train.num_steps == 6 and first.seed == 0 and first.workdir == "runs/x/stages/1-32"
    assert first.optimizer.peak_learning_rate == 1e-2 and first.optimizer.decay_steps == 24
    assert (second.train.seq_len, second.train.global_batch_size, second.train.gate.short_margin) == (64, 8, 0.5)
    model, short_model = second.model.resolve(), first.model.resolve()
    assert model.rope_scaling.factor == 4 and model.rope_theta == 1e6
    unchanged = {"rope_scaling": None, "rope_theta": 0.0}
    assert {**vars(model), **unchanged} == {**vars(short_model), **unchanged}
    annealed = stage_configs(config(data, "x", SHORT, {**LONG, "final_learning_rate": 0.0}))[1].optimizer
    rates = [float(learning_rate(annealed)(step)) for step in range(7)]
    assert rates == pytest.approx([0, 1e-3, 2e-3, 1.5e-3, 1e-3, 0.5e-3, 0])  # linear behind the warmup, not a cosine
    (alone,) = stage_configs(parse(RunConfig, {"workdir": "x", "data": {"sources": "y"}}))
    assert alone == parse(RunConfig, {"workdir": "x", "data": {"sources": "y"}})
    assert parse(RunConfig, to_dict(config(data, "x"))) == config(data, "x")


def test_the_ramp_is_that_of_the_first_stage(data):
    phases = [{"from_tokens": n, "global_batch_size": 8, "seq_len": length} for n, length in ((0, 16), (1280, 32))]
    first, second = stage_configs(config(data, "x", {**SHORT, "tokens": 2560}, LONG, phases=phases))
    assert first.train.num_steps == 10 + 5 and first.train.ramp.tokens_before(15) == 2560
    assert len(second.train.ramp.phases) == 1


@pytest.mark.parametrize(
    "meshes, devices",
    [
        ([{"dp": 8}, {"cp": 2, "dp": 4}], 8),
        ([{"dp": 0}, {"cp": 2, "dp": 4}], 8),
        ([{"tp": 2, "dp": 0}, {"cp": 3, "dp": 0}], 6),
        ([{"dp": 8}, {"cp": 2, "dp": 2}], None),
        ([{"dp": 8}, {"cp": 3, "dp": 0}], None),
    ],
)
def test_devices_of_all_stages(meshes, devices, data):
    run = config(data, "x", *({**SHORT, "seq_len": 32 * number, "mesh": mesh} for number, mesh in enumerate(meshes, start=1)))
    if devices is None:
        with pytest.raises(UserError, match="the meshes of train.stages take 8, .* devices: give all of them the same number"):
            devices_of(run)
    else:
        mesh = devices_of(run)
        assert mesh.tp * mesh.cp * mesh.pp * (mesh.dp or 1) == devices


def refusal(data, workdir, *stages, **train):
    with pytest.raises(UserError) as error:
        train_stages(config(data, workdir, *stages, **train), NEXT_TOKEN, Judge())
    text = str(error.value)
    assert "\n" not in text and not text.endswith(".") and ". " not in text, f"not one sentence: {text}"
    return text


@pytest.mark.parametrize(
    "stages, train, words",
    [
        ([LONG, SHORT], {}, ["train.stages have lengths [64, 32]", "shrink at stage 2"]),
        ([SHORT, {**SHORT, "tokens": 5}], {}, ["stage 2 of train.stages repeats the one before it", "more tokens"]),
        ([SHORT, {**LONG, "seq_len": 66}], {}, ["stage 2 of train.stages", "train.seq_len 66", "mesh.cp 2"]),
        ([SHORT, {**LONG, "mesh": {"dp": 4}}], {}, ["stage 2 of train.stages", "there are 8"]),
        ([SHORT, {**LONG, "global_batch_size": 2}], {}, ["stage 2 of train.stages", "train.global_batch_size 2", "mesh.dp 4"]),
        ([SHORT, {**LONG, "seq_len": 10**6, "tokens": 10**8}], {}, ["stage 2 of train.stages", "longer than the data"]),
        ([SHORT, {**LONG, "data": {"sources": "nowhere"}}], {}, ["stage 2 of train.stages", "data source nowhere does not exist"]),
        ([SHORT, {**LONG, "warmup_steps": 9}], {}, ["stage 2 of train.stages", "warmup_steps 9", "decay_steps 6"]),
        ([SHORT, LONG], {"num_steps": 5}, ["train.num_steps is 5", "leave train.num_steps out"]),
        ([SHORT, LONG], {"seq_len": 16}, ["train.seq_len is 16", "leave train.seq_len out"]),
        ([SHORT, LONG], {"phases": [{"from_tokens": 0, "global_batch_size": 8, "seq_len": 64}]}, ["train.phases", "seq_len 32"]),
        ([{**SHORT, "tokens": 0}], {}, ["tokens of one of train.stages is 0"]),
        ([{**SHORT, "warmup_steps": 5}], {}, ["without learning_rate"]),
        ([SHORT], {"gate": {"needle_recall": 2}}, ["train.gate.needle_recall is 2", "between 0"]),
        ([SHORT], {"gate": {"short_margin": -1}}, ["train.gate.short_margin is -1", "0 or more"]),
        ([SHORT], {"gate": {"max_rounds": -1}}, ["train.gate.max_rounds is -1"]),
        ([{**SHORT, "rope": 5}], {}, ["unknown config key 'train.stages[0].rope'"]),
        ([{**SHORT, "mesh": {"ep": 5}}], {}, ["unknown config key 'train.stages[0].mesh.ep'"]),
    ],
)  # fmt: skip
def test_bad_input(stages, train, words, data, tmp_path):
    text = refusal(data, tmp_path / "run", *stages, **train)
    assert all(word in text for word in words), text
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_kind_of_run(data, whole, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert "holds a run without stages" in refusal(data, tmp_path)
    alone = parse(RunConfig, {"workdir": str(whole), "data": {"sources": str(data)}})
    with pytest.raises(UserError, match="holds a run with stages"):
        train_stages(alone, NEXT_TOKEN, Judge())


def test_mixture_phases_belong_to_one_stage(data, tmp_path):
    run = to_dict(config(data, tmp_path))
    run["data"]["phases"] = [{"from_tokens": 100, "sources": run["data"]["sources"]}]
    with pytest.raises(UserError, match="data.phases count the tokens of one stage: give stage 2 of train.stages its own data"):
        stage_configs(parse(RunConfig, run))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda first, second: (replace(first, tokens=first.tokens + 256), second), "tokens"),
        (lambda first, second: (replace(first, rope_theta=7.0), second), "model.rope_theta"),
        (lambda first, second: (replace(first, global_batch_size=16, tokens=2 * first.tokens), second), "train.global_batch_size"),
    ],
)
def test_a_passed_stage_whose_settings_changed(change, names, data, whole, tmp_path):
    """It is named, not ignored: the stages after it began with what it was."""
    workdir = killed(whole, tmp_path / "run", 2)
    with pytest.raises(UserError, match=f"stage 1 of train.stages has passed its gate with other values of {names}: give the values"):
        train_stages(config(data, workdir, *map(to_dict, change(parse(StageConfig, SHORT), parse(StageConfig, LONG)))), NEXT_TOKEN, Judge())


@pytest.mark.parametrize("text", ["5\n", "[]\n", '{"stage": 1}\n', '{"stage": 1, "verdict": "passed"\n'])
def test_damaged_decisions(text, data, whole, tmp_path):
    workdir = killed(whole, tmp_path / "run", 2)
    (workdir / "stages.jsonl").write_text(text)
    with pytest.raises(UserError, match="stages.jsonl is damaged .*: bring back a good copy"):
        train_stages(config(data, workdir), NEXT_TOKEN, Judge())


@pytest.mark.parametrize("given, expected", [({}, 8.0), ({"rope_scaling": "none"}, None), ({"rope_scaling": {"factor": 2.0}}, 2.0)])
def test_a_stage_may_have_no_scaling(given, expected, data, tmp_path):
    run = config(data, tmp_path, SHORT, {**LONG, **given})
    run = replace(run, model=replace(run.model, rope_scaling=RopeScaling(factor=8.0)))
    scaling = stage_configs(run)[1].model.resolve().rope_scaling
    assert (scaling and scaling.factor) == expected
