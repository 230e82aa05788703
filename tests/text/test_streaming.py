"""Streaming decoding: the pieces are the whole, none is cut in a character or changed later."""

import random

import pytest
import small_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import TEXTS

from herd_jax.text.protocol import PROBE
from herd_jax.text.streaming import StreamingDecoder
from herd_jax.text.tokenizer import ByteTokenizer, Tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    path = tmp_path_factory.mktemp("tokenizers")
    (path / "legacy").mkdir()
    return {
        **small_tokenizers.make_all(path),
        "llama2": small_tokenizers.make_llama2_like(path),
        "byte fallback": small_tokenizers.make_byte_fallback_huggingface(path / "legacy", legacy=True),
    }


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamingDecoder(tokenizer)
    return [*map(decoder.push, ids), decoder.flush()]


def test_pieces_of_text(made):
    for tokenizer in made.values():
        for text in (*TEXTS, PROBE):
            ids = tokenizer.encode(text, bos=True, eos=True)
            pieces = stream(tokenizer, ids)
            assert "".join(pieces) == tokenizer.decode(ids)
            assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_pieces_of_any_ids(made, data):
    for tokenizer in made.values():
        broken = [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([i])]
        any_id = st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(broken) | st.sampled_from(tokenizer.encode("語🙂 a  \n"))
        ids = data.draw(st.lists(any_id, max_size=12))
        # The same holds for every continuation, so that what has been emitted is never changed.
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_comes_as_soon_as_it_is_whole(made):
    assert stream(made["bytes"], made["bytes"].encode("aé🙂b")) == ["a", "", "é", "", "", "", "🙂", "b", ""]
    # Here a byte more would change the characters before it, until something else than a byte comes.
    fallback = made["byte fallback"]
    ids = [*fallback.encode("a"), *(fallback._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode())]
    a = fallback._tokenizer.token_to_id("a")
    assert stream(fallback, [*ids, a]) == [*stream(fallback, ids[:-4])[:-1], "", "", "", "", "🙂a", ""]
    assert stream(made["bytes"], [0xF0, 0x9F]) == ["", "", "\ufffd"]


def test_a_special_token_inside_a_character_does_not_cut_it(made):
    for kind in ("bytes", "llama3", "sentencepiece", "byte fallback"):
        tokenizer = made[kind]
        first, *rest = tokenizer.encode("🜂")[-4:]
        ids = [*tokenizer.encode("a"), first, tokenizer.bos_id, *rest]
        assert tokenizer.decode(ids) == "".join(stream(tokenizer, ids)) == "a🜂"


def test_no_work_is_done_twice():
    """The tokens that are decoded grow with the length of the stream, also of one that is garbage."""
    decoded = 0

    class Counting(ByteTokenizer):
        def _decode_ids(self, ids):
            nonlocal decoded
            decoded += len(ids)
            return super()._decode_ids(ids)

    random.seed(0)
    for ids in ([0x80] * 20_000, random.choices(range(259), k=20_000), list(("語🙂 ab" * 2000).encode())):
        decoded = 0
        assert "".join(stream(Counting({}), ids)) == bytes(i for i in ids if i < 256).decode(errors="replace")
        assert decoded < 15 * len(ids)
