"""SFT, the reward model and DPO by their command: they learn, resume, keep their reference, and refuse what cannot be trained on."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from post_models import save_models

import herd_jax
from herd_jax.config import parse
from herd_jax.data.dialogs import read_records
from herd_jax.data.preferences import read_preference
from herd_jax.errors import UserError
from herd_jax.evaluation.evaluation import Evaluation
from herd_jax.interop.load import open_source
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.post_training import reference as reference_module
from herd_jax.post_training.config import DpoConfig, RewardConfig, SftConfig
from herd_jax.post_training.reference import Reference, content_of
from herd_jax.post_training.stages import train_stage

WORDS = "red blue green pink grey gold teal cyan".split()


def ask(i):
    return f"{WORDS[i % 8]} {i}"


def dialog(i):
    return {"messages": [{"role": "user", "content": ask(i)}, {"role": "assistant", "content": WORDS[i % 8].upper()}]}


def preference(i):
    return {"prompt": ask(i), "chosen": WORDS[i % 8].upper(), "rejected": WORDS[(i + 1) % 8], "level": "better"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with random weights and a tokenizer of Llama 3's kind, and data."""
    root = tmp_path_factory.mktemp("post_training")
    save_models(root, {"model": 0, "other": 1})
    (root / "dialogs.jsonl").write_text("".join(json.dumps(dialog(i)) + "\n" for i in range(96)))
    (root / "preferences.jsonl").write_text("".join(json.dumps(preference(i)) + "\n" for i in range(96)))
    return root


def config_of(kind, root, workdir, source, steps=30, mesh={"cp": 2}, **more):
    values = {
        "workdir": str(workdir), "init_from": str(root / "model"), "data": {"sources": {str(root / source): 1.0}},
        "train": {"num_steps": steps, "global_batch_size": 8, "seq_len": 128},
        "optimizer": {"peak_learning_rate": 1e-2, "warmup_steps": 2, "decay_steps": 30}, "mesh": mesh,
        "checkpoint": {"every_steps": 10}, "eval": {"every_steps": 10, "num_batches": 1}, "log": {"every_steps": 1},
    }  # fmt: skip
    return parse(kind, values | more)


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_sft_learns_on_a_mesh_and_its_model_answers(base, tmp_path):
    train_stage(config_of(SftConfig, base, tmp_path / "sft", "dialogs.jsonl", mesh={"tp": 2}))
    found = metrics(tmp_path / "sft")
    assert found[-1]["loss"] < 0.5 * found[0]["loss"] and found[-1]["val_loss"] < 1
    answer = herd_jax.load(tmp_path / "sft").chat([{"role": "user", "content": ask(3)}], max_new_tokens=20)
    assert len(answer) < 20  # it ends its turn


def test_the_reward_model_ranks_and_is_loaded_as_one(base, tmp_path):
    train_stage(config_of(RewardConfig, base, tmp_path / "reward", "preferences.jsonl", mesh={"tp": 2, "pp": 2}))
    found = metrics(tmp_path / "reward")
    assert found[-1]["val_accuracy"] > 0.9 and found[-1]["val_margin"] > 0.5
    model = herd_jax.load(tmp_path / "reward")
    prompt = model.chat_ids([{"role": "user", "content": ask(5)}])
    end = model.tokenizer.special_ids["<|eot_id|>"]
    rewards = model.rewards([prompt, prompt], [[*model.tokenizer.encode(text), end] for text in (WORDS[5].upper(), WORDS[6])])
    assert rewards[0] > rewards[1]
    with pytest.raises(UserError, match="no reward model"):
        herd_jax.load(base / "model").rewards([prompt], [[1]])


def dpo(base, workdir, steps=30, cache=None, **more):
    return config_of(DpoConfig, base, workdir, "preferences.jsonl", steps, reference_cache=str(cache or base / "cache"), **more)


def test_dpo_moves_the_margin_and_a_resume_keeps_its_reference(base, tmp_path, monkeypatch):
    """Interrupted in the middle, with other weights at the reference's path and no cache that fits them, it ends as if it had not been."""
    shutil.copytree(base / "model", tmp_path / "model")
    own = {"init_from": str(tmp_path / "model")}
    train_stage(dpo(base, tmp_path / "whole", cache=tmp_path / "cache", **own))
    found = metrics(tmp_path / "whole")
    assert abs(found[0]["margin"]) < 1e-5 and found[0]["accuracy"] == 0 and found[0]["preference_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert found[-1]["margin"] > 0.1 and found[-1]["val_accuracy"] > 0.9 and found[-1]["nll"] < found[0]["nll"]
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 1

    train_stage(dpo(base, tmp_path / "parts", 10, tmp_path / "cache", **own))
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(base / "other", tmp_path / "model")
    with pytest.raises(UserError, match="init_from"):
        train_stage(dpo(base, tmp_path / "parts", 30, tmp_path / "cache", **own))
    shutil.rmtree(tmp_path / "model")  # gone altogether: the run has begun, and the cache has its reference
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    computed = []
    monkeypatch.setattr(reference_module, "load_source", lambda *args: computed.append(args))
    train_stage(dpo(base, tmp_path / "parts", 30, tmp_path / "moved", examples={"most_bad": 0.5}, **own))  # what changes no result may change
    assert not computed
    with pytest.raises(UserError, match="other values of dpo.beta"):
        train_stage(dpo(base, tmp_path / "parts", 40, tmp_path / "moved", dpo={"beta": 0.3}, **own))
    assert metrics(tmp_path / "parts")[-1]["loss"] == pytest.approx(found[-1]["loss"], rel=1e-5)


def test_the_reference_is_known_by_content_alone(base, tmp_path):
    tokenizer = open_source(base / "model").tokenizer
    pairs = [read_preference(record, tokenizer).pair for _, record in read_records(base / "preferences.jsonl")][:12]
    mesh = make_mesh(MeshConfig(dp=1), jax.devices()[:1])
    live = Reference(str(base / "model"), str(tmp_path / "cache"), mesh, tmp_path / "a").log_probabilities(pairs)
    model = herd_jax.load(base / "model")
    for pair, found in zip(pairs, live):
        for response, log_p in zip(pair.responses, found):
            logits = model.logits([[*pair.prompt, *response.ids]])[0]
            rows = logits[len(pair.prompt) - 1 : -1]
            expected = (rows - np.logaddexp.reduce(rows, -1, keepdims=True))[np.arange(len(response.ids)), response.ids]
            np.testing.assert_allclose(log_p, expected, atol=1e-5)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_module, "load_source", lambda *args: calls.append(args) or herd_jax.load(args[0].path))
        shuffled = Reference(str(base / "model"), str(tmp_path / "cache"), mesh, tmp_path / "b").log_probabilities(pairs[::-1])
        assert not calls and all((a == b).all() for one, two in zip(live, shuffled[::-1]) for a, b in zip(one, two))
        other = Reference(str(base / "other"), str(tmp_path / "cache"), mesh, tmp_path / "c").log_probabilities(pairs)
        assert len(calls) == 1 and abs(other[0][0] - live[0][0]).max() > 1e-3
        more = Reference(str(base / "model"), str(tmp_path / "cache"), mesh, tmp_path / "d").log_probabilities([*pairs, dataclasses.replace(pairs[0], prompt=pairs[0].prompt[:-1])])
        assert len(calls) == 2 and len(more) == 13
    assert content_of(open_source(base / "model")) != content_of(open_source(base / "other"))


def test_sources_that_cannot_be_trained_on_are_one_sentence(base, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(record) + "\n" for record in [*map(dialog, range(9)), {"messages": [{"role": "user", "content": "?"}]}]))
    with pytest.raises(UserError, match="1 of 10 records of .*bad.jsonl cannot be trained on .*bad.jsonl:10: it has no token of the assistant"):
        train_stage(config_of(SftConfig, base, tmp_path / "run", bad))
    with pytest.raises(UserError, match="init_from is empty"):
        config_of(SftConfig, base, tmp_path / "run", "dialogs.jsonl", init_from="")
    with pytest.raises(UserError, match="data.document_mask is false"):
        config_of(SftConfig, base, tmp_path / "run", "dialogs.jsonl", data={"sources": {"x": 1.0}, "document_mask": False})
    with pytest.raises(UserError, match="even"):
        config_of(RewardConfig, base, tmp_path / "run", "preferences.jsonl", examples={"most_responses": 3})
    with pytest.raises(UserError, match="dpo.kind is 'hinge'"):
        config_of(DpoConfig, base, tmp_path / "run", "preferences.jsonl", dpo={"kind": "hinge"})
    with pytest.raises(UserError, match="are held out"):
        few = tmp_path / "few.jsonl"
        few.write_text(json.dumps(dialog(0)) + "\n")
        train_stage(config_of(SftConfig, base, tmp_path / "run", few))


def test_a_reward_model_is_one_for_transformers_too(base, tmp_path):
    train_stage(config_of(RewardConfig, base, tmp_path / "reward", "preferences.jsonl", steps=2))
    with pytest.raises(UserError, match="the model is a reward model and the SFT task trains a language model"):
        train_stage(config_of(SftConfig, base, tmp_path / "sft", "dialogs.jsonl", init_from=str(tmp_path / "reward")))
    with pytest.raises(UserError, match="is a reward model"):
        Evaluation(tmp_path / "reward").model
    model = herd_jax.load(tmp_path / "reward")
    model.save(tmp_path / "hf", "huggingface")
    again = herd_jax.load(tmp_path / "hf")
    prompt, answers = model.chat_ids([{"role": "user", "content": "red 1"}]), [[3, 4, 5], [7]]
    rewards = model.rewards([prompt] * 2, answers)
    np.testing.assert_allclose(again.rewards([prompt] * 2, answers), rewards, atol=1e-6)
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    with pytest.raises(UserError, match="no reward models"):
        model.save(tmp_path / "meta", "meta")
    for wrong in (lambda: model.generate(["a"]), lambda: model.logits([[1]]), lambda: model.loss(["ab"]), lambda: model.log_probabilities([[1]], [[2]])):
        with pytest.raises(UserError, match="is a reward model"):
            wrong()
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        theirs = [float(peer(torch.tensor([[*prompt, *answer]])).logits[0, 0]) for answer in answers]
    np.testing.assert_allclose(theirs, rewards, atol=1e-5)
