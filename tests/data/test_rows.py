"""Rows: nothing lost or doubled, masks against a plain oracle, purity in (seed, index), mixture frequencies, errors."""

import json
import pickle
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.config import parse
from herd_jax.data.mixture import Mixture
from herd_jax.data.rows import DataConfig, StreamRows, TrainingRows, check_vocabulary, load_data_tokenizer, open_streams, validation_rows
from herd_jax.data.streams import StreamWriter, TokenStream
from herd_jax.errors import UserError
from herd_jax.text.tokenizer import load_tokenizer


def make_stream(path, lengths, first_token=1, vocab_size=50_000, fingerprint=""):
    """Documents of these lengths whose tokens count up from `first_token`, so that a token tells its place."""
    tokens = first_token + np.arange(sum(lengths))
    with StreamWriter(path, vocab_size, tokenizer_fingerprint=fingerprint, shard_tokens=64) as writer:
        for length, start in zip(lengths, np.cumsum([0, *lengths]), strict=False):
            writer.append(tokens[start : start + length], np.array([length]), length)
    return TokenStream(path)


def plain_row(tokens, document_of, start, seq_len, document_mask):
    """The row that begins at token `start`, one token at a time."""
    row = {"tokens": [], "targets": [], "loss_mask": [], "segment_ids": [], "positions": []}
    for i in range(start, start + seq_len):
        if i + 1 >= len(tokens):
            values = (0, 0, False, 0, 0)
        elif not document_mask:
            values = (tokens[i], tokens[i + 1], True, 1, i - start)
        else:
            begin = max(start, next(j for j in range(i + 1) if document_of[j] == document_of[i]))
            segment = 1 + document_of[i] - document_of[start]
            values = (tokens[i], tokens[i + 1], document_of[i] == document_of[i + 1], segment, i - begin)
        for name, value in zip(row, values, strict=True):
            row[name].append(value)
    return row


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=12), seq_len=st.integers(1, 20), document_mask=st.booleans())
def test_an_epoch_against_the_plain_rows(tmp_path_factory, lengths, seq_len, document_mask):
    stream = make_stream(tmp_path_factory.mktemp("rows") / "s", lengths)
    tokens = stream.read(0, stream.num_tokens)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    rows = StreamRows(stream, seq_len, document_mask)
    epoch = [rows[i] for i in range(len(rows))]
    for i, row in enumerate(epoch):
        for name, expected in plain_row(tokens, document_of, i * seq_len, seq_len, document_mask).items():
            np.testing.assert_array_equal(row[name], expected, err_msg=name)
            assert row[name].dtype == (np.bool_ if name == "loss_mask" else np.int32)
    real = [row["segment_ids"] > 0 for row in epoch]
    targets = np.concatenate([row["targets"][mask] for row, mask in zip(epoch, real, strict=True)])
    np.testing.assert_array_equal([tokens[0], *targets], tokens)
    num_predicted = sum(row["loss_mask"].sum() for row in epoch)
    assert num_predicted == (len(tokens) - len(lengths) if document_mask else len(tokens) - 1)


def test_a_row_worked_by_hand(tmp_path):
    rows = StreamRows(make_stream(tmp_path / "s", [2, 3, 2]), 4, document_mask=True)  # documents 1 2 | 3 4 5 | 6 7
    assert {name: values.tolist() for name, values in rows[0].items()} == {
        "tokens": [1, 2, 3, 4],
        "targets": [2, 3, 4, 5],
        "loss_mask": [True, False, True, True],
        "segment_ids": [1, 1, 2, 2],
        "positions": [0, 1, 0, 1],
    }
    assert {name: values.tolist() for name, values in rows[1].items()} == {
        "tokens": [5, 6, 0, 0],
        "targets": [6, 7, 0, 0],
        "loss_mask": [False, True, False, False],
        "segment_ids": [1, 2, 0, 0],
        "positions": [0, 0, 0, 0],
    }


@pytest.fixture
def streams(tmp_path):
    return [make_stream(tmp_path / "a", [5] * 60), make_stream(tmp_path / "b", [7] * 20, first_token=10_000)]


def training_rows(streams, weights, seq_len, seed):
    return TrainingRows(streams, Mixture([(0, weights)]), seq_len, seed)


def as_bytes(row):
    return {name: values.tobytes() for name, values in row.items()}


def test_every_epoch_shows_each_row_once_in_another_order(streams):
    num_rows = len(StreamRows(streams[0], 16, True))
    rows = training_rows(streams[:1], [1.0], 16, seed=3)
    firsts = [rows[i]["tokens"][0].item() for i in range(3 * num_rows)]
    epochs = [firsts[i : i + num_rows] for i in range(0, len(firsts), num_rows)]
    assert all(sorted(epoch) == [1 + 16 * i for i in range(num_rows)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other_seeds = [[training_rows(streams[:1], [1.0], 16, seed=seed)[i]["tokens"][0] for i in range(num_rows)] for seed in (2, 4)]
    assert all(order not in epochs for order in other_seeds)


def test_a_row_depends_on_seed_and_index_alone(streams):
    indices = [0, 7, 3, 10**12 + 1, 55, 7]
    weights = [1.0, 2.5]
    expected = [as_bytes(training_rows(streams, weights, 16, seed=5)[i]) for i in indices]
    reopened = training_rows([TokenStream(stream.path) for stream in streams], weights, 16, seed=5)
    assert [as_bytes(reopened[i]) for i in reversed(indices)] == expected[::-1]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(lambda i: as_bytes(reopened[i]), indices * 50))
    assert threaded == expected * 50
    pickled = pickle.loads(pickle.dumps(StreamRows(streams[0], 16, True)))
    assert as_bytes(pickled[2]) == as_bytes(StreamRows(streams[0], 16, True)[2])


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.1, 0.9], [3, 1], [1e-3, 7e-3], [20.0, 1.3]])
def test_sources_come_as_often_as_their_weights(streams, weights):
    rows = training_rows(streams, weights, 8, seed=0)
    is_second = np.array([rows[i]["tokens"][0] >= 10_000 for i in range(3000)])
    share = weights[1] / sum(weights)
    assert is_second.mean() == pytest.approx(share, abs=0.005)
    assert is_second[1500:].mean() == pytest.approx(share, abs=0.005)


def test_validation_rows_are_shared_evenly_and_capped(streams):
    def first_tokens(num_rows):
        sources = validation_rows(streams, 16, num_rows)
        return [rows[i]["tokens"][0].item() for rows in sources for i in range(len(rows))]

    assert Counter(token >= 10_000 for token in first_tokens(8)) == {False: 4, True: 4}
    assert len(first_tokens(10_000)) == len(set(first_tokens(10_000))) == 19 + 9
    assert Counter(token >= 10_000 for token in first_tokens(24)) == {False: 15, True: 9}
    assert first_tokens(8) == first_tokens(8)
    starts = [token for token in first_tokens(8) if token < 10_000]
    assert starts == [1, 1 + 4 * 16, 1 + 9 * 16, 1 + 14 * 16]


def test_a_validation_stream_shorter_than_a_row_is_padded(streams):
    (rows,) = validation_rows(streams[1:], 1000, 5)
    assert len(rows) == 1
    row = rows[0]
    assert row["loss_mask"].sum() == 140 - 20
    assert (row["segment_ids"] > 0).sum() == 139 and row["segment_ids"].max() == 20
    assert not row["loss_mask"][row["segment_ids"] == 0].any()


def test_a_sequence_longer_than_the_data_is_refused(streams):
    assert len(training_rows(streams[1:], [1.0], 139, seed=0)[0]["tokens"]) == 139
    with pytest.raises(UserError, match="train.seq_len 140 is longer than the data: .*b has 140 tokens.*possible is 139"):
        training_rows(streams, [1.0, 1.0], 140, seed=0)


def test_token_ids_outside_the_model_are_refused(streams):
    check_vocabulary(streams, 50_000)
    with pytest.raises(UserError, match=r"a has token ids up to 49999 but model.vocab_size is 49999: set it to at least 50000"):
        check_vocabulary(streams, 49_999)


def make_source(path, fingerprint="x"):
    make_stream(path / "train", [5] * 4, fingerprint=fingerprint)
    return str(path)


def test_sources_are_checked(tmp_path):
    source = make_source(tmp_path / "a")
    assert [stream.num_tokens for stream in open_streams(DataConfig({source: 2}), "train")] == [20]
    for sources, message in (
        ({}, "data.sources is empty"),
        ({str(tmp_path / "no"): 1.0}, "no does not exist"),
        ({source: 0.0}, "weight 0.0"),
        ({source: -1}, "weight -1"),
        ({source: float("nan")}, "weight nan"),
        ({source: float("inf")}, "weight inf"),
        ({source: "1"}, "weight '1'"),
        ({source: 1.0, make_source(tmp_path / "b", fingerprint="y"): 1.0}, "mixes tokenizers"),
    ):
        with pytest.raises(UserError, match=message):
            open_streams(DataConfig(sources), "train")
    with pytest.raises(UserError, match="validation does not exist"):
        open_streams(DataConfig({source: 1.0}), "validation")


def test_the_tokenizer_beside_the_data_is_found_and_another_refused(tmp_path):
    tokenizer = load_tokenizer("bytes")
    source = make_source(tmp_path / "a", fingerprint=tokenizer.fingerprint)
    tokenizer.save(tmp_path / "a" / "tokenizer")
    for name in ("", "bytes"):
        config = DataConfig({source: 1.0}, tokenizer=name)
        assert load_data_tokenizer(config, open_streams(config, "train")).vocab_size == 259
    other = [make_stream(tmp_path / "other", [5], fingerprint="other")]
    with pytest.raises(UserError, match="was not made with the tokenizer bytes"):
        load_data_tokenizer(DataConfig({source: 1.0}, tokenizer="bytes"), other)


@pytest.mark.parametrize(("lengths", "document_mask", "has_targets"), [([1], True, False), ([1, 1, 1], True, False), ([1, 1, 1], False, True),
                         ([1], False, False), ([1, 2], True, True)])  # fmt: skip
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_stream_without_a_token_to_predict(tmp_path, lengths, document_mask, has_targets, split):
    make_stream(tmp_path / "s" / split, lengths)
    config = DataConfig({str(tmp_path / "s"): 1.0}, document_mask=document_mask)
    if has_targets:
        open_streams(config, split)
    else:
        with pytest.raises(UserError, match="has no token to predict"):
            open_streams(config, split)


@pytest.mark.parametrize("name", ["run:2", "a,b", "a:1,b"])
def test_directories_with_colons_and_commas(tmp_path, monkeypatch, name):
    """What the command line reads otherwise is said how to write, and the remedy works."""
    monkeypatch.chdir(tmp_path)
    make_stream(tmp_path / name / "train", [4, 5])
    try:
        parse(DataConfig, {"sources": name}, "data")
        with pytest.raises(UserError) as error:
            open_streams(parse(DataConfig, {"sources": name}), "train")
        written = re.search(r'for the directory (.*) give --config.data.sources="(.*)"', str(error.value))
    except UserError:
        pytest.fail("the config itself is readable")
    if written:  # a weight inside a name cannot be told from another source's
        assert written[1] == name
        open_streams(parse(DataConfig, {"sources": written[2]}), "train")
    else:
        assert name == "a:1,b"


def test_a_fingerprint_is_of_the_content(tmp_path):
    stream = make_stream(tmp_path / "a", [30, 40, 50])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert TokenStream(tmp_path / "b").fingerprint == stream.fingerprint
    others = [make_stream(tmp_path / name, lengths, first) for name, lengths, first in (("c", [30, 41, 49], 1), ("d", [30, 40, 50], 2))]
    assert len({stream.fingerprint, *(other.fingerprint for other in others)}) == 3
    (tmp_path / "b" / "shard-00000.tokens").write_bytes((tmp_path / "d" / "shard-00000.tokens").read_bytes())  # in place, the header as it was
    assert TokenStream(tmp_path / "b").fingerprint != stream.fingerprint


@pytest.mark.parametrize(("field", "value"), [("shard_tokens", 5), ("shard_tokens", ["5"]), ("dtype", "float32"), ("vocab_size", None),
                         ("num_bytes", "9"), ("tokenizer", 1), ("shard_documents", {"0": 1}), ("tokenizer_fingerprint", [])])  # fmt: skip
def test_a_header_of_other_types(tmp_path, field, value):
    make_stream(tmp_path / "s", [5])
    header = json.loads((tmp_path / "s" / "stream.json").read_text())
    for damaged in ({**header, field: value}, {key: each for key, each in header.items() if key != field}):
        (tmp_path / "s" / "stream.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="stream.json is damaged .*: make one with python -m herd_jax.tokenize"):
            TokenStream(tmp_path / "s")
