"""The transformer classifier, and the judge that makes labels for it with a model of random weights."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from classified import make_sets

from herd_jax.curation.classification import labels
from herd_jax.curation.classification.classifiers import open_classifier, train_classifier
from herd_jax.curation.classification.labelled import LEAST_TEXTS, Labelled, evaluate, text_id
from herd_jax.curation.classification.transformer_classifier import TransformerClassifier, TransformerConfig, train
from herd_jax.errors import UserError
from herd_jax.model import Model, load
from herd_jax.models.encoder import EncoderConfig
from herd_jax.models.llama import Llama
from herd_jax.text.protocol import TEMPLATE_FILE
from herd_jax.text.tokenizer import ByteTokenizer

ENCODER = EncoderConfig(32, 1, 2, 64, vocab_size=400, max_tokens=32)
CONFIG = TransformerConfig(ENCODER, num_passes=5, batch_tokens=256, learning_rate=1e-2)
ODD_TEXTS = ["", " ", "x", "\ud800", "\0\1\2" * 100, "שלום עולם", "a" * 100_000, "word " * 20_000]
TEMPLATE = b"{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def trained():
    return train(Labelled.of_sets(make_sets(200)), CONFIG)


def test_it_learns_what_held_out_texts_are(trained):
    classifier, evaluation = trained
    assert evaluation.accuracy > 0.8 and evaluation.auc > 0.9
    fresh = Labelled.of_sets(make_sets(seed=1))
    assert evaluate(classifier.scores(fresh.texts), fresh.targets_NC).accuracy > 0.8


def test_it_is_the_same_every_time(trained):
    again, _ = train(Labelled.of_sets(make_sets(200)), CONFIG)
    for name, value in trained[0].params["layers"].items():
        np.testing.assert_array_equal(again.params["layers"][name], value)


def test_every_text_gets_scores_that_its_neighbours_do_not_change(trained):
    scores = trained[0].scores(ODD_TEXTS)
    assert scores.dtype == np.float32 and np.isfinite(scores).all()
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
    for text, score in zip(ODD_TEXTS, scores, strict=True):
        np.testing.assert_allclose(trained[0].scores([text])[0], score, atol=1e-5)
    assert trained[0].scores([]).shape == (0, 2)


def test_only_the_beginning_is_read(trained):
    text = "buy now " * 500
    np.testing.assert_array_equal(trained[0].scores([text, text + "the river"])[:, 0], trained[0].scores([text, text])[:, 0])


def test_saved_and_loaded_again(trained, tmp_path):
    classifier, _ = trained
    classifier.save(tmp_path / "classifier")
    loaded = open_classifier(str(tmp_path / "classifier"))
    texts = make_sets(8, seed=3)["yes"]
    assert (loaded.labels, loaded.config) == (classifier.labels, classifier.config)
    np.testing.assert_array_equal(loaded.scores(texts), classifier.scores(texts))
    with pytest.raises(UserError, match="exists already"):
        classifier.save(tmp_path / "classifier")
    weights = tmp_path / "classifier" / "weights.npz"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged or no transformer classifier"):
        TransformerClassifier.load(tmp_path / "classifier")
    with pytest.raises(UserError, match="does not exist"):
        TransformerClassifier.load(tmp_path / "other")
    with pytest.raises(UserError, match="damaged or no transformer classifier"):
        open_classifier(str(tmp_path))


@pytest.mark.parametrize("key, value", [("num_passes", 0), ("batch_tokens", 8), ("learning_rate", 0.0)])
def test_impossible_settings_are_refused(key, value):
    with pytest.raises(UserError, match=f"transformer.{key}"):
        TransformerConfig(**{key: value})


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A chat model of bytes whose weights are random."""
    steps = tiny.make_steps(config=tiny.dataclasses.replace(tiny.CONFIG, vocab_size=259, init_std=0.4))
    config = steps.model.config
    params, tokenizer = steps.plan.init(0).params, ByteTokenizer({TEMPLATE_FILE: TEMPLATE})
    model = Model.of(Llama.make(config, "blockwise"), steps.layout, params, tokenizer, None, jnp.float32)
    path = tmp_path_factory.mktemp("judge") / "herd"
    model.save(path)
    return model, path


def test_scores_are_probabilities_of_the_answers_first_tokens(judge):
    model, _ = judge
    requirement = labels.find_requirement("topic")
    texts = ["a river", "", "\ud800 \0", "long " * 5000, "sum"]
    for text, scores in zip(texts, labels.label(model, texts, requirement), strict=True):
        shown = text[: labels.MAX_TOKENS].encode(errors="replace").decode()
        prompt = f"[user]{requirement.prompt(shown)}[assistant]"
        logits = model.logits(np.asarray([list(prompt.encode())]))[0, -1].astype(float)
        weights = {name: math.exp(logits[word.encode()[0]]) for name, word in requirement.answers.items()}
        assert scores == pytest.approx({name: weight / sum(weights.values()) for name, weight in weights.items()}, abs=1e-4)


@pytest.fixture(autouse=True)
def answers_that_begin_unlike(monkeypatch):
    """To a tokenizer of bytes, many topics begin with the same token."""
    three = labels.Requirement("Which?", {"arts": "Arts", "biology": "Biology", "other": "Other"})
    monkeypatch.setitem(labels.REQUIREMENTS, "topic", three)


def test_answers_that_begin_alike_are_refused(judge):
    alike = labels.Requirement("Which?", {"science": "Science", "other": "Other", "society": "Society"})
    with pytest.raises(UserError, match="answers for science and society begin with the same token"):
        labels.label(judge[0], ["text"], alike)


def test_labels_go_on_where_they_stopped_and_train_a_classifier(judge, tmp_path):
    texts = sum(make_sets(60).values(), [])
    source, target = tmp_path / "texts.jsonl", tmp_path / "labels.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts[:8], *texts[:4]]))
    assert labels.label_files(load, judge[1], [str(source)], "encyclopedic", target) == f"8 documents labelled, 0 were in {target} already"
    whole = target.read_text()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [text_id(text) for text in texts[:8]]

    target.write_text(whole[: len(whole) // 2])
    kept = whole[: len(whole) // 2].count("\n")
    assert labels.label_files(load, judge[1], [str(source)], "encyclopedic", target).startswith(f"{8 - kept} documents labelled, {kept} were")
    again = [json.loads(line) for line in target.read_text().splitlines()]
    for line, expected in zip(again, map(json.loads, whole.splitlines()), strict=True):
        assert line["scores"] == pytest.approx(expected.pop("scores"), abs=1e-5)
        assert line["scores"].keys() == {"yes", "no"} and line | expected == line

    judged = Labelled.of_judgements(target)
    assert (judged.labels, judged.texts) == (("yes", "no"), texts[:8])
    np.testing.assert_allclose(judged.targets_NC.sum(axis=1), 1, rtol=1e-5)
    with pytest.raises(UserError, match=f"give at least {LEAST_TEXTS}"):
        train_classifier("linear", {}, str(target), tmp_path / "classifier.npz")
    with pytest.raises(UserError, match="holds labels of .* for 'encyclopedic'"):
        labels.label_files(load, judge[1], [str(source)], "code", target)
    with pytest.raises(UserError, match="not a file of labels"):
        labels.label_files(load, judge[1], [str(source)], "code", source)


def test_unknown_requirements_and_files_are_refused(judge, tmp_path):
    with pytest.raises(UserError, match="requirement 'poetry' is not known: choose one of encyclopedic"):
        labels.label_files(load, judge[1], [], "poetry", tmp_path / "labels.jsonl")
    with pytest.raises(UserError, match="cannot be read as a judge's labels"):
        Labelled.of_judgements(tmp_path / "labels.jsonl")
