"""Token streams: reading across shards against plain arrays, refusal of anything not whole."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.data.streams import StreamWriter, TokenStream
from herd_jax.errors import UserError


def write(path, parts, vocab_size=1000, **settings):
    """`parts` is a list of lists of documents; each part is appended at once."""
    with StreamWriter(path, vocab_size, **settings) as writer:
        for documents in parts:
            tokens = np.concatenate([*documents, np.empty(0, int)]).astype(np.int64)
            writer.append(tokens, np.array([len(document) for document in documents], np.int64), num_bytes=len(tokens))
    return path


@settings(deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(1, 7), max_size=4), min_size=1, max_size=6).filter(lambda parts: any(map(any, parts))),
    shard_tokens=st.integers(1, 12),
    vocab_size=st.sampled_from([1000, 2**16, 2**16 + 1, 128_256]),
)
def test_any_range_across_shards(tmp_path_factory, parts, shard_tokens, vocab_size):
    rng = np.random.default_rng(0)
    parts = [[rng.integers(0, vocab_size, length) for length in lengths] for lengths in parts]
    stream = TokenStream(write(tmp_path_factory.mktemp("streams") / "s", parts, vocab_size, shard_tokens=shard_tokens))
    documents = [document for part in parts for document in part]
    tokens, ends = np.concatenate(documents), np.cumsum([len(document) for document in documents])
    assert (stream.num_tokens, stream.num_documents, stream.num_bytes) == (len(tokens), len(documents), len(tokens))
    for start in range(len(tokens) + 1):
        for stop in range(start, len(tokens) + 1):
            read = stream.read(start, stop)
            assert read.dtype == np.int32
            np.testing.assert_array_equal(read, tokens[start:stop])
            np.testing.assert_array_equal(stream.document_ends(start, stop), ends[(ends > start) & (ends <= stop)])


def test_the_smallest_type_that_fits_is_stored(tmp_path):
    for vocab_size, size in ((2**16, 2), (2**16 + 1, 4)):
        path = write(tmp_path / str(vocab_size), [[[1, 2, vocab_size - 1]]], vocab_size)
        assert (path / "shard-00000.tokens").stat().st_size == 3 * size
        assert TokenStream(path).read(2, 3) == vocab_size - 1


def test_reading_does_not_share_memory_with_the_file(tmp_path):
    stream = TokenStream(write(tmp_path / "s", [[[1, 2, 3]]]))
    stream.read(0, 3)[:] = 0
    np.testing.assert_array_equal(stream.read(0, 3), [1, 2, 3])


def test_a_stream_can_be_pickled(tmp_path):
    stream = TokenStream(write(tmp_path / "s", [[[1, 2, 3]]]))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(stream)).read(1, 3), [2, 3])


def test_an_interrupted_writer_leaves_nothing_readable(tmp_path):
    with pytest.raises(KeyboardInterrupt), StreamWriter(tmp_path / "s", 10) as writer:
        writer.append(np.array([1, 2]), np.array([2]), 1)
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="has no stream.json"):
        TokenStream(tmp_path / "s")


def test_what_is_not_a_whole_stream_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        TokenStream(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is empty"):
        TokenStream(write(tmp_path / "empty", [[]]))
    path = write(tmp_path / "s", [[[1, 2, 3], [4, 5]]])
    for name in ("shard-00000.tokens", "shard-00000.ends"):
        content = (path / name).read_bytes()
        for damaged in (content[:-1], content + b"\0"):
            (path / name).write_bytes(damaged)
            with pytest.raises(UserError, match=f"{name} has {len(damaged)} bytes where stream.json says {len(content)}"):
                TokenStream(path)
        (path / name).unlink()
        with pytest.raises(UserError, match=f"{name} has 0 bytes"):
            TokenStream(path)
        (path / name).write_bytes(content)
    for header in ("", "[]", json.dumps({"format": "other"})):
        (path / "stream.json").write_text(header)
        with pytest.raises(UserError, match="stream.json"):
            TokenStream(path)
