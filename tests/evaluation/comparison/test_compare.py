"""Two models on the same items: tests worked by hand and against scipy, items that do not match refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from herd_jax.errors import UserError
from herd_jax.evaluation.comparison.compare import compare
from herd_jax.evaluation.comparison.statistics import holm, mcnemar, paired, sign_flips
from herd_jax.evaluation.results import write_items


def test_mcnemar_by_hand():
    """Of ten tosses at most one head: 2 (1 + 10) / 1024."""
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)


@given(wins=st.integers(0, 400), losses=st.integers(0, 400))
def test_mcnemar_against_scipy(wins, losses):
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1
    assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-8)


def test_sign_flips_by_hand():
    """Sums of ±1 ±2 ±3: of 8 two are as far as 6, and four as far as 4."""
    assert sign_flips(np.array([1.0, 2.0, 3.0, 0.0])) == 2 / 8
    assert sign_flips(np.array([-1.0, 2.0, 3.0])) == 4 / 8
    assert sign_flips(np.zeros(5)) == 1


def test_sign_flips_of_few_items_agree_with_scipy():
    rng = np.random.default_rng(0)
    for num in (3, 8, 12):
        difference = rng.normal(0.3, 1, num)
        expected = stats.permutation_test((difference,), np.sum, permutation_type="samples", n_resamples=np.inf)
        assert sign_flips(difference) == pytest.approx(expected.pvalue)


def test_sign_flips_of_many_items_agree_with_the_t_test():
    difference = np.random.default_rng(1).normal(0.06, 1, 2000)
    assert sign_flips(difference) == pytest.approx(stats.ttest_1samp(difference, 0).pvalue, abs=0.01)
    assert sign_flips(difference) == sign_flips(difference)


def test_holm_by_hand():
    """0.01 x 3, then 0.02 x 2, then 0.03 which may be no less than the one before; and in the order given."""
    assert holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.5]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []


def test_paired_by_hand():
    """Of four items one is won: differences 1, 0, 0, 0 with variance 1/4, so 1.96 x 0.5 / 2."""
    found = paired(np.array([0.0, 1, 1, 0]), np.array([1.0, 1, 1, 0]))
    assert found["difference"] == 0.25 and found["scores"] == [0.5, 0.75] and found["half_interval"] == pytest.approx(0.49)
    assert (found["test"], found["p"], found["wins"], found["losses"]) == ("mcnemar", 1.0, 1, 0)
    assert paired(np.array([0.5, 1]), np.array([1.0, 0.75]))["test"] == "sign flips"


def rows(scores, prefix=""):
    return [{"id": f"{prefix}{number}", "score": score} for number, score in enumerate(scores)]


def test_compare_joins_by_id(tmp_path):
    """The order of lines does not matter; each task has its line, and those of one alone are named."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_items(first, "won", rows([0] * 10 + [1] * 10))
    write_items(second, "won", reversed(rows([1] * 20)))
    write_items(first, "f1", rows([0.5, 0.25]))
    write_items(second, "f1", rows([0.25, 0.5]))
    write_items(first, "mine", rows([1]))
    printed = compare(str(first), str(second), str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    won = record["results"]["won"]
    assert won["p"] == pytest.approx(2 / 1024) and won["p_holm"] == pytest.approx(4 / 1024) and won["is_significant"]
    assert record["results"]["f1"]["p"] == 1 and record["settings"]["only"] == {"first": ["mine"], "second": []}
    lines = printed.splitlines()
    assert lines[0].split() == ["task", "items", "first", "second", "difference", "95", "%", "p", "Holm"]
    assert lines[2].split() == ["won", "20", "50.0", "100.0", "+50.0", "±", "22.5", "0.002", "0.0039", "*"]
    assert "only of first: mine" in lines


def test_each_metric_that_the_items_hold_is_tested(tmp_path):
    """Numbers only, and those that both models have; Holm's correction counts them all."""
    first, second = tmp_path / "first", tmp_path / "second"
    for directory, acc_norm in ((first, 0), (second, 1)):
        metrics = {"acc": 1.0, "acc_norm": float(acc_norm), "by_part": [True, False]}
        write_items(directory, "piqa", [row | {"metrics": metrics} for row in rows([1] * 10)])
        write_items(directory, "boolq", [row | {"metrics": {"acc": 1.0} | ({"f1": 0.5} if acc_norm else {})} for row in rows([1, 1])])
    printed = compare(str(first), str(second), str(tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "compare.json").read_text())["results"]
    assert set(results) == {"boolq", "piqa acc", "piqa acc_norm"}
    assert results["piqa acc"]["difference"] == 0 and results["piqa acc_norm"]["difference"] == 1
    assert results["piqa acc_norm"]["p"] == pytest.approx(2 / 1024) and results["piqa acc_norm"]["p_holm"] == pytest.approx(6 / 1024)
    assert (results["piqa acc_norm"]["task"], results["piqa acc_norm"]["metric"]) == ("piqa", "acc_norm")
    names = [line.split("  ")[0] for line in printed.splitlines()[1:4]]
    assert names == ["boolq", "piqa acc", "piqa acc_norm"] and "number of tests, 3" in printed


def test_bad_input(tmp_path):
    for name, task, items in (
        ("a", "mmlu", rows([1, 0, 1])),
        ("b", "mmlu", rows([1, 0]) + rows([1, 1], "other")),
        ("c", "piqa", rows([1])),
        ("d", "piqa", rows([None])),
        ("e", "piqa", []),
    ):
        write_items(tmp_path / name, task, items)
    for first, second, message in (
        ("a", "b", "items of mmlu differ, 1 of 3 in .*a are not in .*b and 2 of 4 the other way"),
        ("a", "c", "no task has items in both directories, .*a has mmlu and .*c has piqa"),
        ("c", "d", "1 of 1 items of piqa in .*d have no score"),
        ("e", "e", "task piqa of .*e has no items"),
        ("a", "none", "none is no directory"),
    ):
        with pytest.raises(UserError, match=message) as error:
            compare(str(tmp_path / first), str(tmp_path / second), str(tmp_path / "out"))
        assert "\n" not in str(error.value)
