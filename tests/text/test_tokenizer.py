"""Tokenizers: exact round trips, special tokens in text, known ids of the released Llama 3 tokenizer, errors."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import small_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, TEXTS

from herd_jax.errors import UserError
from herd_jax.text.protocol import PROBE
from herd_jax.text.sentencepiece_training import train_sentencepiece
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return small_tokenizers.make_all(tmp_path_factory.mktemp("tokenizers"))


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


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t▁<s>the🙂日")))
def test_bytes_of_tokens_are_those_of_the_text(made, text):
    for tokenizer in made.values():
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode(), tokenizer


@pytest.mark.parametrize("legacy", (True, False))
def test_bytes_of_tokens_with_byte_fallback(legacy, tmp_path):
    for tokenizer in (small_tokenizers.make_byte_fallback_huggingface(tmp_path, legacy), load_tokenizer(tmp_path / "llama2.model")):
        for text in (*TEXTS[:3], TEXTS[4], PROBE):  # before which there may be a space that is none of theirs
            num_bytes = sum(map(tokenizer.num_bytes, tokenizer.encode(text, bos=True, eos=True)))
            assert num_bytes - len(text.encode()) in (0, 1)


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
    assert (made["llama3"].vocab_size, made["llama3"].bos_id, made["llama3"].stop_ids) == (265 + 256, 265, (266, 273, 274))
    assert made["sentencepiece"].special_ids == {"<s>": 1, "</s>": 2, "<pad>": 3}
    hugging_face = made["huggingface"]
    assert (hugging_face.bos_id, hugging_face.eos_id, hugging_face.stop_ids) == (0, 1, (1, 3))
    assert hugging_face.pad_id is None  # named, but the same as the end token


def test_huggingface_from_file_equals_from_directory(made, tmp_path):
    made["huggingface"].save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == 1


@pytest.mark.parametrize("kind", KINDS)
def test_long_runs_do_not_hang(made, kind):
    text = " " * 400_000
    assert made[kind].decode(made[kind].encode(text)) == text


def test_stop_tokens_of_a_generation_config(made, tmp_path):
    made["huggingface"].save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert load_tokenizer(tmp_path).stop_ids == (1, 3, 7)
    load_tokenizer(tmp_path).save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").stop_ids == (1, 3, 7)


@pytest.mark.parametrize("kind", ("llama3", "sentencepiece", "huggingface"))
@pytest.mark.parametrize("form", ("file", "text", "list"))
def test_chat_template_stays_with_its_tokenizer(made, kind, form, tmp_path):
    made[kind].save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    template = "{{ messages }} ü"
    named = [{"name": "other", "template": "no"}, {"name": "default", "template": template}]
    config = {"eos_token": "<|custom_end|>", "chat_template": template if form == "text" else named}
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(tmp_path).save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").chat_template == template


def test_stop_tokens_that_a_file_forgets_to_call_special(made, tmp_path):
    made["huggingface"].save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] == "<|im_start|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_ids == made["huggingface"].special_ids
    assert not {0, 1, 2, 3} & set(tokenizer.encode("".join(tokenizer.special_ids)))


@pytest.mark.parametrize("legacy", (True, False))
def test_spaces_before_text_as_the_file_says(legacy, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = small_tokenizers.make_byte_fallback_huggingface(tmp_path, legacy)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a<|im_end|>x", "<|im_end|> x", "<|im_end|>\n", "a</s></s>lead", "<|im_end|>"):
        assert tokenizer.encode(text, allow_special=True) == peer.encode(text).ids
    assert tokenizer.decode(tokenizer.encode("a") + tokenizer.encode_continuation("b c")) == "ab c"


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
        with pytest.raises(UserError, match="is damaged"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind,module", [("llama3", "tiktoken"), ("huggingface", "tokenizers")])
def test_missing_library_names_the_pip_command(made, kind, module, tmp_path, monkeypatch):
    made[kind].save(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'herd-jax\[tokenizers\]'"):
        load_tokenizer(tmp_path)


def test_saving_leaves_alone_what_is_there_and_names_what_cannot_be(made, tmp_path):
    made["huggingface"].save(tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()}
    made["huggingface"].save(tmp_path / "copy")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the tokenizer to .*file/below"):
        made["huggingface"].save(tmp_path / "file" / "below")


def test_state_saved_in_a_file_is_not_part_of_the_tokenizer(made, tmp_path):
    """A tokenizer.json keeps how texts were cut and filled up when it was saved, and the dropout of its training."""
    text = "the cat in the hat " * 40
    tokenizers = pytest.importorskip("tokenizers")
    made["huggingface"].save(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_truncation(16)
    saved.enable_padding(length=64, pad_token="<|custom_end|>", pad_id=1)
    saved.model.dropout = 0.5
    saved.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for of in (text, "hi", PROBE):
        assert tokenizer.encode(of) == made["huggingface"].encode(of)
    tokenizer.save(tmp_path / "copy")
    assert len(tokenizers.Tokenizer.from_file(str(tmp_path / "copy" / "tokenizer.json")).encode("hi").ids) < 8
    assert tokenizer.fingerprint == made["huggingface"].fingerprint


@pytest.mark.parametrize("place", ["added_tokens_decoder", "added_tokens.json"])
@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_tokens_added_outside_the_main_file(made, kind, place, tmp_path):
    made[kind].save(tmp_path)
    size = made[kind].vocab_size
    config = {**json.loads((tmp_path / "tokenizer_config.json").read_text()), "eos_token": "<|turn|>"} if kind == "huggingface" else {}
    if place == "added_tokens_decoder":
        added = {str(size): {"content": "<|turn|>", "special": True}, str(size + 1): {"content": "<tool>", "special": False}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added}))
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size + 1, "<|turn|>": size}))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": [{"content": "<|turn|>"}]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 2 and tokenizer.special_ids["<|turn|>"] == size
    assert kind == "sentencepiece" or size in tokenizer.stop_ids
    text = "the cat <tool>in  the hat<tool> <|turn|>"
    ids = tokenizer.encode(text)
    assert ids.count(size + 1) == 2 and size not in ids and tokenizer.decode(ids) == text
    assert sum(map(tokenizer.num_bytes, ids)) == len(text.encode())
    with_special = tokenizer.encode(text, allow_special=True)
    assert with_special[-1] == size and tokenizer.decode(with_special) == text.removesuffix("<|turn|>")
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode(text, allow_special=True) == with_special


def test_stop_tokens_that_chatml_adds_to_sentencepiece(made, tmp_path):
    made["sentencepiece"].save(tmp_path)
    size = made["sentencepiece"].vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size, "<|im_end|>": size + 1}))
    tokenizer = load_tokenizer(tmp_path)
    assert size + 1 in tokenizer.stop_ids
    assert tokenizer.encode("a<|im_end|>", allow_special=True)[-1] == size + 1


def test_files_that_a_library_cannot_read_are_named_with_its_reason(made, tmp_path):
    made["huggingface"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"BPE"', '"OfTomorrow"'))
    with pytest.raises(UserError, match="cannot be read as a Hugging Face tokenizer.json .*: it or a file beside it is damaged, or made for a newer"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"aGk= 0\nbroken\n")
    with pytest.raises(UserError, match="x.model cannot be read as a tiktoken rank file"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "y.model").write_bytes(b"\x0a\xff")
    with pytest.raises(UserError, match="y.model cannot be read as a SentencePiece model"):
        load_tokenizer(tmp_path / "y.model")


def test_added_tokens_of_other_ids_are_refused(made, tmp_path):
    made["huggingface"].save(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|turn|>": 9000}))
    with pytest.raises(UserError, match="<.turn.> is listed with the id 9000 .* gets 300: they do not belong together"):
        load_tokenizer(tmp_path)


def test_special_ids_that_only_the_config_of_the_model_has(made, tmp_path):
    made["huggingface"].save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [1, 7], "pad_token_id": 9}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_ids == (1, 3, 7)
    assert tokenizer.generation_config == {"bos_token_id": 0, "eos_token_id": [1, 3, 7], "pad_token_id": 9}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5, "top_p": 0.5}')  # which says it for generation
    assert load_tokenizer(tmp_path).stop_ids == (1, 3, 5)
    load_tokenizer(tmp_path).save(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == {"eos_token_id": 5, "top_p": 0.5, "pad_token_id": 9}
