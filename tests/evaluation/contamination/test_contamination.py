"""Contamination of items by token streams: planted shares found exactly, nothing in random text, the threshold worked by hand."""

import json
import math
import random

import numpy as np
import pytest

from herd_jax.data.streams import StreamWriter
from herd_jax.errors import UserError
from herd_jax.evaluation.contamination import scan as scanning
from herd_jax.evaluation.contamination.contamination import contamination
from herd_jax.evaluation.contamination.gain import choose_threshold, estimate, estimated_gain
from herd_jax.evaluation.contamination.scan import scan
from herd_jax.evaluation.results import item_id, read_results, write_items
from herd_jax.text.tokenizer import load_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text_of(rng, num_words):
    return " ".join("".join(rng.choices(LETTERS, k=6)) for _ in range(num_words))


@pytest.fixture
def stream(tmp_path):
    """stream(name, texts) -> the directory of a stream of bytes."""

    def stream(name, texts):
        tokenizer = load_tokenizer("bytes")
        tokenizer.save(tmp_path / name / "tokenizer")
        with StreamWriter(tmp_path / name / "train", tokenizer.vocab_size) as writer:
            for text in texts:
                ids = np.array(tokenizer.encode(text, bos=True, eos=True))
                writer.append(ids, np.array([len(ids)]), len(text))
        return tmp_path / name / "train"

    return stream


@pytest.fixture
def planted(stream):
    """200 items of 40 words in two tasks, ten of them planted in part in two streams; and the coverage that each item then has."""
    rng = random.Random(1)
    items = [text_of(rng, 40) for _ in range(200)]
    documents = [text_of(rng, 120).split() for _ in range(60)]
    shares = dict(zip(rng.sample(range(200), 10), (8, 10, 12, 16, 20, 24, 30, 36, 39, 40), strict=True))
    for item, length in shares.items():
        begin = rng.randrange(40 - length + 1)
        documents[rng.randrange(60)][7:7] = items[item].upper().split()[begin : begin + length]  # capitals do not hide it
    texts = [" ".join(document) for document in documents]
    streams = [stream("web", texts[:25]), stream("code", texts[25:])]
    return {"a": items[:120], "b": items[120:]}, streams, [shares.get(item, 0) / 40 for item in range(200)]


@pytest.mark.parametrize("workers", [1, 2])
def test_planted_items_are_found_at_the_planted_coverage(planted, tmp_path, monkeypatch, workers):
    """However the streams are cut for tasks and for reading, and by any number of processes; in random text nothing is found."""
    texts, streams, expected = planted
    if workers == 1:
        monkeypatch.setattr(scanning, "READ_TOKENS", 1000)
    monkeypatch.setattr(scanning, "PART_TOKENS", 7000)
    found = scan(texts, streams, tmp_path / "index", workers)
    assert [*found["a"], *found["b"]] == expected
    assert len(list((tmp_path / "index").glob("*/hits/*/*.npy"))) > 5


def test_what_was_found_stays(planted, tmp_path, monkeypatch):
    """A second scan reads no stream again, one more stream is read alone, and other items are another index."""
    texts, (web, code), expected = planted
    read = []
    run = scanning.StreamTexts.run
    monkeypatch.setattr(scanning.StreamTexts, "run", lambda self, *args, **kw: read.append(self.path) or run(self, *args, **kw))
    first = scan(texts, [web], tmp_path / "index", 1)
    again = scan(texts, [web], tmp_path / "index", 1)
    assert read == [web] and all((first[task] == again[task]).all() for task in texts)
    both = scan(texts, [web, code], tmp_path / "index", 1)
    assert read == [web, code] and [*both["a"], *both["b"]] == expected
    scan({"a": texts["a"]}, [web], tmp_path / "index", 1)
    assert read == [web, code, web]


def test_documents_are_searched_each_by_itself(stream, tmp_path):
    words = text_of(random.Random(3), 10).split()
    halves = [" ".join(words[:5]), " ".join(words[5:])]
    texts = {"task": [" ".join(words), "?!", halves[1]]}
    np.testing.assert_array_equal(scan(texts, [stream("cut", halves)], tmp_path / "index", 1)["task"], [0, 0, 1])
    np.testing.assert_array_equal(scan(texts, [stream("whole", [" ".join(words)])], tmp_path / "index", 1)["task"], [1, 0, 1])


def test_items_of_fewer_words_than_an_8_gram_are_found_whole_or_not_at_all_and_counted(stream, tmp_path):
    """Seven words are one n-gram; in a text that has but six of them nothing is found. Eight words are no short item."""
    seven, eight = text_of(random.Random(4), 7), text_of(random.Random(5), 8)
    data = write_task(tmp_path / "data", [seven, "?!", eight])
    for name, seen, expected in (("whole", seven, [1, 0, 0]), ("part", seven.rsplit(" ", 1)[0], [0, 0, 0])):
        printed = contamination(["task"], [str(stream(name, [f"before {seen} behind"]))], (), data, str(tmp_path / "out"), workers=1)
        assert "of fewer than 8 words, so found whole or not at all: 2 of task" in printed.splitlines()
        assert [json.loads(line)["coverage"] for line in (tmp_path / "out/coverage/task.jsonl").open()] == expected
        assert read_results(tmp_path / "out")["contamination"]["results"]["task"]["num_short"] == 2


# 20 clean items of which 10 are right, 10 covered by half of which 5 are, 10 covered whole that all are.
COVERAGE = np.repeat([0.0, 0.5, 1.0], [20, 10, 10])
SCORE = np.array([1, 0] * 10 + [1, 0] * 5 + [1] * 10, float)


def test_gain_by_hand():
    """At 1: 25 of 40 right, and 15 of the 30 clean ones. The variance of all is 25/40 x 15/40 x 40/39."""
    gain = estimated_gain(COVERAGE, SCORE, 1.0)
    assert (gain.score, gain.clean_score, gain.gain) == (0.625, 0.5, 0.125)
    assert gain.z == pytest.approx(0.125 / math.sqrt(0.625 * 0.375 * 40 / 39 / 30 * (10 / 40))) and gain.z == pytest.approx(2.793, abs=1e-3)
    half = estimated_gain(COVERAGE, SCORE, 0.5)
    assert half.gain == 0.125 and half.z == pytest.approx(1.612, abs=1e-3) and not half.is_significant
    assert estimated_gain(COVERAGE[5:], SCORE[5:], 0.5).clean_score == pytest.approx(7 / 15)
    assert estimated_gain(COVERAGE[11:], SCORE[11:], 0.5) is None  # 9 clean ones
    assert estimated_gain(COVERAGE, np.ones(40), 0.5).z == 0  # nothing varies


def test_z_is_that_of_random_subsets():
    """Against drawing 30 of the 40 items many times."""
    rng = np.random.default_rng(0)
    gains = [SCORE.mean() - rng.permutation(SCORE)[:30].mean() for _ in range(20_000)]
    gain = estimated_gain(COVERAGE, SCORE, 1.0)
    assert gain.gain / gain.z == pytest.approx(np.std(gains), rel=0.03)


def test_threshold_by_hand():
    """1 and 0.6 part the items alike, and the highest is named; at 0.5 the gain is as large and not significant."""
    assert choose_threshold([COVERAGE], [SCORE]) == 1.0
    assert choose_threshold([COVERAGE], [1 - SCORE]) is None
    # A second model gains 10/30 - 0 at 0.5, where the first gains 0.125.
    second = np.repeat([0.0, 1.0], [20, 20])
    assert choose_threshold([COVERAGE, COVERAGE], [SCORE, second]) == 0.5
    assert choose_threshold([], []) is None


def test_estimate_joins_by_id():
    """Scores of other items do not count, and items without a score only for the share of contaminated ones."""
    coverage = {f"{i}": share for i, share in enumerate(COVERAGE)} | {"unscored": 1.0}
    found = estimate(coverage, {"m": {f"{i}": score for i, score in enumerate(SCORE)} | {"other": 1.0}})
    assert found["threshold"] == 1.0 and found["contaminated"] == 11 / 41 and found["num_items"] == 41
    assert found["gains"]["m"]["gain"] == 0.125 and found["gains"]["m"]["is_significant"] and found["num_scored"] == {"m": 40}
    assert found["items_at"]["0.5"] == 21 and [row["threshold"] for row in found["curves"]["m"]][-1] == 1.0


def write_task(directory, texts):
    directory.mkdir(exist_ok=True)
    (directory / "task.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(directory)


def test_the_command(stream, tmp_path):
    """Texts of one's own, scores of two models, a table as the paper's."""
    rng = random.Random(5)
    texts = [text_of(rng, 16) for _ in range(40)]
    seen = [text.rsplit(" ", 8)[0] if share == 0.5 else text for text, share in zip(texts, COVERAGE) if share]
    web = stream("web", [text_of(rng, 50), *seen])
    data = write_task(tmp_path / "data", texts)
    for name, scores in (("large", SCORE), ("small", np.zeros(40))):
        write_items(tmp_path / name, "task", ({"id": item_id(text), "score": score} for text, score in zip(texts, scores)))
    scores = [str(tmp_path / "large"), str(tmp_path / "small")]
    printed = contamination(["task"], [str(web)], scores, data, str(tmp_path / "out"), workers=1)
    heads, row = (line.split() for line in printed.splitlines()[:2])
    assert heads[-4:] == ["gain", "large", "gain", "small"]
    assert row == ["task", "40", "37.5%", "50.0%", "50.0%", "25.0%", "25.0%", "1", "25.0%", "+12.5*", "+0.0"]
    results = read_results(tmp_path / "out")["contamination"]["results"]["task"]
    assert results["threshold"] == 1.0 and results["gains"]["large"]["gain"] == 0.125
    lines = [json.loads(line) for line in (tmp_path / "out" / "coverage" / "task.jsonl").open()]
    assert [line["coverage"] for line in lines] == COVERAGE.tolist() and lines[0]["id"] == item_id(texts[0])
    without = contamination(["task"], [str(web)], (), data, str(tmp_path / "out"), workers=1).splitlines()
    assert without[1].split() == [*row[:7], "-", "-"]


def test_bad_input(stream, tmp_path):
    web, data = stream("web", ["some text"]), write_task(tmp_path / "data", ["one"])
    write_items(tmp_path / "model", "task", [{"id": "other", "score": 1}])
    (tmp_path / "data" / "twice.jsonl").write_text('{"id": 7, "text": "x"}\n{"id": 7, "text": "y"}\n')
    (tmp_path / "data" / "half.jsonl").write_text('{"text": "x"}\n{"txt": "y"}\n')
    for arguments, message in (
        ((["task"], [str(tmp_path / "none")], (), data), "token stream .*none does not exist"),
        ((["task"], [str(web)], [str(tmp_path / "model")], data), "items of task in .*model score none of its 1 texts"),
        ((["task"], [str(web)], [str(tmp_path / "absent")], data), "absent"),
        ((["half"], [str(web)], (), data), "item 2 of .*half.jsonl has no text"),
        ((["twice"], [str(web)], (), data), "twice.jsonl has two items of the id 7: give each its own"),
        ((["missing"], [str(web)], (), data), "the data of task missing is missing"),
    ):
        with pytest.raises(UserError, match=message) as error:
            contamination(*arguments, str(tmp_path / "out"), workers=1)
        assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written .*: give an --output that can be"):
        contamination(["task"], [str(web)], (), data, str(tmp_path / "file"), index=str(tmp_path / "index"), workers=1)
    assert not (tmp_path / "index").exists()
    with pytest.raises(UserError, match="--workers is -1"):
        contamination(["task"], [str(web)], (), data, workers=-1)
    with pytest.raises(UserError, match="task empty has no items"):
        scan({"empty": []}, [web], tmp_path / "index", 1)
