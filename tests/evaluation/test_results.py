"""The files of an evaluation: they come back as written, whole or not at all, and name what is wrong with them."""

import json
import math

import numpy as np
import pytest

from herd_jax.errors import UserError
from herd_jax.evaluation.results import (
    check_writable,
    half_interval,
    item_id,
    item_tasks,
    read_items,
    read_results,
    short_names,
    write_items,
    write_results,
)


def test_results_come_back(tmp_path):
    results = {"mmlu": {"acc": np.float32(0.5), "curve": np.arange(2), "none": math.nan, "names": ("é", "\ud800")}}
    path = write_results(tmp_path / "new" / "one", "run", tmp_path / "model", {"shots": 5}, results)
    assert path == tmp_path / "new" / "one" / "run.json" and not list(path.parent.glob("*.unfinished"))
    text = path.read_text(encoding="utf-8")
    assert "é" in text and text.startswith('{\n "command": "run",\n "model"')
    (path.parent / "other.json").write_text('{"of": "somebody else"}')
    assert read_results(path.parent) == {
        "run": {
            "command": "run",
            "model": str(tmp_path / "model"),
            "version": 1,
            "settings": {"shots": 5},
            "results": {"mmlu": {"acc": 0.5, "curve": [0, 1], "none": None, "names": ["é", "?"]}},
        }
    }


def test_items_come_back(tmp_path):
    """In their order, with two of one text kept apart, and under a task's name whatever it is."""
    quarter = {"id": item_id("a"), "score": np.float64(0.25), "choice": "A"}
    rows = [{"id": item_id("b"), "score": 1}, quarter, {"id": item_id("b"), "score": 0}]
    path = write_items(tmp_path, "group/a task:1", rows)
    assert path.parent == tmp_path / "items" and len(path.read_text().splitlines()) == 3
    found = read_items(tmp_path, "group/a task:1")
    assert list(found) == [item_id("b"), item_id("a"), item_id("b") + "-2"]
    assert [row["score"] for row in found.values()] == [1, 0.25, 0] and found[item_id("a")]["choice"] == "A"
    assert item_tasks(tmp_path) == ["group/a task:1"]


def test_an_id_is_the_text_alone():
    assert item_id("one") == "7692c3ad3540bb80"  # of sha256, on every machine
    assert len({item_id("a", "b"), item_id("ab"), item_id("b", "a"), item_id("\ud800")}) == 4


def test_half_interval():
    """Hand-worked: of 100 items 50 right, the standard error is 0.05."""
    assert half_interval(0.5, 100) == pytest.approx(0.098)
    assert half_interval(1.0, 7) == 0.0


def test_directories_are_named_by_their_last_parts_where_these_differ():
    assert short_names(["a/one/", "b/two"]) == ["one", "two"]
    assert short_names(["a/one", "b/one", "two"]) == ["a/one", "b/one", "two"]


def test_a_directory_that_can_be_written_is_made_and_empty(tmp_path):
    check_writable(tmp_path / "new" / "one")
    assert not list((tmp_path / "new" / "one").iterdir())


def test_bad_input(tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text('{"command": ')
    (tmp_path / "old").mkdir()
    record = {"command": "run", "model": "m", "version": 0, "settings": {}, "results": {}}
    (tmp_path / "old" / "run.json").write_text(json.dumps(record))
    (tmp_path / "old" / "items").mkdir()
    (tmp_path / "old" / "items" / "mmlu.jsonl").write_text('{"id": "a", "score": 1}\n{"id": ')
    (tmp_path / "old" / "items" / "piqa.jsonl").write_text('{"score": 1}\n')
    (tmp_path / "file").write_text("")
    for call, message in (
        (lambda: read_results(tmp_path / "none"), "none is no directory"),
        (lambda: read_results(tmp_path / "damaged"), "run.json is damaged"),
        (lambda: read_results(tmp_path / "old"), "run.json has version 0 where 1 is read"),
        (lambda: read_items(tmp_path / "old", "boolq"), "boolq.jsonl does not exist, .*old has items of mmlu, piqa"),
        (lambda: read_items(tmp_path / "old", "mmlu"), "mmlu.jsonl is damaged"),
        (lambda: read_items(tmp_path / "old", "piqa"), "piqa.jsonl has a line without an id"),
        (lambda: check_writable(tmp_path / "file"), "file cannot be written .File exists.: give an --output that can be"),
        (lambda: check_writable(tmp_path / "file" / "below"), "below cannot be written .Not a directory."),
        (lambda: write_results(tmp_path / "file" / "below", "run", "m", {}, {}), "run.json cannot be written"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
