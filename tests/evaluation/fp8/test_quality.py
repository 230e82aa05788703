"""The FP8 test: what is compared, hand-worked numbers, and the command on a small model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax.errors import UserError
from herd_jax.evaluation.evaluation import Evaluation
from herd_jax.evaluation.fp8.quality import VARIANTS, Answers, Measured, compare, likelihood_under, measure, prompt_ids, worst_pairs
from herd_jax.evaluation.fp8.report import evaluate_fp8
from herd_jax.interop.load import open_source
from herd_jax.model import Model, load
from herd_jax.models.llama import Llama
from herd_jax.text.tokenizer import load_tokenizer

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=261)
PROMPTS = ["on 14 July", "3.14159", "why?"]
ANSWERS = Answers(max_new_tokens=8, temperature=1.0, samples=2, seed=0, chats=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    steps = tiny.make_steps(config=CONFIG)
    directory = tmp_path_factory.mktemp("model") / "herd"
    model = Model.of(Llama.make(CONFIG, "blockwise"), steps.layout, steps.plan.init(0).params, load_tokenizer("bytes"), 64, jnp.float32)
    model.save(directory)
    return directory


def measured(scores, answers=None, losses=(2.0, 4.0)):
    return Measured(answers or [str(i) for i in range(len(scores))], np.array(scores, float), np.array(losses, float))


def test_hand_worked_numbers():
    plain, variant = measured([-1, -2, -3, -4]), measured([-1, -2.5, -3, -8], ["0", "other", "2", "3"], (2.5, 3.75))
    found = compare(plain, variant)
    assert found["mean"] == -3.625 and found["change"] == -1.125 and found["worst_change"] == -4 and found["same_answers"] == 0.75
    assert found["drift"] == pytest.approx(0.125) and found["largest_drift"] == 0.5
    assert found["ks"] == 0.25
    assert worst_pairs(plain, variant, 2) == [3, 1]
    same = compare(plain, plain)
    assert same["ks"] == 0 and same["p_value"] == 1 and same["change"] == same["drift"] == 0 and same["same_answers"] == 1


def test_variants_are_measured_with_the_same_draws_and_one_scorer(saved):
    seen = []

    def score(prompts, responses):
        seen.append((list(prompts), list(responses)))
        return [float(len(response)) for response in responses]

    found = dict(measure(open_source(saved), PROMPTS, PROMPTS, ANSWERS, score))
    assert list(found) == ["plain", *VARIANTS] and len(seen) == 5
    assert all(prompts == [prompt for prompt in PROMPTS for _ in range(2)] for prompts, _ in seen)
    plain = found["plain"]
    assert plain.answers == ANSWERS.of(load(saved), PROMPTS) and plain.answers[0] != plain.answers[1]
    np.testing.assert_allclose(plain.losses, [loss.nats_per_token for loss in load(saved).loss(PROMPTS)], rtol=1e-6)
    for name in VARIANTS:
        drift = np.abs(found[name].losses - plain.losses)
        assert 0 < drift.max() < 0.5, name
    # Nothing here comes near the bound.
    np.testing.assert_array_equal(found["fp8"].losses, found["no bound"].losses)
    assert (found["fp8"].losses != found["all layers"].losses).all()


def test_the_score_is_the_mean_likelihood_of_the_answer(saved):
    model = load(saved)
    text, answer = "on 14 July", "abc"
    prompt = prompt_ids(model, text, chats=False)
    ids = [*prompt, *answer.encode()]
    log_p = np.asarray(jax.nn.log_softmax(model.logits([ids])[0]))
    expected = log_p[range(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]].mean()
    empty, found = likelihood_under(model, chats=False)([text, text], ["", answer])
    assert found == pytest.approx(expected, abs=1e-5) and np.isfinite(empty)


@pytest.mark.slow
def test_the_command_writes_numbers_answers_and_a_picture(saved, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    printed = evaluate_fp8(Evaluation(saved, tmp_path / "out"), ANSWERS, prompts_file=str(tmp_path / "prompts.txt"))
    assert "the answers that FP8 made worst:" in printed and "all layers, no bound" in printed
    answers = [json.loads(line) for line in (tmp_path / "out" / "fp8-answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6 and set(answers[0]) == {"prompt", "plain", *VARIANTS}
    numbers = json.loads((tmp_path / "out" / "fp8.json").read_text())
    assert numbers["results"]["num_answers"] == 6
    assert (tmp_path / "out" / "fp8.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [({"samples": 0}, "samples 0"), ({"max_new_tokens": 0}, "max_new_tokens 0"), ({"temperature": float("nan")}, "temperature nan")],
)
def test_impossible_answers_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ANSWERS, **change)


def test_bad_scorers_and_files_are_one_sentence(saved, tmp_path):
    with pytest.raises(UserError, match="did not give one finite number for each answer"):
        dict(measure(open_source(saved), PROMPTS, PROMPTS, ANSWERS, lambda prompts, responses: [float("nan")] * len(responses)))
    (tmp_path / "empty.txt").write_text("\n")
    for file, message in (("empty.txt", "is empty"), ("absent.txt", "cannot be read as text")):
        with pytest.raises(UserError, match=message):
            evaluate_fp8(Evaluation(saved, tmp_path / "out2"), ANSWERS, prompts_file=str(tmp_path / file))
