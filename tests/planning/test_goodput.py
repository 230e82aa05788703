import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.errors import UserError
from herd_jax.planning import goodput
from herd_jax.planning.interruptions import CAUSES, DAY, GoodputConfig, Interruptions, daly, expected, time_between_failures, young


@pytest.fixture(scope="module")
def paper():
    """The paper's run: 16,384 GPUs for 54 days."""
    return goodput.report(16_384, 54)


def best_by_formula(num_gpus, config):
    intervals = np.geomspace(10, 1e5, 4000)
    return intervals[np.argmax([expected(num_gpus, dataclasses.replace(config, checkpoint_interval_s=i)) for i in intervals])]


def test_the_causes_are_those_of_table_5():
    counts = {"GPU": 268, "Dependency": 56, "Network": 35, "Unplanned maintenance": 32, "Host": 21, "Unknown": 7}
    assert {name: sum(cause.count for cause in CAUSES if cause.category == name) for name in counts} == counts
    assert sum(counts.values()) == 419 and len(CAUSES) == 18


def test_interruptions_come_as_often_as_the_paper_had_them():
    seeds = [Interruptions.draw(16_384, 54 * DAY, np.random.default_rng([7, i])) for i in range(200)]
    unexpected = [np.count_nonzero(run.cause >= 0) for run in seeds]
    assert abs(np.mean(unexpected) - 419) < 4 * np.sqrt(419 / 200)
    assert abs(np.std(unexpected) - np.sqrt(419)) < 4 * np.sqrt(419 / 400)
    assert {np.count_nonzero(run.cause == Interruptions.PLANNED) for run in seeds} == {47}
    drawn = np.bincount(np.concatenate([run.cause[run.cause >= 0] for run in seeds]), minlength=len(CAUSES)) / 200
    counts = np.array([cause.count for cause in CAUSES])
    assert np.all(np.abs(drawn - counts) < 4.5 * np.sqrt(counts / 200))


def test_the_papers_run_is_effective_for_over_90_percent_with_every_seed(paper):
    assert paper.run.used.min() > 0.90
    assert 0.92 < paper.run.used.mean() < 0.97
    assert 0 < paper.run.used.std() < 0.01


def test_all_time_is_accounted_for(paper):
    assert sum(paper.hours.values()) == pytest.approx(np.full(20, 54 * 24))
    assert paper.hours["effective"] / (54 * 24) == pytest.approx(paper.run.used)
    assert all(np.all(hours > 0) for hours in paper.hours.values())


def test_a_run_worked_out_by_hand():
    """A save after 100 s stalls for 2 s and counts 10 s later. Hang at 340 s, crash at 600 s while it restarts, maintenance at 1,000 s."""
    hang, crash = next(i for i, c in enumerate(CAUSES) if c.symptom == "hang"), 0
    start = np.array([0.0, 340, 600, 1000])
    run = Interruptions(start, np.diff(start, append=1557.0), np.array([Interruptions.START, hang, crash, Interruptions.PLANNED]))
    config = GoodputConfig(100, 2, 10, crash_detection_s=20, hang_detection_s=200, restart_s=100, replace_host_s=0, planned_s=50)
    # 0 to 340: 3 saves (done at 102, 204, 306), all written, 34 s lost. 340 to 600: 200 of hang, 60 of a restart. 600 to 1,000: 20 and 100,
    # then 280 with 2 saves, nothing lost. 1,000 to 1,557: 50 and 100, then 407 with 3 saves and half of one.
    spent = {name: float(seconds[0]) for name, seconds in run.spend(config, np.array([100.0])).items()}
    lost = {"save stalls": 6 + 4 + 7, "lost work": 34, "detection": 220, "restart": 160, "planned": 150}
    assert spent == {"effective": 300 + 276 + 400} | lost


def test_a_save_counts_only_once_it_is_written():
    run = Interruptions(np.array([0.0, 208]), np.array([208.0, 1]), np.array([Interruptions.START, 0]))
    for write, kept in ((4, 200), (5, 100)):  # the second save's stall ends at 204
        assert run.spend(GoodputConfig(100, 2, write), np.array([100.0]))["effective"] == kept


def test_corruption_that_nobody_has_seen_outlives_a_crash():
    silent = next(i for i, c in enumerate(CAUSES) if c.symptom == "silent")
    run = Interruptions(np.array([0.0, 100, 200]), np.array([100.0, 100, 5000]), np.array([Interruptions.START, silent, 0]))
    spent = run.spend(GoodputConfig(silent_detection_s=3600, restart_s=100, replace_host_s=0), np.array([6000.0]))
    assert spent["detection"] == 3600 and spent["restart"] == 100
    assert spent["effective"] == 5100 - 3600 - 100


@pytest.mark.parametrize(("num_gpus", "tolerance"), [(1_000, 0.001), (16_384, 0.002), (100_000, 0.01)])
def test_simulation_agrees_with_the_formula(num_gpus, tolerance):
    simulated = goodput.report(num_gpus, 54, num_seeds=40, seed=3).run.used.mean()
    assert simulated == pytest.approx(expected(num_gpus, GoodputConfig()), abs=tolerance)


def test_simulation_agrees_with_the_formula_at_any_rate_where_causes_cost_the_same():
    config = GoodputConfig(60, 5, 20, 40, 40, 40, 100, replace_host_s=0, planned_s=0)
    simulated = goodput.report(1_000_000, 54, num_seeds=40, constants=config).run.used.mean()
    assert simulated == pytest.approx(expected(1_000_000, config), rel=0.005)
    assert simulated < 0.4  # far from where first order would do


def test_more_gpus_are_less_effective(paper):
    sizes, used, best = zip(*((scale.num_gpus, scale.used.mean(), scale.mean.max()) for scale in paper.scales))
    assert sizes == (16_384, 32_768, 100_000, 1_000_000)
    assert list(used) == sorted(used, reverse=True) and list(best) == sorted(best, reverse=True)
    assert used[-1] < 0.1 < 0.9 < used[0]


@pytest.mark.parametrize("num_gpus", [1_000, 16_384, 100_000, 1_000_000])
def test_dalys_interval_is_the_best_of_the_formula(num_gpus):
    config = GoodputConfig()
    formula = daly(config.save_stall_s, time_between_failures(num_gpus))
    assert formula == pytest.approx(best_by_formula(num_gpus, config), rel=0.02)


def test_young_and_daly_by_hand():
    assert young(8, 10_000) == pytest.approx(400)
    assert daly(8, 10_000) == pytest.approx(400 * (1 + 0.02 / 3 + 0.0004 / 9) - 8)
    assert daly(50, 20) == 20  # a save dearer than two failures' distance


def test_the_best_interval_is_near_dalys_and_not_worse_than_the_used_one(paper):
    for scale in paper.scales:
        assert 1 / 1.5 < scale.best_s / scale.daly_s < 1.5
        assert scale.near_best_s[0] <= scale.best_s <= scale.near_best_s[1]
        assert scale.mean.max() >= scale.used.mean() - goodput.NEAR_BEST


def test_where_nothing_fails_only_saves_cost():
    report = goodput.report(1, 0.01)
    assert not sum(report.unexpected.values()).any()
    assert report.run.used == pytest.approx(np.full(20, 1 - 2 * 3 / 864))
    assert report.run.mean.max() == 1


def test_where_nothing_costs_all_time_is_effective_and_no_more():
    used = goodput.report(1, 33.3, num_seeds=100, constants=GoodputConfig(1e9, 1, 0, 0, 0, 0, 0, 0, 0)).run.used
    assert used.max() == 1 and np.median(used) > 1 - 1e-12


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5_000_000),
    st.floats(1e-6, 2),
    st.integers(0, 2**40),
    st.builds(
        GoodputConfig,
        st.floats(100, 1e6),
        st.floats(1e-3, 1e5),
        *[st.floats(0, 100)] + [st.floats(0, 1e7)] * 6,
    ),
)
def test_fractions_are_fractions_at_the_extremes(num_gpus, days, seed, config):
    report = goodput.report(num_gpus, days, num_seeds=2, seed=seed, constants=config)
    for scale in report.scales:
        for fractions in (scale.used, scale.effective, scale.expected):
            assert np.all((0 <= np.array(fractions)) & (np.array(fractions) <= 1))
    assert all(np.all(hours >= 0) for hours in report.hours.values())
    assert sum(report.hours.values()) == pytest.approx(np.full(2, 24 * days))
    json.dumps(report.to_dict(), allow_nan=False)
    assert " nan" not in "\n".join(report.lines())


def test_the_same_seed_gives_the_same_report(paper):
    assert goodput.report(16_384, 54).to_dict() == paper.to_dict()
    assert goodput.report(16_384, 54, seed=1).to_dict()["effective_fraction"] != paper.to_dict()["effective_fraction"]


def test_the_text_says_what_was_found(paper):
    text = "\n".join(paper.lines())
    assert f"{paper.run.used.mean():.1%}" in text
    for word in ("Young", "Daly", "1,000,000", "lost work", "47 planned", "save_stall_s", "ours"):
        assert word in text


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_draws(paper, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    goodput.draw(paper, str(tmp_path / f"goodput{suffix}"))
    begins = {".png": b"\x89PNG", ".svg": b"<?xml"}[suffix]
    assert (tmp_path / f"goodput{suffix}").read_bytes().startswith(begins)


def test_a_plot_that_cannot_be_written_is_refused(paper, tmp_path):
    with pytest.raises(UserError, match=".png or .svg"):
        goodput.draw(paper, "goodput.doc")
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="folder that exists"):
        goodput.draw(paper, str(tmp_path / "nowhere" / "goodput.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 54), "gpus is 0: it must be 1 or more"),
        ((-8, 54), "gpus is -8"),
        ((16_384, 0), "days is 0: it must be more than 0"),
        ((16_384, -1), "days is -1"),
        ((16_384, float("nan")), "days is nan"),
        ((16_384, 54, 0), "seeds is 0"),
        ((16_384, 54, 20, -1), "seed is -1"),
        ((16_384, 1e6), "days or fewer"),
    ],
)
def test_sizes_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        goodput.report(*arguments)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"restart_s": -1}, "goodput.restart_s is -1: it must be 0 seconds or more"),
        ({"planned_s": float("inf")}, "goodput.planned_s is inf"),
        ({"save_stall_s": 0}, "goodput.save_stall_s is 0: it must be more than 0 seconds"),
        ({"checkpoint_interval_s": 5}, "set an interval of 10 or more"),
    ],
)
def test_constants_that_cannot_be_are_refused(constants, message):
    with pytest.raises(UserError, match=message):
        GoodputConfig(**constants)
