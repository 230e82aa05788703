"""Goodput: what the timeline writes while a run goes on, and how it adds up over restarts, lost work, crashes and rewinds."""

import json

import pytest

import herd_jax.goodput
from herd_jax.errors import UserError
from herd_jax.reliability import timeline
from herd_jax.reliability.goodput import CAUSES, GoodputSoFar, draw, furthest_step, read_goodput
from herd_jax.reliability.timeline import Timeline
from herd_jax.reliability.workdir import TIMELINE


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""

    class Clock:
        now = 1000.0
        set_forward = 0.0  # seconds by which the wall clock was set

        def time(self):
            return self.now + self.set_forward

        def monotonic(self):
            return self.now - 500

    clock = Clock()
    monkeypatch.setattr(timeline, "time", clock)
    return clock


def spend(timeline, clock, activity, seconds, step):
    timeline.enter(activity, step)
    clock.now += seconds


def run(workdir, clock, first_step, num_steps, crashes=False):
    """Init 10 s, compile 5 s with the first step, then steps of 2 s, of which the input is 0.5 s; a checkpoint of 1 s every 4 steps."""
    line = Timeline(workdir, clock.now)
    clock.now += 10
    line.begin(first_step)
    for step in range(first_step, first_step + num_steps):
        spend(line, clock, "input wait", 0.5, step)
        spend(line, clock, "compile" if step == first_step else "step", 5 if step == first_step else 1.5, step)
        if (step + 1) % 4 == 0:
            spend(line, clock, "checkpoint stall", 1, step + 1)
    if not crashes:
        line.enter("checkpoint stall", first_step + num_steps)
        line.close()


def test_a_clock_that_is_set_while_the_run_goes_on(tmp_path, clock):
    line = Timeline(tmp_path, clock.now)
    line.begin(0)
    for step, jump in enumerate((0, 3600, 0, -7200)):
        spend(line, clock, "step", 2, step)
        clock.set_forward += jump
    line.enter("evaluation", 4)
    line.close()
    assert read_goodput(tmp_path).seconds["productive"] == pytest.approx(8)
    assert line.stepped_seconds() == pytest.approx(8)


@pytest.mark.parametrize("line", ['{"time": "x", "seconds": {}, "from": 0, "to": 1}', '{"time": 1, "seconds": 5, "from": 0, "to": 1}', "[1]", "5",
    '{"time": 1, "seconds": {"step": null}, "from": 0, "to": 1}', '{"time": 1, "seconds": {}, "from": [0], "to": 1}',
    '{"time": 1, "seconds": {}, "from": 0, "to": true}', '{"start": "then", "time": 1, "seconds": {}, "from": 0, "to": 1}'])  # fmt: skip
def test_lines_of_another_kind_are_left_out(line, tmp_path, clock):
    run(tmp_path, clock, 0, 9)
    expected = read_goodput(tmp_path)
    with (tmp_path / TIMELINE).open("a") as file:
        file.write(line + "\n")
    assert read_goodput(tmp_path) == expected


def test_one_start(tmp_path, clock):
    run(tmp_path, clock, 0, 9)
    goodput = read_goodput(tmp_path)
    expected = {"productive": 8 * 1.5, "init": 10, "compile": 5, "input wait": 9 * 0.5, "checkpoint stall": 2}
    assert {cause: seconds for cause, seconds in goodput.seconds.items() if seconds} == pytest.approx(expected)
    assert tuple(goodput.seconds) == CAUSES
    assert goodput.wall_seconds == pytest.approx(clock.now - 1000) and goodput.num_starts == 1
    assert goodput.fraction == pytest.approx(12 / 33.5)
    assert furthest_step(tmp_path) == 9
    assert len((tmp_path / TIMELINE).read_text().splitlines()) < 15  # not a line a step and activity


def test_a_crash_loses_the_steps_done_again_and_the_time_between(tmp_path, clock):
    run(tmp_path, clock, 0, 11, crashes=True)  # saved at 8
    recorded = json.loads((tmp_path / TIMELINE).read_text().splitlines()[-1])["time"]
    clock.now += 100
    start = clock.now
    run(tmp_path, clock, 8, 8)
    goodput = read_goodput(tmp_path)
    assert goodput.num_starts == 2 and furthest_step(tmp_path) == 16
    assert goodput.seconds["downtime"] == pytest.approx(start - recorded)
    assert goodput.wall_seconds == pytest.approx(clock.now - 1000)
    steps_recorded = furthest_recorded(tmp_path, start)
    assert goodput.seconds["lost work"] == pytest.approx(1.5 * (steps_recorded - 8))
    assert goodput.seconds["productive"] == pytest.approx(1.5 * 7 + 1.5 * 7)  # each start compiled its first step


def furthest_recorded(workdir, before):
    lines = [json.loads(line) for line in (workdir / TIMELINE).read_text().splitlines()]
    return max(line["to"] for line in lines if line["time"] < before)


def test_a_rewind_loses_work_within_one_start(tmp_path, clock):
    line = Timeline(tmp_path, clock.now)
    line.begin(0)
    for step in range(6):
        spend(line, clock, "step", 1, step)
    spend(line, clock, "checkpoint stall", 0.5, 6)
    line.begin(2)
    for step in range(2, 8):
        spend(line, clock, "step", 1, step)
    line.enter("evaluation", 8)
    line.close()
    found = read_goodput(tmp_path).seconds
    assert (found["productive"], found["lost work"], found["checkpoint stall"]) == pytest.approx((8, 4, 0.5))


def test_a_start_that_fails_before_it_has_a_state_is_downtime(tmp_path, clock):
    run(tmp_path, clock, 0, 8)
    clock.now += 7
    failed = Timeline(tmp_path, clock.now)
    clock.now += 3
    failed.close()
    run(tmp_path, clock, 8, 4)
    found = read_goodput(tmp_path).seconds
    assert (found["lost work"], found["downtime"], found["init"]) == pytest.approx((0, 10, 20))


def test_what_metrics_say_while_it_goes_on(tmp_path, clock, monkeypatch):
    """After each begin, in a first start, at a rewind and after a crash, it is what the file will say once that is written."""
    begins = [(0, 6), (2, 9), (8, 12)]  # steps; the second is a rewind in the first start
    line = Timeline(tmp_path, clock.now)
    clock.now += 10
    for first, last in begins:
        if first == 8:
            line.close()
            clock.now += 30
            line = Timeline(tmp_path, clock.now)
            clock.now += 4
        line.begin(first)
        so_far = GoodputSoFar(tmp_path, line, first)
        for step in range(first, last):
            spend(line, clock, "input wait", 0.5, step)
            spend(line, clock, "step", 1.5, step)
        running = so_far.fraction()
        line.enter("evaluation", last)
        assert running == pytest.approx(read_goodput(tmp_path).fraction)
        spend(line, clock, "evaluation", 3, last)
        assert so_far.fraction() < running
    monkeypatch.setattr(timeline.jax, "process_index", lambda: 1)
    assert GoodputSoFar(tmp_path, line, 12).fraction() is None


def test_torn_lines_are_left_out_and_do_not_spoil_the_next(tmp_path, clock):
    run(tmp_path, clock, 0, 4)
    with (tmp_path / TIMELINE).open("a") as file:
        file.write('{"time": 12, "sec')
    run(tmp_path, clock, 4, 4)
    assert furthest_step(tmp_path) == 8 and read_goodput(tmp_path).num_starts == 2


def test_only_process_0_writes(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(timeline.jax, "process_index", lambda: 1)
    run(tmp_path, clock, 0, 4)
    assert not (tmp_path / TIMELINE).exists()


def test_the_command_prints_and_draws(tmp_path, clock, monkeypatch, capsys):
    run(tmp_path, clock, 0, 11, crashes=True)
    clock.now += 50
    run(tmp_path, clock, 8, 4)
    monkeypatch.setattr("sys.argv", ["goodput", str(tmp_path)])
    herd_jax.goodput.main()
    out = capsys.readouterr().out
    assert out.startswith("goodput ") and "2 starts, 12 steps" in out and "lost work" in out
    assert (tmp_path / "goodput.png").stat().st_size > 10_000
    draw(read_goodput(tmp_path), tmp_path / "goodput.svg")
    assert "hours since the first start" in (tmp_path / "goodput.svg").read_text()


def test_where_nothing_is_recorded(tmp_path):
    with pytest.raises(UserError, match="does not exist: name the workdir of a run"):
        read_goodput(tmp_path)
    (tmp_path / TIMELINE).write_text("{}\n")
    with pytest.raises(UserError, match="no complete line yet"):
        read_goodput(tmp_path)
    assert furthest_step(tmp_path) == 0
