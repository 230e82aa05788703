"""Tokenizers: exact round trips, special tokens in text, known ids of the released Llama 3 tokenizer, errors."""

import base64
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.errors import UserError
from herd_jax.text.sentencepiece_training import train_sentencepiece
from herd_jax.text.tokenizer import PROBE, Tokenizer, load_tokenizer

TEXTS = [
    "def f(x):\n\treturn x  +  1\n\n\n",
    "  leading and trailing  ",
    "a\r\nb\x00c\u2028d\u00a0e\u3000f",
    "▁ is not a space ▁▁",
    "日本語 привет हिन्दी 🙂 e\u0301",
    "<s></s><0x0A><|begin_of_text|><|eot_id|><pad>",
    "",
    " ",
    "\n",
]
KINDS = ("bytes", "llama3", "sentencepiece", "huggingface")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A small tokenizer of each kind, made here."""
    path = tmp_path_factory.mktemp("tokenizers")
    merges = [b"th", b"he", b"the", b"in", b" a", b"  "]
    ranks = [bytes([byte]) for byte in range(256)] + merges
    rank_file = path / "llama3.model"
    rank_file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks)))
    train_sentencepiece([PROBE, *TEXTS] * 20, 400, path / "sentencepiece.model")
    _write_huggingface(path / "hf")
    paths = ("bytes", rank_file, path / "sentencepiece.model", path / "hf")
    return dict(zip(KINDS, map(load_tokenizer, paths), strict=True))


def _write_huggingface(directory: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|custom_end|>", "<|eot_id|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    # This is how released files put a begin token before every text: with bos=True it must not come twice.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": {"content": "<|custom_end|>"}, "pad_token": "<|custom_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(made, kind):
    tokenizer = made[kind]
    for text in (*TEXTS, PROBE):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t▁<s>")))
def test_round_trip_of_any_text(made, text):
    for tokenizer in made.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_parsed_only_when_allowed(made, kind):
    tokenizer = made[kind]
    special = set(tokenizer.special_ids.values())
    for name, special_id in tokenizer.special_ids.items():
        assert not special & set(tokenizer.encode(f"a {name} b"))
        ids = tokenizer.encode(f"a {name} b", allow_special=True)
        assert [i for i in ids if i in special] == [special_id]
        assert tokenizer.decode(ids) == "a  b"


@pytest.mark.parametrize("kind", KINDS)
def test_begin_and_end_are_added_once(made, kind):
    tokenizer = made[kind]
    names = {i: name for name, i in tokenizer.special_ids.items()}
    plain = tokenizer.encode("hello")
    framed = [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.encode("hello", bos=True, eos=True) == framed
    text = f"{names[tokenizer.bos_id]}hello{names[tokenizer.eos_id]}"
    assert tokenizer.encode(text, bos=True, eos=True, allow_special=True) == framed


@pytest.mark.parametrize("kind", KINDS)
def test_saved_directory_loads_the_same_tokenizer(made, kind, tmp_path):
    tokenizer = made[kind]
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    for field in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids", "special_ids", "fingerprint"):
        assert getattr(copy, field) == getattr(tokenizer, field)
    assert copy.encode(PROBE) == tokenizer.encode(PROBE)


def test_fingerprints_differ_between_tokenizers(made):
    assert len({tokenizer.fingerprint for tokenizer in made.values()}) == len(made)


def test_special_ids_of_each_kind(made):
    assert (made["bytes"].vocab_size, made["bytes"].bos_id, made["bytes"].eos_id, made["bytes"].pad_id) == (259, 256, 257, 258)
    assert (made["llama3"].vocab_size, made["llama3"].bos_id, made["llama3"].stop_ids) == (262 + 256, 262, (263, 270, 271))
    assert made["sentencepiece"].special_ids == {"<s>": 1, "</s>": 2, "<pad>": 3}
    hugging_face = made["huggingface"]
    assert (hugging_face.bos_id, hugging_face.eos_id, hugging_face.stop_ids) == (0, 1, (1, 2))
    assert hugging_face.pad_id is None  # named, but the same as the end token


def test_huggingface_from_file_equals_from_directory(made, tmp_path):
    made["huggingface"].save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == 1


def test_released_llama3_tokenizer():
    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        pytest.skip("needs the package llama-models")
    from llama_models.llama3.tokenizer import Tokenizer as Reference

    reference = Reference.get_instance()
    tokenizer = load_tokenizer(Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model")
    ids = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert tokenizer.encode("This is a test sentence.", bos=True, eos=True) == ids
    message = "<|start_header_id|>user<|end_header_id|>\n\nThis is a test sentence.<|eot_id|>"
    message_ids = [128006, 882, 128007, 271, *ids[1:-1], 128009]
    assert tokenizer.encode(message, allow_special=True) == message_ids
    assert 128009 not in tokenizer.encode("<|eot_id|>")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.stop_ids) == (128256, 128004, (128001, 128008, 128009))
    assert tokenizer.special_ids == reference.special_tokens
    # Beyond every limit at which texts are cut: runs of letters, runs of spaces, the length of the whole.
    long = "x" * 60_000 + " " * 55_000 + "yes no\n" * 60_000
    for text in (*TEXTS, PROBE, long):
        assert tokenizer.encode(text) == reference.encode(text, bos=False, eos=False)
    assert tokenizer.decode(tokenizer.encode(long)) == long


def test_sentencepiece_training_is_deterministic_and_merges(made, tmp_path):
    train_sentencepiece([PROBE, *TEXTS] * 20, 400, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == made["sentencepiece"]._files["tokenizer.model"]
    assert len(made["sentencepiece"].encode(PROBE)) < len(PROBE)


@pytest.mark.parametrize("texts,vocab_size", [([], 300), (["short"], 300), (["a long text with words " * 50], 100)])
def test_impossible_vocabulary_is_refused(texts, vocab_size, tmp_path):
    with pytest.raises(UserError, match=f"no tokenizer of {vocab_size} tokens can be trained"):
        train_sentencepiece(texts, vocab_size, tmp_path / "never.model")
    assert not list(tmp_path.iterdir())


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds none of"):
        load_tokenizer(tmp_path)
    for content in (b"", b"some text", b"{}", b"{broken", b"\x00\xff" * 99, b"IQ== 0\nIg=="):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="or is damaged"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind,module", [("llama3", "tiktoken"), ("huggingface", "tokenizers")])
def test_missing_library_names_the_pip_command(made, kind, module, tmp_path, monkeypatch):
    made[kind].save(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'herd-jax\[tokenizers\]'"):
        load_tokenizer(tmp_path)
