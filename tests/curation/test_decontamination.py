"""Decontamination: coverage worked by hand and against a plain count, planted items found at what was planted, nothing in random text."""

import json
import random

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.curation.benchmark_items import Benchmark, read_items
from herd_jax.curation.block import DropLog
from herd_jax.curation.decontamination import Decontaminate, DecontaminationConfig, Index, report, table
from herd_jax.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text_of(rng, num_words):
    return " ".join("".join(rng.choices(LETTERS, k=6)) for _ in range(num_words))


def write_items(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


@pytest.fixture
def run(tmp_path):
    """run(benchmarks as name -> texts, texts of documents or lists of them by task, drop_at) -> (kept ids, name -> coverages, reasons)."""

    def run(benchmarks, documents, drop_at=None):
        paths = {name: write_items(tmp_path / f"{name}.jsonl", [{"q": text} for text in texts]) for name, texts in benchmarks.items()}
        made = tuple(Benchmark(name, path) for name, path in paths.items())
        index = tmp_path / "index.npz"
        Index.build(made).save(index)
        tasks = documents if isinstance(documents[0], list) else [documents]
        kept = []
        for task, texts in enumerate(tasks):
            block = Decontaminate(DecontaminationConfig(made, drop_at), index, tmp_path / "hits")
            stored = DropLog(tmp_path / "dropped", [block])
            docs = (Document(text=text, id=f"{task}#{n}", metadata={}) for n, text in enumerate(texts))
            kept += [doc.id for doc in stored.run(block.run(docs, task, len(tasks)), task, len(tasks))]
        reasons = [json.loads(line)["reason"] for file in sorted((tmp_path / "dropped").iterdir()) for line in file.open()]
        found = report(Index.load(index), sorted((tmp_path / "hits").glob("*.npy")))
        return kept, {benchmark.name: benchmark.coverage_I.tolist() for benchmark in found}, reasons

    return run


TEN = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    "document, coverage",
    [
        (f"begin {TEN} end", 1.0),
        ("one two three four five six seven eight", 0.8),
        ("zero two three four five six seven eight nine eleven", 0.8),
        ("one two three four five six seven", 0.0),  # seven are no 8-gram
        ("one two three four five six seven nine eight ten", 0.0),
        ("One, TWO -- thrée! four\n\nfive (six) séven eight; nine", 0.9),  # case, accents, punctuation and lines do not hide it
        ("", 0.0),
    ],
)
def test_coverage_by_hand(run, document, coverage):
    _, found, _ = run({"bench": [TEN]}, [document])
    assert found == {"bench": [coverage]}


def test_two_ends_and_a_gap(run):
    """Of 20 tokens the first 8 and the last 9 are there, in documents of different tasks: 17 of 20."""
    item = text_of(random.Random(0), 20).split()
    _, found, _ = run({"bench": [" ".join(item)]}, [[" ".join(item[:8])], ["nothing"], [" ".join(item[-9:])]])
    assert found["bench"] == [17 / 20]


def test_numbers_count_unless_they_are_folded(tmp_path):
    """The same story with other numbers is another item."""
    story = "Janet has {} oranges and Sharon has seven of them, so how many are there?"
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": story.format(9)}) + "\n")
    for fold_digits in (False, True):
        index = Index.build([Benchmark("b", str(tmp_path / "b.jsonl"))], fold_digits)
        index.save(tmp_path / "index.npz")
        index = Index.load(tmp_path / "index.npz")
        share = lambda number: index.coverage(index.find(story.format(number)))[1].max(initial=0)
        assert share(9) == 1 and (share(14) == 1) == fold_digits


def test_short_items(run):
    """Fewer than 8 tokens: found whole or not at all, and no reason to drop a document."""
    items = ["which way is up", "yes", "?!", TEN]
    kept, found, _ = run({"short": items}, ["Tell me: which way is up?", "which way was up"], drop_at=0.5)
    assert found["short"] == [1.0, 0.0, 0.0, 0.0] and len(kept) == 2
    _, found, _ = run({"short": items}, ["Yes, ?!"])
    assert found["short"] == [0.0, 1.0, 0.0, 0.0]


def plain_coverage(item, documents):
    """Token by token, over strings."""
    item, n = item.split(), min(8, len(item.split()))
    seen = {tuple(text.split()[i : i + n]) for text in documents for i in range(len(text.split()) - n + 1)}
    covered = {i + k for i in range(len(item) - n + 1) if tuple(item[i : i + n]) in seen for k in range(n)}
    return len(covered) / len(item)


SMALL_WORDS = st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=30).map(" ".join)  # few words: repeats, overlaps, shared n-grams


@settings(deadline=None)
@given(items=st.lists(SMALL_WORDS, min_size=1, max_size=6), documents=st.lists(SMALL_WORDS, max_size=4))
def test_coverage_against_a_plain_count(tmp_path_factory, items, documents):
    path = write_items(tmp_path_factory.mktemp("plain") / "items.jsonl", [{"q": item} for item in items])
    index = Index.build([Benchmark("b", path)])
    hits = [index.find(text) for text in documents]
    found, share = index.coverage(np.unique(np.concatenate([np.empty(0, np.int64), *hits])))
    shares = dict(zip(found.tolist(), share.tolist(), strict=True))
    for number, item in enumerate(items):
        assert shares.get(number, 0.0) == pytest.approx(plain_coverage(item, documents))


def test_planted_among_many(run):
    """Of 300 items of 40 words, ten are planted in part in 200 documents: each is found at the share that was planted, the others at 0."""
    rng = random.Random(1)
    items = [text_of(rng, 40) for _ in range(300)]
    documents = [text_of(rng, 120).split() for _ in range(200)]
    planted = {item: length for item, length in zip(rng.sample(range(300), 10), (8, 10, 12, 16, 20, 24, 30, 36, 39, 40), strict=True)}
    for item, length in planted.items():
        begin = rng.randrange(40 - length + 1)
        documents[rng.randrange(200)][7:7] = items[item].split()[begin : begin + length]
    texts = [" ".join(document) for document in documents]
    kept, found, _ = run({"a": items[:150], "b": items[150:]}, [texts[:90], texts[90:]])
    assert len(kept) == 200
    assert found["a"] + found["b"] == [planted.get(item, 0) / 40 for item in range(300)]


def test_documents_are_dropped_at_the_threshold(run):
    """What one document holds counts, not what all do; what was dropped is no part of the corpus any more."""
    rng = random.Random(2)
    first, second = text_of(rng, 20), text_of(rng, 20)
    halves = [" ".join(second.split()[:10]), " ".join(second.split()[10:])]
    documents = [f"so {first} then", *halves, "plain"]
    kept, found, reasons = run({"first_set": [first], "second_set": [second]}, documents, drop_at=0.6)
    assert kept == ["0#1", "0#2", "0#3"] and reasons == ["contains_first_set"]
    assert found == {"first_set": [0.0], "second_set": [1.0]}
    kept, found, reasons = run({"first_set": [first], "second_set": [second]}, documents, drop_at=0.5)
    assert kept == ["0#3"] and sorted(reasons) == ["contains_first_set", "contains_second_set", "contains_second_set"]
    kept, found, reasons = run({"first_set": [first]}, documents)
    assert len(kept) == 4 and found == {"first_set": [1.0]} and not reasons


def test_an_item_that_two_benchmarks_share(run):
    _, found, reasons = run({"a": [TEN], "b": ["other words", TEN]}, [TEN])
    assert found == {"a": [1.0], "b": [0.0, 1.0]} and not reasons


STRANGE = ["", "x", "\x00\ufffd\x01" * 100, "\ud800 \udfff", "א ב ג ד ה ו ז ח", "?" * 1000, "word" * 100_000]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_any_text_has_a_verdict(run, text):
    kept, found, _ = run({"bench": [TEN]}, [text], drop_at=0.5)
    assert len(kept) == 1 and found == {"bench": [0.0]}


def test_the_index_is_the_same_bytes_and_comes_back(tmp_path):
    path = write_items(tmp_path / "items.jsonl", [{"q": TEN}, {"q": "short one"}, {"q": "?"}])
    for name in ("first.npz", "second.npz"):
        Index.build([Benchmark("a", path), Benchmark("b", path)]).save(tmp_path / name)
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    index = Index.load(tmp_path / "first.npz")
    assert index.names.tolist() == ["a", "b"] and index.num_tokens_I.tolist() == [10, 2, 0] * 2
    assert (np.diff(index.hashes_K.astype(object)) > 0).all() and len(index.hashes_K) == 4 and len(index.entries_O) == 8


def test_formats(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    items = [
        {"question": "why?", "choices": ["this", "that"], "meta": {"answer": 1, "none": None}},
        {"question": "how", "choices": [], "meta": {"answer": 2}},
    ]
    write_items(tmp_path / "a.jsonl", items)
    (tmp_path / "a.json").write_text(json.dumps(items))
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("why?\n\nhow\n")
    for suffix in ("jsonl", "json", "parquet"):
        found = list(read_items(Benchmark("a", str(tmp_path / f"a.{suffix}"), ("question", "choices"))))
        assert found == ["why?\nthis\nthat", "how"]
        assert list(read_items(Benchmark("a", str(tmp_path / f"a.{suffix}"))))[0] == "why?\nthis\nthat\n1"
    assert [item.strip() for item in read_items(Benchmark("a", str(tmp_path / "a.txt")))] == ["why?", "how"]


def test_bad_input(tmp_path):
    path = write_items(tmp_path / "a.jsonl", [{"q": "x"}])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"q": "x"}\n{"q": ')
    (tmp_path / "broken.parquet").write_text("no")
    (tmp_path / "flat.json").write_text("[1, 2]")
    for benchmark, message in (
        (("a", path, ("question",)), "benchmark a: item 1 of .* has no field 'question': it has q"),
        (("a", str(tmp_path / "none.jsonl")), "benchmark a cannot be read from .*none.jsonl .*No such file"),
        (("a", str(tmp_path / "broken.jsonl")), "benchmark a cannot be read from .*broken.jsonl"),
        (("a", str(tmp_path / "broken.parquet")), "benchmark a cannot be read from .*broken.parquet"),
        (("a", str(tmp_path / "flat.json")), "item 1 of .* is no object"),
        (("a", str(tmp_path / "empty.jsonl")), "benchmark a has no items in .*empty.jsonl"),
    ):
        with pytest.raises(UserError, match=message) as error:
            Index.build([Benchmark(*benchmark)])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="curation benchmarks has one of the name 'a b'"):
        Benchmark("a b", path)
    with pytest.raises(UserError, match="curation benchmarks has two of one name"):
        DecontaminationConfig((Benchmark("a", path), Benchmark("a", path)))
    for share in (0.0, 1.5):
        with pytest.raises(UserError, match=f"curation drop_at is {share}"):
            DecontaminationConfig((), share)


def test_without_benchmarks_everything_stays(run):
    assert run({}, ["some text"], drop_at=0.5)[:2] == (["0#0"], {})


def test_table(tmp_path):
    path = write_items(tmp_path / "a.jsonl", [{"q": TEN}, {"q": "nothing of it is in any of the documents"}])
    index = Index.build([Benchmark("planted", path)])
    np.save(tmp_path / "hits.npy", index.find("one two three four five six seven eight"))
    lines = table(report(index, [tmp_path / "hits.npy"])).splitlines()
    assert lines[0].split() == ["benchmark", "items", "mean", ">=", "20%", ">=", "50%", ">=", "80%", ">=", "100%"]
    assert lines[1].split() == ["planted", "2", "40.0%", "1", "1", "1", "0"]
