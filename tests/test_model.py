"""The Python API as a user calls it: load, score, generate, chat, save, on one device and on meshes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import herd_jax
from herd_jax.errors import UserError
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.model import Model
from herd_jax.models.llama import Llama
from herd_jax.text.protocol import TEMPLATE_FILE
from herd_jax.text.tokenizer import ByteTokenizer, load_tokenizer

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=261, init_std=0.4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random model of bytes, saved in our format."""
    steps = tiny.make_steps(config=CONFIG)
    params = steps.plan.init(0).params
    directory = tmp_path_factory.mktemp("model") / "herd"
    model = Model.of(Llama.make(CONFIG, "blockwise"), steps.layout, params, load_tokenizer("bytes"), 64, jnp.float32)
    model.save(directory)
    return directory, tiny.canonical_params(steps)


def plain(params, ids):
    rows = {"tokens": np.asarray(ids)[None], "segment_ids": np.ones((1, len(ids)), np.int32), "positions": np.arange(len(ids))[None]}
    return np.asarray(tiny.plain_logits(params, rows, CONFIG)[0])


def greedy(params, ids, num_tokens):
    ids = list(ids)
    for _ in range(num_tokens):
        ids.append(int(plain(params, ids)[-1].argmax()))
    return ids


@pytest.fixture(scope="module")
def model(saved):
    return herd_jax.load(saved[0])


def test_logits_and_loss(saved, model):
    ids = np.random.default_rng(0).integers(0, 256, (2, 13))
    np.testing.assert_allclose(model.logits(ids), np.stack([plain(saved[1], row) for row in ids]), atol=1e-4)
    texts = ["a text of bytes", "a text as long as two or three of the others", "ünïcödé", "x"]
    for text, loss in zip(texts, model.loss(texts), strict=True):
        ids = model.tokenizer.encode(text, bos=True)
        log_p = jax.nn.log_softmax(plain(saved[1], ids))
        nats = -sum(float(log_p[i, token]) for i, token in enumerate(ids[1:]))
        assert loss.nats_per_token == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
        assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_generate_is_greedy_decoding_whatever_stands_beside(saved, model):
    prompts = ["abc", "a longer prompt"]
    found = model.generate(prompts, max_new_tokens=8)
    for prompt, text in zip(prompts, found, strict=True):
        ids = model.tokenizer.encode(prompt, bos=True)
        new = greedy(saved[1], ids, 8)[len(ids) :]
        stops = [i for i, token in enumerate(new) if token in model.tokenizer.stop_ids]
        assert text == model.tokenizer.decode(new[: stops[0] if stops else None])
    assert model.generate(["abc"], max_new_tokens=8) == found[:1]
    assert "".join(model.stream("abc", max_new_tokens=8)) == found[0]


def test_seeds_and_stops(model):
    draw = lambda seed: model.generate(["abc"], max_new_tokens=12, temperature=1.0, top_p=0.9, seed=seed)[0]
    assert draw(0) == draw(0) and draw(0) != draw(1)
    text = model.generate(["abc"], max_new_tokens=12)[0]
    stop = text[3:5]
    assert model.generate(["abc"], max_new_tokens=12, stop=[stop])[0] == text[: text.index(stop)]
    assert "".join(model.stream("abc", max_new_tokens=12, stop=[stop])) == text[: text.index(stop)]


def test_chat_answers_the_rendered_dialog(saved, model):
    template = b"{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    chatting = dataclasses.replace(model, tokenizer=ByteTokenizer({TEMPLATE_FILE: template}))
    ids = list(b"[user]hi[assistant]")
    new = greedy(saved[1], ids, 6)[len(ids) :]
    stops = [i for i, token in enumerate(new) if token in model.tokenizer.stop_ids]
    assert chatting.chat([{"role": "user", "content": "hi"}], max_new_tokens=6) == model.tokenizer.decode(new[: stops[0] if stops else None])


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2, 1), pytest.param(MeshConfig(2, 1, 1, 4), marks=pytest.mark.slow)])
def test_inside_a_mesh(saved, model, mesh):
    other = herd_jax.load(saved[0], mesh=make_mesh(mesh), dtype="float32")
    ids = np.random.default_rng(0).integers(0, 256, (2, 13))
    np.testing.assert_allclose(other.logits(ids), model.logits(ids), atol=1e-4)
    assert other.generate(["abc", "de"], max_new_tokens=6) == model.generate(["abc", "de"], max_new_tokens=6)
    texts = ["some text", "another, of more than sixteen bytes", "three"]
    np.testing.assert_allclose(other.loss(texts), model.loss(texts), rtol=1e-5)


@pytest.mark.parametrize("format", ["herd", "huggingface"])
def test_saved_and_loaded_again(saved, model, tmp_path, format):
    model.save(tmp_path / "copy", format=format)
    again = herd_jax.load(tmp_path / "copy", mesh=make_mesh(MeshConfig(pp=2, dp=1), jax.devices()[:2]))
    ids = np.arange(20)[None]
    assert again.config == model.config
    np.testing.assert_allclose(again.logits(ids), model.logits(ids), atol=1e-5)
    with pytest.raises(UserError, match="exists"):
        model.save(tmp_path / "copy", format=format)


class _WithoutBegin(ByteTokenizer):
    adds_bos = False


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: model.generate("abc"), "list of strings"),
        (lambda model: model.generate(["x" * 100]), "the prompt is 100 tokens long: the model's context holds 64"),
        (lambda model: model.generate(["abc"], max_new_tokens=0), "max_new_tokens is 0: it must be a whole number, 1 or more"),
        (lambda model: model.generate(["abc"], top_p=0.0), "top_p is 0.0: it must be a number in"),
        (lambda model: model.generate(["abc"], max_new_tokens=2.0), "max_new_tokens is 2.0: it must be a whole number"),
        (lambda model: model.generate(["abc"], max_new_tokens=True), "max_new_tokens is True"),
        (lambda model: model.generate(["abc"], temperature="0.7"), "temperature is '0.7': it must be a number, 0 or more"),
        (lambda model: model.generate(["abc"], temperature=float("nan")), "temperature is nan"),
        (lambda model: model.generate(["abc"], seed=None), "seed is None: it must be a whole number from 0 to 2.64 - 1"),
        (lambda model: model.generate(["abc"], seed=1.5), "seed is 1.5"),
        (lambda model: model.generate(["abc"], seed=-1), "seed is -1"),
        (lambda model: model.generate(["abc"], stop=[""]), "stop has an empty string in it"),
        (lambda model: model.generate(["a\udce4"]), "prompts has 'a.*' in it, which is no text in UTF-8"),
        (lambda model: next(model.stream(7)), "prompt is of type int: it must be a string"),
        (lambda model: model.complete([[1, 900]], 3), "a prompt has token ids for which the model has no embedding"),
        (lambda model: model.logits([[1, 2], [3]]), "token_ids has rows of different lengths"),
        (lambda model: model.logits([[1, 261]]), "between 0 and 260"),
        (lambda model: model.logits([1, 2]), "shape"),
        (lambda model: model.generate([""]), "the prompt is empty and the tokenizer has no token to begin with"),
        (lambda model: model.loss("abc"), "texts must be a list of strings"),
        (lambda model: model.loss(["fine", "x"]), "the text 'x' is one token"),
        (lambda model: model.loss(["fine", "x" * 70]), "context holds 64"),
        (lambda model: model.save("nowhere", format="onnx"), "onnx"),
        (lambda model: model.chat([{"role": "user", "content": "hello"}]), "chat"),
        (lambda model: herd_jax.load("/nowhere/at/all"), "does not exist"),
        (lambda model: herd_jax.load(".", dtype="float8"), "dtype is 'float8'"),
    ],
)
def test_bad_input_is_one_sentence(model, call, message):
    model = dataclasses.replace(model, tokenizer=_WithoutBegin({}))
    with pytest.raises(UserError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_large_seeds_and_small_temperatures(model):
    draw = lambda seed: model.generate(["abc"], max_new_tokens=12, temperature=1.0, seed=seed)[0]
    assert draw(2**31) != draw(2**31 + 1) != draw(2**63) and draw(np.int64(7)) == draw(7)
    greedy = model.generate(["abc"], max_new_tokens=12)
    for temperature in (1e-38, 1e-300, np.float32(1e-6)):
        assert model.generate(["abc"], max_new_tokens=12, temperature=temperature) == greedy


def test_weights_that_are_not_finite_give_no_answer(saved):
    model = herd_jax.load(saved[0])
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), model.params)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="the model's logits are not finite numbers, so there is no answer"):
            model.with_params(broken).generate(["abc"], temperature=temperature)


def test_ids_beyond_the_tokenizer_are_never_drawn(saved, model):
    """The model has 261 rows, the tokenizer 259 ids."""
    output = model.params["ends"]["head"]["output"]
    eager = {**model.params, "ends": {**model.params["ends"], "head": {**model.params["ends"]["head"], "output": output.at[:, 260].mul(100.0)}}}
    eager = model.with_params(eager)
    for temperature in (0.0, 1.0):
        assert eager.generate(["abc", "b", "cd"], max_new_tokens=20, temperature=temperature)


def test_a_tokenizer_that_loses_text_gives_no_bits_per_byte(model):
    class Lossy(ByteTokenizer):
        def _encode_text(self, text):
            return super()._encode_text(text)[:4]

    with pytest.raises(UserError, match="turned a text of 9 bytes into tokens of 4: its files are damaged"):
        dataclasses.replace(model, tokenizer=Lossy({})).loss(["a longer."])


def test_generation_ends_where_the_context_does(saved):
    model = dataclasses.replace(herd_jax.load(saved[0]), context_length=20)
    (text,) = model.generate(["x" * 10], max_new_tokens=50, stop=[])
    assert len(text.encode()) <= 4 * 10  # ten tokens of room at most
