"""The linear classifier and what both kinds share: labelled texts, their split, how a classifier is measured."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from classified import make_sets

from herd_jax.curation.classification.classifiers import open_classifier, train_classifier
from herd_jax.curation.classification.labelled import LEAST_TEXTS, Labelled, auc, evaluate
from herd_jax.curation.classification.linear_classifier import LinearClassifier, LinearConfig, features, train
from herd_jax.curation.text import words
from herd_jax.errors import UserError

CONFIG = LinearConfig(num_features=4096)
ODD_TEXTS = ["", " ", "x", "\ud800", "\0\1\2" * 100, "שלום עולם", "a" * 100_000, "word " * 200_000, "!?" * 50]


@pytest.fixture(scope="module")
def trained():
    return train(Labelled.of_sets(make_sets()), CONFIG)


def test_features_are_words_and_pairs():
    folded = words.split("One two, TWO one").folded
    pairs = [words.ngrams(folded[i : i + 2], 2)[0] for i in range(3)]
    expected = [int(h) % 1000 for h in [*folded, *pairs]]
    assert features("One two, TWO one", 1000).tolist() == expected


def test_logits_are_the_mean_of_the_weights(trained):
    classifier, _ = trained
    text = "cheap towns near the sea"
    logits = classifier.weights_FC[features(text, 4096)].astype(float).mean(axis=0) + classifier.bias_C
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(classifier.scores([text])[0], expected, rtol=1e-4)


def test_it_learns_what_held_out_texts_are(trained):
    classifier, evaluation = trained
    assert evaluation.accuracy > 0.9 and evaluation.auc > 0.95
    fresh = Labelled.of_sets(make_sets(seed=1))
    scores = classifier.scores(fresh.texts)
    assert scores.dtype == np.float32
    assert evaluate(scores, fresh.targets_NC).accuracy > 0.9


def test_it_is_the_same_every_time_and_another_with_another_seed(trained):
    labelled = Labelled.of_sets(make_sets())
    assert train(labelled, CONFIG)[0].fingerprint == trained[0].fingerprint
    assert train(labelled, LinearConfig(num_features=4096, seed=1))[0].fingerprint != trained[0].fingerprint


def test_soft_targets_are_learned(trained):
    sets = make_sets(300)
    hard = Labelled.of_sets(sets)
    soft = Labelled(hard.labels, hard.texts, 0.25 + 0.5 * hard.targets_NC)
    classifier, _ = train(soft, CONFIG)
    scores = classifier.scores(make_sets(seed=2)["yes"])[:, 0]
    assert abs(np.median(scores) - 0.75) < 0.1


def test_every_text_gets_scores(trained):
    scores = trained[0].scores(ODD_TEXTS)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
    assert trained[0].scores([]).shape == (0, 2)


def test_saved_and_loaded_again(trained, tmp_path):
    trained[0].save(tmp_path / "classifier.npz")
    first = (tmp_path / "classifier.npz").read_bytes()
    loaded = open_classifier(str(tmp_path / "classifier.npz"))
    assert (loaded.labels, loaded.config, loaded.fingerprint) == (trained[0].labels, CONFIG, trained[0].fingerprint)
    loaded.save(tmp_path / "classifier.npz")
    assert (tmp_path / "classifier.npz").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["classifier.npz"]


def test_other_files_are_refused(trained, tmp_path):
    path = tmp_path / "classifier.npz"
    with pytest.raises(UserError, match="does not exist"):
        LinearClassifier.load(path)
    path.write_text("text")
    with pytest.raises(UserError, match="no linear classifier"):
        LinearClassifier.load(path)
    np.savez(path.with_name("other"), weights=np.zeros(3))
    with pytest.raises(UserError, match="no linear classifier"):
        LinearClassifier.load(path.with_name("other.npz"))
    trained[0].save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="no linear classifier"):
        LinearClassifier.load(path)
    with np.load(trained_file(trained, tmp_path)) as file:
        np.savez(path, header=file["header"], weights=file["weights"] + 1, bias=file["bias"])
    with pytest.raises(UserError, match="of another version"):
        LinearClassifier.load(path)


def trained_file(trained, directory):
    trained[0].save(directory / "whole.npz")
    return directory / "whole.npz"


def test_the_split_keeps_parts_apart_and_has_every_label():
    sets = make_sets()
    sets["no"] += sets["no"][:30]
    parts = Labelled.of_sets(sets).split()
    assert [len(part.texts) for part in parts] == [216, 12, 12]
    assert all(set(part.targets_NC.argmax(axis=1)) == {0, 1} for part in parts)
    texts = [set(part.texts) for part in parts]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    again = Labelled.of_sets({name: texts[::-1] for name, texts in sets.items()}).split()
    assert [set(part.texts) for part in again] == texts


def test_too_few_texts_are_refused():
    with pytest.raises(UserError, match=f"label 'no' has {LEAST_TEXTS - 1} different texts"):
        Labelled.of_sets({"yes": make_sets()["yes"], "no": make_sets(LEAST_TEXTS - 1)["no"] * 5}).split()
    with pytest.raises(UserError, match="only the label yes"):
        Labelled.of_sets({"yes": make_sets()["yes"]}).split()


@hypothesis.given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auc_counts_pairs(pairs):
    scores, positive = (np.asarray(column) for column in zip(*pairs, strict=True))
    hypothesis.assume(positive.any() and not positive.all())
    wins = [(p > n) + (p == n) / 2 for p in scores[positive] for n in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(wins))


def test_trained_from_files(tmp_path):
    for name, texts in make_sets().items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sets = {name: [str(tmp_path / f"{name}.jsonl")] for name in ("yes", "no")}
    report = train_classifier("linear", sets, None, tmp_path / "classifier.npz")
    assert "120 yes, 120 no; held out: accuracy" in report and "AUC" in report
    assert open_classifier(str(tmp_path / "classifier.npz")).labels == ("yes", "no")
    with pytest.raises(UserError, match="exists already"):
        train_classifier("linear", sets, None, tmp_path / "classifier.npz")
    with pytest.raises(UserError, match="must be one of linear, transformer"):
        train_classifier("forest", sets, None, tmp_path / "other")
    with pytest.raises(UserError, match="give two or more --set"):
        train_classifier("linear", {}, None, tmp_path / "other")
    with pytest.raises(UserError, match="no text was found"):
        train_classifier("linear", sets, None, tmp_path / "other", text_field="body")


@pytest.mark.parametrize("key, value", [("num_features", 0), ("patience", 0), ("learning_rate", 0.0)])
def test_impossible_settings_are_refused(key, value):
    with pytest.raises(UserError, match=f"linear.{key} is {value}"):
        LinearConfig(**{key: value})
