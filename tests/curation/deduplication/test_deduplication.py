"""Deduplication: found rates of MinHash, datasketch as oracle, the rules of URLs, lines and passages, over several tasks and reducers."""

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.curation.deduplication import exchange
from herd_jax.curation.deduplication.duplicates import (
    DUPLICATE,
    URL,
    DeduplicationConfig,
    Duplicates,
    Emit,
    Reduce,
    older_versions,
    url_records,
)
from herd_jax.curation.deduplication.lines import LINE, Bucket, CountSurvivors, DuplicateLines, FrequentLines, line_records
from herd_jax.curation.deduplication.minhash import BAND, MinHash, near_duplicates
from herd_jax.curation.deduplication.passages import PASSAGE, PassageRecords, RepeatedPassages, repeated_passages
from herd_jax.curation.parquet import Load, Store, document_number
from herd_jax.errors import UserError

FOUND_RATES = {0.5: 0.0533, 0.6: 0.2111, 0.7: 0.5645, 0.75: 0.7716, 0.8: 0.9235, 0.9: 0.9996}
NUM_REDUCERS = 3


def document(number: int, text: str = "", **metadata) -> Document:
    return Document(text, f"file#{number}", metadata={"url": "", "date": "", "media_type": "text/plain", "language": "en", "number": number, **metadata})


def reduced(tmp_path, tasks, dtype, of_document, function):
    """The directory of what `function` found in the records of documents that are given task by task."""
    for rank, docs in enumerate(tasks):
        list(Emit(tmp_path / "records", dtype, of_document).run(docs, rank, len(tasks)))
    for rank in range(NUM_REDUCERS):
        Reduce(tmp_path / "records", tmp_path / "found", function).run(None, rank, NUM_REDUCERS)
    return tmp_path / "found"


def dropped(tmp_path, tasks, dtype, of_document, function) -> set[int]:
    found = reduced(tmp_path, tasks, dtype, of_document, function)
    kept = [doc.metadata["number"] for rank, docs in enumerate(tasks) for doc in Duplicates(found, "again").run(docs, rank, len(tasks))]
    return {doc.metadata["number"] for docs in tasks for doc in docs} - set(kept)


@pytest.mark.parametrize("similarity", FOUND_RATES)
def test_pairs_are_found_as_often_as_the_bands_say(similarity):
    # 2,000 pairs of sets of 100 shingles: the standard error of a rate is at most 0.011.
    minhash, random = MinHash(14, 8), np.random.default_rng(0)
    both, found = round(100 * similarity), 0
    only = (100 - both) // 2
    for _ in range(2000):
        shingles = random.integers(0, 2**64, both + 2 * only, np.uint64)
        first = minhash.signature(shingles[: both + only]).reshape(14, 8)
        second = minhash.signature(np.delete(shingles, range(both, both + only))).reshape(14, 8)
        found += (first == second).all(axis=1).any()
    true = both / (both + 2 * only)
    assert found / 2000 == pytest.approx(1 - (1 - true**8) ** 14, abs=0.035)
    if true == similarity:
        assert found / 2000 == pytest.approx(FOUND_RATES[similarity], abs=0.035)


def test_agrees_with_datasketch():
    datasketch = pytest.importorskip("datasketch")
    random = np.random.default_rng(1)
    vocabulary = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(500)]
    minhash, ours, theirs = MinHash(14, 8), [], []
    for pair in range(300):
        text = [vocabulary[i] for i in random.integers(0, 500, 200)]
        changed = list(text)
        for place in random.choice(200, random.integers(0, 12), replace=False):
            changed[place] = vocabulary[random.integers(0, 500)]
        pairs = [minhash.records(document(i, " ".join(version))) for i, version in enumerate((text, changed))]
        ours.append(bool(set(pairs[0]["key"]) & set(pairs[1]["key"])))
        sketches = []
        for version in (text, changed):
            sketch = datasketch.MinHash(112)
            sketch.update_batch({" ".join(version[i : i + 5]).encode() for i in range(196)})
            sketches.append(sketch)
        index = datasketch.MinHashLSH(params=(14, 8), num_perm=112)
        index.insert("text", sketches[0])
        theirs.append(bool(index.query(sketches[1])))
    # The two draw other hash functions: they can differ where the odds are even, not in how many pairs they find.
    assert np.mean(np.equal(ours, theirs)) > 0.8
    assert abs(np.mean(ours) - np.mean(theirs)) < 0.08
    assert 0.2 < np.mean(ours) < 0.98


def test_the_first_of_near_duplicates_stays(tmp_path):
    text = "the history of the city begins with a small settlement on the bank of the river where traders met"
    tasks = [
        [document(document_number(0, 0), "something else altogether, of which there is one in all of these texts, and no other"), document(document_number(0, 1), text)],
        [document(document_number(1, 0), text.upper()), document(document_number(1, 1), text, language="fr"), document(document_number(1, 2), "")],
        [document(document_number(2, 0), text + "!"), document(document_number(2, 1), "two words"), document(document_number(2, 2), "Two words.")],
    ]
    gone = dropped(tmp_path, tasks, BAND, MinHash(14, 8).records, near_duplicates)
    assert gone == {document_number(1, 0), document_number(2, 0), document_number(2, 2)}  # another language is no duplicate, nor is an empty text


def test_the_newest_of_a_url_stays(tmp_path):
    dates = {"https://Example.org:443/a": "2020-01-01", "http://example.org/a": "2021-06-01T10:00:00Z", "http://example.org/a?": "", "http://example.org/b": ""}
    docs = [document(document_number(0, i), url=url, date=date) for i, (url, date) in enumerate(dates.items())]
    again = [document(document_number(1, 0), url="http://example.org/a", date="2021-06-01T10:00:00+00:00"), document(document_number(1, 1))]
    gone = dropped(tmp_path, [docs, again], URL, url_records, older_versions)
    assert gone == {document_number(0, 0), document_number(0, 2), document_number(1, 0)}


def test_rows_of_one_page_with_names_of_their_own_all_stay(tmp_path):
    docs = [document(document_number(0, i), url=f"http://example.org/manual.html#section-{i}") for i in range(40)]
    docs += [document(document_number(0, 40 + i), url=f"http://example.org/#!/{i}") for i in range(2)]
    assert dropped(tmp_path, [docs], URL, url_records, older_versions) == set()


def test_a_document_that_two_reducers_drop_counts_once(tmp_path):
    for rank in range(2):
        list(Store(tmp_path / "documents", {}).run((document(0, "text") for _ in range(3)), rank))
    twice = np.array([(document_number(0, 1), 0)], DUPLICATE)
    for rank in range(2):
        exchange.write(tmp_path / "dropped", rank, twice)
    CountSurvivors(tmp_path / "documents", (tmp_path / "dropped",), 2, tmp_path / "survivors.npy").run()
    assert np.load(tmp_path / "survivors.npy").tolist() == [0, 2, 5]


def lines_left(tmp_path, texts, bucket=10**6, **settings) -> list[str]:
    tasks = [texts[: len(texts) // 2], texts[len(texts) // 2 :]]
    for rank, some in enumerate(tasks):
        list(Store(tmp_path / "documents", {"url": "string", "media_type": "string", "language": "string"}).run((document(0, text, **settings) for text in some), rank))
    CountSurvivors(tmp_path / "documents", (), 2, tmp_path / "survivors.npy").run()
    load = lambda rank: Bucket(tmp_path / "survivors.npy", bucket).run(Load(tmp_path / "documents").run(None, rank), rank)
    for rank in range(2):
        list(Emit(tmp_path / "lines", LINE, line_records).run(load(rank), rank))
    for rank in range(NUM_REDUCERS):
        FrequentLines(tmp_path / "lines", tmp_path / "frequent", 6).run(None, rank, NUM_REDUCERS)
    return [doc.text for rank in range(2) for doc in DuplicateLines(tmp_path / "frequent").run(load(rank), rank)]


@pytest.mark.parametrize("copies", [6, 7])
def test_a_line_of_six_documents_stays_and_of_seven_goes(tmp_path, copies):
    left = lines_left(tmp_path, [f"text of its own {chr(97 + i) * 3}\nHome | About us ({i})" for i in range(copies)])
    assert len(left) == copies and all(("Home" in text) == (copies == 6) for text in left)


def test_a_line_repeated_inside_a_document_counts_once(tmp_path):
    assert lines_left(tmp_path, ["menu\nmenu\nmenu\nmenu\nown one", "menu\nown two"]) == ["menu\nmenu\nmenu\nmenu\nown one", "menu\nown two"]


def test_buckets_count_apart(tmp_path):
    assert len(lines_left(tmp_path, ["the same line"] * 12, bucket=6)) == 12


def test_a_document_of_frequent_lines_alone_goes_and_empty_ones_do_not(tmp_path):
    assert lines_left(tmp_path, ["the same line\n--"] * 8 + ["", "\n\n"]) == ["", "\n\n"]


def test_source_code_keeps_its_lines(tmp_path):
    assert lines_left(tmp_path, ["return result\n"] * 8, media_type="text/x-code") == ["return result\n"] * 8


def test_a_repeated_passage_is_cut_where_it_comes_again(tmp_path):
    passage = "one two three four five six seven eight nine ten"
    docs = [document(0, f"Before it. {passage} after it"), document(1, f"Other words: {passage} and an end."), document(2, passage)]
    found = reduced(tmp_path, [docs], PASSAGE, PassageRecords(8), repeated_passages)
    left = [doc.text for doc in RepeatedPassages(found, 8).run(docs, 0, 1)]
    assert left == [f"Before it. {passage} after it", "Other words:\nand an end."]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=20), min_size=1, max_size=4), st.integers(1, 5))
def test_an_exchange_gives_each_record_to_one_reducer(tmp_path_factory, tasks, num_reducers):
    directory = tmp_path_factory.mktemp("exchange")
    for rank, keys in enumerate(tasks):
        records = np.zeros(len(keys), DUPLICATE)
        records["key"], records["kept"] = keys, rank
        exchange.write(directory, rank, records)
    read = np.concatenate([exchange.read(directory, *exchange.key_range(rank, num_reducers)) for rank in range(num_reducers)])
    assert read["key"].tolist() == sorted(key for keys in tasks for key in keys)


def test_texts_that_differ_in_digits_alone(tmp_path):
    """Multiplication problems and tables of numbers are no duplicates, unless digits are folded."""
    problem = "What is {} times {}? Work it out on paper, show each of the partial products, and then check the result by dividing it."
    docs = [document(document_number(0, i), problem.format(12 + i, 97 + 3 * i)) for i in range(100)]
    docs.append(document(document_number(0, 100), problem.format("12", "97").upper()))
    assert dropped(tmp_path / "a", [docs], BAND, MinHash(14, 8).records, near_duplicates) >= {document_number(0, 100)}
    table = lambda seed: " ".join(map(str, np.random.default_rng(seed).integers(1000, 9999, 60)))
    tables = [document(document_number(0, i), table(i)) for i in range(20)]
    assert dropped(tmp_path / "b", [tables], BAND, MinHash(14, 8).records, near_duplicates) == set()
    folding = MinHash(14, 8, fold_digits=True).records
    assert len(dropped(tmp_path / "c", [tables], BAND, folding, near_duplicates)) == 19
    assert len(dropped(tmp_path / "d", [docs], BAND, folding, near_duplicates)) == 100


@pytest.mark.parametrize("settings", [{"rows": 0}, {"bands": -1}, {"passage_words": 3}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        DeduplicationConfig(**settings)
