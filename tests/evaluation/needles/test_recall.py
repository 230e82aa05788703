"""Needles: prompts and scores worked out by hand, greedy decoding against one forward on meshes, and the command."""

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax import evaluate
from herd_jax.data.streams import StreamWriter, TokenStream
from herd_jax.errors import UserError
from herd_jax.evaluation.evaluation import Evaluation
from herd_jax.evaluation.needles.haystack import TEMPLATES, Needle, PromptMaker, Template, draw_needles, read_haystack, text_ids
from herd_jax.evaluation.needles.recall import multi_lengths, multi_needle_recall, needle_recall, share_found
from herd_jax.evaluation.needles.report import evaluate_needle
from herd_jax.inference.engine.requests import Request
from herd_jax.inference.sampling import Sampling
from herd_jax.model import Model
from herd_jax.models.llama import Llama
from herd_jax.text import chat
from herd_jax.text.protocol import TEMPLATE_FILE
from herd_jax.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer({})
HAYSTACK = np.frombuffer(b"abcdefghij", np.uint8).astype(np.int32)
SHORT = Template(("K", "L", "M", "N"), (("1", "2"), ("3", "4")), "in:", "<{key}={value}>", ("?{keys}", "?{keys}"), ("{keys}=", "{keys}="))


def decoded(ids):
    assert ids[0] == BYTES.bos_id
    return BYTES.decode(ids)


def test_a_prompt_by_hand():
    """The haystack begins anew at its end; a needle at depth 0.5 stands before the 6th of 10 characters, at 0 before all, at 1 behind all."""
    maker, size = PromptMaker(SHORT, BYTES, HAYSTACK), 1 + len("in:" + "<K=13>" + "?KK=") + 10
    for depth, text in ((0.5, "defgh<K=13>ijabc"), (0.0, "<K=13>defghijabc"), (1.0, "defghijabc<K=13>"), (0.26, "def<K=13>ghijabc")):
        needle = Needle(depth, "K", "13")
        assert decoded(maker.prompt([needle], [needle], size, start=3)) == f"in:{text}?KK="
    needles = [Needle(0.9, "K", "13"), Needle(0.2, "L", "24"), Needle(0.9, "M", "23")]
    text = "in:ab<L=24>cdefghi<K=13><M=23>j?K and LK and L="
    assert decoded(maker.prompt(needles, needles[:2], 1 + len(text), start=0)) == text


def test_sizes_are_exact_for_every_template():
    for template in TEMPLATES.values():
        maker, rng = PromptMaker(template, BYTES, HAYSTACK), np.random.default_rng(0)
        needles = draw_needles(template, [0.0, 0.3, 0.7, 1.0], rng)
        for size in (700, 1001):
            ids = maker.prompt(needles, needles[:1], size, 5)
            assert len(ids) == size and all(needle.value in BYTES.decode(ids) for needle in needles)


def test_keys_differ_and_repeat_with_the_seed():
    draw = lambda seed: draw_needles(SHORT, [0.1, 0.2, 0.3, 0.4], np.random.default_rng(seed))
    assert sorted(needle.key for needle in draw(0)) == ["K", "L", "M", "N"]
    assert draw(0) == draw(0) and draw(0) != draw(1)


def test_in_a_dialog():
    template = b"{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = ByteTokenizer({TEMPLATE_FILE: template})
    needle = Needle(1.0, "K", "13")
    ids = PromptMaker(SHORT, tokenizer, HAYSTACK, in_dialog=True).prompt([needle], [needle], 50, 0)
    said = tokenizer.decode(ids).removeprefix("[user]").removesuffix(";[assistant]K=")
    assert said.startswith("in:abc") and said.endswith("<K=13>?K")
    assert ids == [*chat.render([{"role": "user", "content": said}], tokenizer, add_assistant_header=True).ids, *b"K="]
    with pytest.raises(UserError, match="no chat template"):
        PromptMaker(SHORT, BYTES, HAYSTACK, in_dialog=True).prompt([needle], [needle], 50, 0)


@pytest.fixture(scope="module")
def models():
    """A random model of bytes, on one device and on meshes; `depth 1` of the test's greedy decoding is not chance."""
    config = dataclasses.replace(tiny.CONFIG, vocab_size=261, init_std=0.4)

    def make(**axes):
        steps = tiny.make_steps(**axes, config=config)
        return Model.of(Llama.make(config, "blockwise"), steps.layout, steps.plan.init(0).params, BYTES, None, jnp.float32)

    return [make(**axes) for axes in ({}, {"cp": 2, "tp": 2, "pp": 2}, {"cp": 4, "dp": 2})]


def test_one_forward_says_what_greedy_decoding_does(models):
    """Answers that greedy decoding gives, and the same with one id changed, at prompts of several lengths."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, size).tolist() for size in (9, 30, 30, 47, 5)]
    engine = models[0].engine(max_sequences=4, max_length=64, page_size=16, chunk_tokens=16, strict=True)
    given = {answer.ticket: answer.ids for answer in engine.generate([Request(prompt, Sampling(3, ignore_eos=True)) for prompt in prompts])}
    answers = [list(given[i]) for i in range(len(prompts))]
    for at in range(3):
        wrong = [[(token + (i == at)) % 261 for i, token in enumerate(answer)] for answer in answers]
        for model in models:
            found = model.continues_with(prompts * 2, answers + wrong)
            np.testing.assert_array_equal(found, [True] * 5 + [False] * 5)


@dataclasses.dataclass
class Reader:
    """Stands for a model: reads the prompt as text, and finds what lies in its last `reach` tokens."""

    reach: int = 10**6
    answer: str = ""
    cp: int = 1
    context_length: int | None = None
    tokenizer: ByteTokenizer = BYTES

    @property
    def layout(self):
        return types.SimpleNamespace(mesh=types.SimpleNamespace(shape={"cp": self.cp}))

    text_tokenizer = Model.text_tokenizer

    def continues_with(self, prompts, answers):
        self.sizes = {len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)}
        return np.array([BYTES.decode(answer) in BYTES.decode(prompt[-self.reach :]) for prompt, answer in zip(prompts, answers, strict=True)])

    def complete(self, prompts, max_new_tokens):
        self.sizes = {len(prompt) + max_new_tokens for prompt in prompts}
        return [self.answer or BYTES.decode(prompt[-self.reach :]) for prompt in prompts]


def test_recall_by_length_and_depth():
    """A reader of the last 700 tokens finds all in texts of 400 and only the later half in those of 1,300 or so (question: 100)."""
    reader = Reader(reach=700)
    result = needle_recall(reader, (400, 1300), (0.0, 0.25, 0.75, 1.0), 3, HAYSTACK)
    np.testing.assert_array_equal(result.recall, [[1, 1, 1, 1], [0, 0, 1, 1]])
    assert reader.sizes == {400, 1300} and result.worst == (1300, 0.0, 0.0)
    assert len(result.items) == 24 == len({item["id"] for item in result.items})
    assert [item["score"] for item in result.items if item["depth"] == 0.25] == [1] * 3 + [0] * 3
    again = needle_recall(reader, (1300,), (0.25,), 3, HAYSTACK)
    assert {item["id"] for item in again.items} <= {item["id"] for item in result.items}  # a cell does not depend on the others


@pytest.mark.parametrize("options", [{"cp": 1}, {"cp": 2}])
def test_multi_needle(options):
    """4 hidden, 2 asked for: of a reader of everything all are found, of one who sees half of the text less."""
    reader = Reader(**options)
    result = multi_needle_recall(reader, (800, 1200), 8, HAYSTACK)
    assert result.recall.tolist() == [1, 1] and reader.sizes == {1200}
    half = multi_needle_recall(Reader(reach=900, **options), (1500,), 8, HAYSTACK)
    assert 0 < half.recall[0] < 1 and {item["score"] for item in half.items} <= {0, 0.5, 1}
    assert all(len(item["depths"]) == 4 for item in half.items)
    assert multi_needle_recall(Reader(reach=1, **options), (800,), 2, HAYSTACK).recall[0] == 0


def test_share_found():
    assert share_found("They are 1234567 and 7654321.", [" 1234567", " 7654321"]) == 1
    assert share_found("7654321", [" 1234567", " 7654321"]) == 0.5
    assert share_found("I do not know", [" 1234567", " 7654321"]) == 0


def test_the_paper_s_lengths():
    lengths = multi_lengths(None)
    assert len(lengths) == 10 and lengths[0] == 2000 and lengths[-1] == 131_072
    assert set(np.diff(lengths)) <= {14_341, 14_342}
    assert multi_lengths(200_000) == lengths and multi_lengths(8192)[-1] == 8192 and len(set(multi_lengths(8192))) == 10


def test_what_is_refused():
    for reader, arguments, message in [
        (Reader(context_length=512), ((256, 1024), (0.5,), 1, HAYSTACK), "1024 tokens is beyond the model's context of 512"),
        (Reader(), ((400,), (1.5,), 1, HAYSTACK), "depths"),
        (Reader(), ((400,), (), 1, HAYSTACK), "depths"),
        (Reader(), ((100,), (0.5,), 1, HAYSTACK), "92 tokens, a length less that of the answer, have no room for the needles"),
        (Reader(), ((), (0.5,), 1, HAYSTACK), "lengths"),
        (Reader(), ((400,), (0.5,), 0, HAYSTACK), "samples 0"),
        (Reader(), ((400,), (0.5,), 1, HAYSTACK[:0]), "haystack is empty"),
        (Reader(), ((400, 700, 400), (0.5,), 1, HAYSTACK), "lengths has 400 twice"),
        (Reader(), ((400,), (0.5, 0, 0.0), 1, HAYSTACK), "depths has 0 twice"),
        (Reader(tokenizer=None), ((400,), (0.5,), 1, HAYSTACK), "no tokenizer"),
    ]:
        with pytest.raises(UserError, match=message):
            needle_recall(reader, *arguments)
    with pytest.raises(UserError, match="template 'word'"):
        needle_recall(Reader(), (400,), (0.5,), 1, HAYSTACK, template="word")


def test_haystacks(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert BYTES.decode(read_haystack([str(tmp_path)], BYTES)) == "one\n\ntwo"
    assert len(read_haystack((), BYTES)) > 100_000
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "c.txt").write_text(" \n")
    with pytest.raises(UserError, match="no text in it"):
        read_haystack([str(tmp_path / "empty")], BYTES)
    with StreamWriter(tmp_path / "stream", BYTES.vocab_size) as writer:
        writer.append(np.array([256, 97, 98, 257, 256, 99, 257]), np.array([4, 3]), 3)
    assert text_ids(TokenStream(tmp_path / "stream"), BYTES).tolist() == [97, 98, 99]


@pytest.mark.parametrize("multi", [False, True])
def test_the_command(models, tmp_path, capsys, multi, monkeypatch):
    model = dataclasses.replace(models[0], context_length=1200)
    model.save(tmp_path / "model")
    lengths = ["900", "1200"]
    arguments = ["needle", "--model", str(tmp_path / "model"), "--lengths", *lengths, "--samples", "2", "--output", str(tmp_path / "out")]
    command = lambda *arguments: (monkeypatch.setattr(sys, "argv", ["evaluate", *arguments]), evaluate.main())
    command(*arguments, *(["--multi", "--template", "record"] if multi else ["--depths", "0", "1"]))
    name = "multi-needle" if multi else "needle"
    record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert record["results"]["lengths"] == [900, 1200] and record["results"]["num_items"] == (4 if multi else 8)
    assert np.shape(record["results"]["recall"]) == ((2,) if multi else (2, 2))
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
    assert len((tmp_path / "out" / "items" / f"{name}.jsonl").read_text().splitlines()) == (4 if multi else 8)
    assert "mean recall" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command("needle", "--model", str(tmp_path / "model"), "--lengths", "5000")
    assert "beyond the model's context of 1200" in capsys.readouterr().err


def test_what_the_command_refuses_before_it_measures(models, tmp_path, monkeypatch):
    """Depths where they are drawn, an output that cannot be, and a model that is damaged: it would find no needle and nobody would know why."""
    model = dataclasses.replace(models[0], context_length=1200)
    model.save(tmp_path / "model")
    model.with_params(jax.tree.map(lambda leaf: leaf * jnp.nan, model.params)).save(tmp_path / "damaged")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Model, "continues_with", lambda *_: pytest.fail("it measures"))

    def ask(model="model", depths=(), multi=False, seed=0, output="out"):
        evaluation = Evaluation(str(tmp_path / model), tmp_path / output)
        evaluate_needle(evaluation, (400,), depths, (), multi, num_samples=1, template="sentence", in_dialog=False, seed=seed)

    for options, message in (
        ({"depths": (0.5,), "multi": True}, "--multi hides its needles at random depths: leave --depths out"),
        ({"seed": -1}, "--seed is -1"),
        ({"model": "damaged"}, "the model's outputs are not finite: its weights are damaged"),
        ({"output": "file"}, "file cannot be written .*: give an --output that can be"),
    ):
        with pytest.raises(UserError, match=message):
            ask(**options)
