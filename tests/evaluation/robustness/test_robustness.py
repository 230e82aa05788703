"""Robustness of multiple choice against scorers whose habits are known, so that each study's numbers can be worked out by hand."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax.errors import UserError
from herd_jax.evaluation.benchmarks.multiple_choice import make_item
from herd_jax.evaluation.evaluation import Evaluation
from herd_jax.evaluation.results import read_items, read_results
from herd_jax.evaluation.robustness.robustness import evaluate_robustness, label_scorer, measure
from herd_jax.evaluation.robustness.variants import NUM_SHOTS, Variant, answer_at, draw_shots, reorder, studies
from herd_jax.model import Model
from herd_jax.models.llama import Llama
from herd_jax.text.tokenizer import load_tokenizer

# Twenty items, five with the answer at each place; the right choice says so.
ITEMS = [make_item(f"Question {n}?", [f"{'right' if at == n % 4 else 'wrong'} {n} {at}" for at in range(4)], n % 4) for n in range(20)]
SHOTS = {"": [make_item(f"Example {n}?", [f"choice {n} {place}" for place in range(4)], 1) for n in range(NUM_SHOTS)]}


def listed(prompt):
    """(label, choice) of each line of the last question, and the labels that answer the examples."""
    *examples, last = prompt.split("\n\n")[1:]
    lines = [line.split(maxsplit=1) for line in last.split("\n")[1:-1]]
    return [(label.rstrip(".)"), choice) for label, choice in lines], [example.rsplit("Answer: ", 1)[1] for example in examples]


def scorer(likes):
    """`likes(label, place, choice, labels of the examples)` -> log-likelihood."""

    def score(prompts, continuations):
        scores = []
        for prompt, of_prompt in zip(prompts, continuations, strict=True):
            lines, shown = listed(prompt)
            assert prompt.endswith("\nAnswer:") and [f" {label}" for label, _ in lines] == of_prompt
            scores.append([likes(label, place, choice, shown) for place, (label, choice) in enumerate(lines)])
        return scores

    return score


def studied(likes):
    return measure(scorer(likes), ITEMS, SHOTS)["studies"]


def by_name(study, key="accuracy"):
    return {row["name"]: row[key] for row in study["variants"]}


def test_a_model_that_knows_is_robust():
    for study in studied(lambda label, place, choice, shown: "right" in choice).values():
        assert set(by_name(study).values()) == {1.0}
        assert (study["mean"], study["spread"], study["standard_deviation"], study["unchanged"]) == (1, 0, 0, 1)
        assert all(row["flips"] == 0 and row["places"].tolist() == [0.25] * 4 and row["half_interval"] == 0 for row in study["variants"])


def test_a_model_that_always_takes_the_first_place():
    found = studied(lambda label, place, choice, shown: -place)
    for study in ("few-shot labels", "label sets", "prompts"):  # five of twenty answers stand first, whatever their label
        assert found[study]["spread"] == 0 and set(by_name(found[study]).values()) == {0.25}
        assert all(row["places"].tolist() == [1, 0, 0, 0] for row in found[study]["variants"])
    orders = found["answer order"]
    assert len(orders["variants"]) == 24 and set(by_name(orders).values()) == {0.25}
    # It picks the choice that stands first: another one wherever the order moves the first choice, which 18 of 24 do.
    assert {name: flips for name, flips in by_name(orders, "flips").items()} == {name: float(name[0] != "A") for name in by_name(orders)}
    assert orders["unchanged"] == 0
    assert sorted(row["distance"] for row in orders["variants"]) == [0] + [2] * 6 + [3] * 8 + [4] * 9


def test_a_model_that_copies_the_labels_of_the_examples():
    """It knows the answers except where all the examples have one label: then it repeats that."""
    found = studied(lambda label, place, choice, shown: 10 * (set(shown) == {label}) + ("right" in choice))
    study = found["few-shot labels"]
    assert by_name(study) == {"ABCD": 1, "AAAA": 0.25, "AABB": 1, "CCDD": 1}
    assert study["spread"] == 0.75 and study["mean"] == pytest.approx(3.25 / 4)
    assert study["standard_deviation"] == pytest.approx(np.std([1, 0.25, 1, 1]))
    assert by_name(study, "flips") == {"ABCD": 0, "AAAA": 0.75, "AABB": 0, "CCDD": 0} and study["unchanged"] == 0.25
    # The answer of every example is its second choice, which the order puts elsewhere.
    assert all(row["places"][ord(row["name"][1]) - ord("A")] == 1 for row in found["answer order"]["variants"])
    assert found["answer order"]["variants"][0]["half_interval"] == pytest.approx(1.96 * np.sqrt(0.25 * 0.75 / 20))


def test_a_model_that_does_not_know_a_label_set():
    """Of rare symbols it takes the last."""
    found = studied(lambda label, place, choice, shown: place if label in "œ§зü" else "right" in choice)
    study = found["label sets"]
    assert by_name(study) == {"A. B. C. D.": 1, "A) B) C) D)": 1, "1. 2. 3. 4.": 1, "$ & # @": 1, "œ § з ü": 0.25}
    assert study["spread"] == 0.75 and found["prompts"]["spread"] == 0


def test_order_moves_choices_and_the_answer_with_them():
    item = make_item("q", ["a", "b", "c", "d"], 2)
    moved = reorder(item, (1, 2, 3, 0))  # a goes to B, b to C, c to D, d to A
    assert moved.choices == ("d", "a", "b", "c") and moved.answer == 3 and moved.id == item.id
    swapped = answer_at(item, 0)
    assert swapped.choices == ("c", "b", "a", "d") and swapped.answer == 0
    assert answer_at(item, 2) == item


def test_the_prompts():
    item, shots = make_item("q?", ["a", "b", "c", "d"], 0, "high_school_law"), [make_item("s?", ["w", "x", "y", "z"], 3)]
    text = Variant("", labels=("1", "2", "3", "4"), form="{label}) {choice}", order=(3, 2, 1, 0)).prompt(item, shots)
    head = "The following are multiple choice questions (with answers) about high school law."
    assert text == f"{head}\n\ns?\n1) z\n2) y\n3) x\n4) w\nAnswer: 1\n\nq?\n1) d\n2) c\n3) b\n4) a\nAnswer:"
    biased = [Variant("", shot_places=places).prompt(ITEMS[0], SHOTS[""]) for places in ((0, 0, 0, 0), (2, 2, 3, 3))]
    assert [listed(prompt)[1] for prompt in biased] == [["A"] * 4, ["C", "C", "D", "D"]]
    sizes = {name: len(variants) for name, variants in studies().items()}
    assert sizes == {"few-shot labels": 4, "label sets": 5, "answer order": 24, "prompts": 5}
    first = {variants[0].prompt(ITEMS[0], SHOTS[""]) for name, variants in studies().items() if name != "few-shot labels"}
    assert len(first) == 1  # the studies share the usual way of asking


def test_a_seed_draws_the_same_examples_of_the_items_subject():
    items = [make_item(f"{subject} {n}?", ["a", "b", "c", "d"], 0, subject) for n in range(9) for subject in ("law", "art")]
    shots, left = draw_shots("t", items, 3)
    assert (shots, left) == draw_shots("t", items, 3) and shots != draw_shots("t", items, 4)[0]
    for subject in ("law", "art"):
        assert len({shot.id for shot in shots[subject]}) == NUM_SHOTS and {shot.subject for shot in shots[subject]} == {subject}
    assert len(left) == 8 and not {item.id for item in left} & {shot.id for of_subject in shots.values() for shot in of_subject}
    with pytest.raises(UserError, match="t has 5 items of 4 choices about law: give 6 or more"):
        draw_shots("t", [item for item in items if item.subject == "law"][:5], 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model of bytes, data, and a place to write."""
    root = tmp_path_factory.mktemp("robustness")
    config = dataclasses.replace(tiny.CONFIG, vocab_size=261)
    steps = tiny.make_steps(config=config)
    model = Model.of(Llama.make(config, "blockwise"), steps.layout, steps.plan.init(0).params, load_tokenizer("bytes"), 2048, jnp.float32)
    model.save(root / "model")
    three = {"question": "of three", "choices": ["x", "y", "z"], "answer": 0}
    records = [{"question": item.question, "choices": item.choices, "answer": item.answer} for item in ITEMS[:9]]
    (root / "données.jsonl").write_text("\n".join(map(json.dumps, [three, *records])))
    (root / "short.jsonl").write_text(json.dumps(three))
    return root, model


def run(root, tasks=("données",), limit=None, output="out"):
    return evaluate_robustness(Evaluation(str(root / "model"), root / output), tasks, str(root), limit)


def test_the_command_writes_numbers_items_and_a_picture(files):
    root, model = files
    text = run(root, ["données", "données"], limit=2)
    assert text.count("données: 2 items") == 1 and "distance 4" in text and "œ § з ü" in text
    record = read_results(root / "out")["robustness"]
    assert record["settings"] == {"tasks": ["données"], "data": str(root), "limit": 2, "seed": 0, "num_shots": 5}
    assert set(record["results"]["données"]["studies"]) == set(studies())
    rows = read_items(root / "out", "données robustness")
    assert len(rows) == 2 and all(0 <= row["score"] <= 1 and row["choices"] for row in rows.values())
    assert len(list((root / "out").glob("robustness-*.png"))) == 1


def test_labels_are_scored_as_text_behind_the_prompt(files):
    _, model = files
    prompts = ["a prompt\nAnswer:", "another\nAnswer:"]
    found = label_scorer(model)(prompts, [[" A", " œ"], [" 1"]])
    for prompt, labels, scores in zip(prompts, [[" A", " œ"], [" 1"]], found, strict=True):
        for label, score in zip(labels, scores, strict=True):
            whole, known = (model.loss([text])[0].bits_per_byte * np.log(2) * len(text.encode()) for text in (prompt + label, prompt))
            assert score == pytest.approx(known - whole, abs=1e-3)


def test_bad_input(files):
    root, model = files
    with pytest.raises(UserError, match="--limit is 0: it must be 1 or more"):
        run(root, limit=0)
    (root / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written .*: give an --output that can be"):
        run(root, output="file")
    with pytest.raises(UserError, match="short has 0 items of 4 choices: give 6 or more"):
        run(root, ["données", "short"])
    with pytest.raises(UserError, match="has 68 tokens, and the model's context holds 64: draw other examples"):
        label_scorer(dataclasses.replace(model, context_length=64))(["x" * 65], [[" A"]])
    with pytest.raises(UserError, match="the model has no tokenizer beside it"):
        label_scorer(dataclasses.replace(model, tokenizer=None))
