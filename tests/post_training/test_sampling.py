"""Rejection sampling: the set is a function of its keys, survives a kill, and what is chosen of it is what the scores say."""

import dataclasses
import json

import pytest
import small_tokenizers
from post_models import save_models

import herd_jax
from herd_jax.config import parse
from herd_jax.errors import UserError
from herd_jax.post_training import sampling
from herd_jax.post_training.sampling import SampleConfig, best_of, choose, read_rows, runs_of, sample
from herd_jax.post_training.verifiers import find_verifier


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("sampling")
    save_models(root, {"a": 0, "b": 1})
    save_models(root, {"reward": 2}, reward=True)
    prompts = [{"prompt": f"say {i}", "pattern": ".*[a-m].*"} for i in range(6)] + [{"prompt": "say 0"}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in prompts))
    return root


def config_of(base, workdir, **more):
    values = {
        "workdir": str(workdir), "policies": [str(base / "a"), str(base / "b")], "prompts": [str(base / "prompts.jsonl")], "num_samples": 4,
        "max_new_tokens": 8, "temperatures": [0.5, 1.0], "verifier": "pattern", "reward_model": str(base / "reward"),
        "engine": {"max_sequences": 4, "max_length": 128, "strict": True},
    }  # fmt: skip
    return parse(SampleConfig, values | more)


def rows_of(workdir, name=sampling.SAMPLES):
    return {(row["prompt"], row["k"]): row for row in read_rows(workdir / name)}


def test_the_answers_are_shared_out():
    config = SampleConfig("x", ("a", "b"), ("p",), 10, temperatures=(0.2, 1.0), system_prompts=("", "be brief"))
    runs = runs_of(config)
    assert [run.first for run in runs] == [0, *[run.stop for run in runs[:-1]]] and runs[-1].stop == 10
    assert sum(run.stop - run.first for run in runs if run.policy == 1) == 5 and {run.temperature for run in runs} == {0.2, 1.0}
    assert runs_of(dataclasses.replace(config, num_samples=3, policies=("a",)))[-1].stop == 3


def test_neighbours_are_one_request():
    assert sampling.spans([0, 1, 2, 5, 7, 8]) == [range(0, 3), range(5, 6), range(7, 9)] and sampling.spans([]) == []


def test_a_killed_set_is_completed_as_it_would_have_been(base, tmp_path, monkeypatch):
    lines = []
    figures = sample(config_of(base, tmp_path / "whole"), say=lines.append)
    whole = rows_of(tmp_path / "whole")
    assert len(whole) == 24 and figures["prompts"] == 6 and 0 <= figures["pass@1"] <= figures["pass@4"] <= 1  # a prompt that comes twice is one
    assert any("answers/s" in line and "tokens/s" in line for line in lines)
    assert {row["policy"] for row in whole.values() if row["k"] < 2} == {str(base / "a")}
    assert len({row["text"] for row in whole.values()}) > 12

    written = (tmp_path / "whole" / sampling.SAMPLES).read_bytes().splitlines(keepends=True)
    (tmp_path / "parts").mkdir()
    kept = [line for line in written if json.loads(line)["k"] % 2][::-1]
    (tmp_path / "parts" / sampling.SAMPLES).write_bytes(b"".join(kept) + written[0][:20])  # killed in the middle of a line
    sample(config_of(base, tmp_path / "parts", engine={"max_sequences": 3, "max_length": 128, "strict": True}), say=lines.append)
    assert rows_of(tmp_path / "parts") == whole
    for name in (sampling.SELECTED, sampling.PREFERENCES):
        ours, theirs = ([json.loads(line) for line in (tmp_path / run / name).read_text().splitlines()] for run in ("parts", "whole"))
        assert [row["messages" if "messages" in row else "chosen"] for row in ours] == [row["messages" if "messages" in row else "chosen"] for row in theirs]
    monkeypatch.setattr(sampling, "load", lambda *_: pytest.fail("nothing is missing"))
    assert sample(config_of(base, tmp_path / "parts"), say=lines.append) == pytest.approx(figures)
    with pytest.raises(UserError, match="begun with other values of temperatures, seed"):
        sample(config_of(base, tmp_path / "parts", seed=3, temperatures=[1.0]))
    monkeypatch.setattr(sampling, "content_of", lambda source: "of other weights")
    with pytest.raises(UserError, match="begun with other values of weights of the policies"):
        sample(config_of(base, tmp_path / "parts"))


def test_rewards_are_those_of_the_reward_model(base, tmp_path):
    config = config_of(base, tmp_path / "set", policies=[str(base / "a")], num_samples=2, system_prompts=["be brief"])
    sample(config, say=lambda _: None)
    model, samples = herd_jax.load(base / "reward"), rows_of(tmp_path / "set")
    prompts = {prompt.key: prompt for prompt in sampling.read_prompts(config.prompts)}
    for key, row in rows_of(tmp_path / "set", sampling.SCORES).items():
        ids = model.chat_ids([{"role": "system", "content": "be brief"}, {"role": "user", "content": prompts[key[0]].record["prompt"]}])
        assert row["reward"] == pytest.approx(float(model.rewards([ids], [samples[key]["ids"]])[0]), abs=1e-5)
        assert row["verified"] == float(any("a" <= letter <= "m" for letter in samples[key]["text"]))


def answer(k, verified, reward, text=None, ended=True):
    return {"k": k, "verified": verified, "reward": reward, "text": text or f"t{k}", "ended": ended, "policy": "p", "prompt": "key"}


def test_what_is_chosen(tmp_path):
    rows = [answer(0, 1, 0.1), answer(1, 0, 0.9), answer(2, 1, 0.5), answer(3, 1, 2.0, ended=False)]
    by = lambda choice: dataclasses.replace(SampleConfig("x", ("p",), ("q",), 4, verifier="exact", reward_model="r"), select=choice)
    assert [best_of(by(choice), rows)["k"] for choice in ("verifier", "reward", "both", "random")] == [0, 1, 2, 0]
    assert best_of(by("both"), [answer(0, 0, 1)]) is None and best_of(by("reward"), [answer(0, 0, 1, ended=False)]) is None
    (tmp_path / sampling.SAMPLES).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / sampling.SCORES).write_text("")
    prompt = sampling.Prompt("key", [sampling.Message("user", "q")], {})
    assert choose(by("both"), [prompt], tmp_path, lambda _: None)["pairs"] == 1
    (pair,) = read_rows(tmp_path / sampling.PREFERENCES)
    assert pair["chosen"][0]["content"] == "t2" and pair["rejected"][0]["content"] == "t1"  # the worst of those that are worse


@pytest.mark.parametrize(
    "name, record, right, wrong",
    [
        ("exact", {"answer": "7"}, " 7\n", "the answer is 7"),
        ("exact", {"answer": ["a", "b"]}, "b", "ab"),
        ("number", {"answer": "1,200"}, "3 + 4 is not it, but 1200.0", "1200 and 3"),
        ("pattern", {"pattern": r"[a-z]+ \d"}, "abc 5", "abc 55"),
        ("json", {"answer": {"a": [1]}}, '{"a": [1]}', '{"a": [1, 2]}'),
        ("json", {}, "[]", "{'a': 1}"),
        ("python", {"tests": "assert f(2) == 4"}, "Here:\n```python\ndef f(x):\n    return 2 * x\n```\nDone", "def f(x):\n    return x"),
        ("python", {"tests": "assert f(2) == 4"}, "def f(x): return 2 * x", "import os; print('passed'); os._exit(0)"),
    ],
)
def test_verifiers(name, record, right, wrong):
    verifier = find_verifier(name)
    assert (verifier(record, right), verifier(record, wrong)) == (1.0, 0.0)


def test_verifiers_that_raise_and_models_that_do_not_fit(base, tmp_path, monkeypatch):
    for name, match in (("guess", "there is no verifier 'guess'"), ("absent_module:f", "cannot be imported"), ("json:absent", "cannot be imported")):
        with pytest.raises(UserError, match=match):
            find_verifier(name)
    few = {"policies": [str(base / "a")], "num_samples": 2, "reward_model": ""}
    with pytest.raises(UserError, match="verifier exact raises for every answer .KeyError: 'answer'."):
        sample(config_of(base, tmp_path / "set", verifier="exact", **few), say=lambda _: None)
    raised, said = iter([True, *[False] * 99]), []

    def sometimes(record, text):
        if next(raised):
            raise ValueError("no")
        return 1.0

    monkeypatch.setattr(sampling, "find_verifier", lambda *_: sometimes)
    sample(config_of(base, tmp_path / "set", **few), say=said.append)
    assert any("raised for 1 of 12 answers, which count as wrong (most often ValueError: no)" in line for line in said)
    (base / "other").mkdir(exist_ok=True)
    tokenizer = small_tokenizers.make_all(base / "other")["bytes"]
    monkeypatch.setattr(type(herd_jax.load(base / "reward").text_tokenizer()), "fingerprint", property(lambda self: str(id(self))))
    with pytest.raises(UserError, match="has another tokenizer"):
        sampling._check_tokenizer(config_of(base, tmp_path / "set"), herd_jax.load(base / "reward"))
    assert tokenizer
    for wrong, match in (({"num_samples": 0}, "num_samples is 0"), ({"policies": []}, "each need one"), ({"select": "best"}, "select is 'best'"),
                         ({"select": "both", "reward_model": ""}, "there is no reward_model")):  # fmt: skip
        with pytest.raises(UserError, match=match):
            config_of(base, tmp_path / "x", **wrong)
    (tmp_path / "p.jsonl").write_text('{"text": 1}')
    with pytest.raises(UserError, match="p.jsonl:1 is no prompt"):
        sampling.read_prompts([str(tmp_path / "p.jsonl")])
