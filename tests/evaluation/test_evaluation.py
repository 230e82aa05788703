"""What is opened once: the directory is one model's, and the model is read only where it is asked for."""

from pathlib import Path

import pytest

from herd_jax.errors import UserError
from herd_jax.evaluation.evaluation import Evaluation
from herd_jax.evaluation.results import read_items, read_results, write_results


def test_output_directory(tmp_path):
    assert str(Evaluation(tmp_path / "runs" / "small/").directory) == "evaluation/small"
    assert Evaluation("model", tmp_path).directory == tmp_path


def test_a_directory_is_one_model_s(tmp_path):
    """However its path is written; what is of several models may lie there too."""
    Evaluation("models/a/", tmp_path).write("run", {}, {})
    write_results(tmp_path, "compare", "a and b", {}, {})
    Evaluation(Path("models/a").resolve(), tmp_path).check_directory()
    with pytest.raises(UserError, match="holds results of another model, models/a/: give another --output"):
        Evaluation("models/b", tmp_path).check_directory()


def test_results_are_written_without_the_model(tmp_path):
    evaluation = Evaluation(tmp_path / "no model", tmp_path / "out")
    assert not evaluation.directory.exists()
    evaluation.write("run", {"limit": 1}, {"mmlu": 0.5})
    evaluation.write_items("mmlu", [{"id": "a", "score": 1}])
    record = read_results(tmp_path / "out")["run"]
    assert (record["model"], record["settings"], record["results"]) == (str(tmp_path / "no model"), {"limit": 1}, {"mmlu": 0.5})
    assert list(read_items(tmp_path / "out", "mmlu")) == ["a"]
    with pytest.raises(UserError, match="no model does not exist"):
        evaluation.model
