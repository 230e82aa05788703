"""The blocks that score, categorise and rebalance documents."""

import json
import math
import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from classified import make_sets
from datatrove.data import Document

from herd_jax.config import parse
from herd_jax.curation.classification import classifiers, quality
from herd_jax.curation.classification.categories import Categories, CategoriesConfig, ClassifierConfig, topic_rates
from herd_jax.curation.classification.labelled import Labelled, read_texts
from herd_jax.curation.classification.linear_classifier import LinearConfig, train
from herd_jax.curation.classification.quality import Quality, QualityConfig, ThresholdConfig
from herd_jax.curation.classification.rebalance import Rebalance
from herd_jax.errors import UserError

ODD_TEXTS = ["", " ", "x", "\ud800", "\0\1\2" * 100, "שלום עולם", "word " * 1_000_000, "=" * 300_000, "a" * 300_000]
CODE = "import sys\n\ndef main(argv):\n    total = 0\n    for arg in argv:\n        total += int(arg)\n    return total\n"
PROOF = "Theorem 1. Let n > 2.\nProof. We have \\sum_{i} x_i = n.\nThen x = 2 and y ≤ 3.\nHence the claim.\n"
PROSE = "The river rises in the mountains.\nIt flows through several towns.\nAn old harbour lies where it meets the sea.\n"


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    path = tmp_path_factory.mktemp("linear") / "classifier.npz"
    train(Labelled.of_sets(make_sets()), LinearConfig(num_features=4096))[0].save(path)
    return str(path)


class Lengths:
    """Stands for the transformer: longer texts are better. Counts what it is asked."""

    labels, batch_size = ("no", "yes"), 4

    def __init__(self):
        self.asked = []

    def scores(self, texts):
        self.asked.append(len(texts))
        good = np.asarray([min(len(text), 100) / 100 for text in texts], np.float32)
        return np.stack([1 - good, good], axis=1).reshape(-1, 2)


@pytest.fixture
def lengths(monkeypatch):
    found = Lengths()
    original = classifiers.open_classifier
    monkeypatch.setattr(quality, "open_classifier", lambda path: found if path == "lengths" else original(path))
    return found


def documents(texts, **metadata):
    metadata = {"media_type": "text/plain", "language": "en", **metadata}
    return [Document(text, f"file#{i}", metadata=dict(metadata)) for i, text in enumerate(texts)]


def ids(docs):
    return [doc.id for doc in docs]


def test_the_linear_score_decides(linear):
    block = Quality(QualityConfig(linear=ThresholdConfig(linear)))
    docs = documents(sum(make_sets(40, seed=5).values(), []))
    kept = ids(block.run(docs))
    assert len(set(kept) & {f"file#{i}" for i in range(40)}) > 36 > 4 > len(set(kept) & {f"file#{i}" for i in range(40, 80)})
    scores = classifiers.open_classifier(linear).scores([doc.text for doc in docs])[:, 0]
    assert [doc.metadata["quality"] for doc in docs] == pytest.approx(scores.tolist())
    assert kept == [doc.id for doc, score in zip(docs, scores) if score >= 0.5]
    assert block.stats.stats["dropped_below_linear_threshold"].total == 80 - len(kept)


def test_a_lone_document_is_judged_alike(linear):
    block = pickle.loads(pickle.dumps(Quality(QualityConfig(linear=ThresholdConfig(linear)))))
    sets = make_sets(5, seed=6, share=1.0)
    assert [block.filter(doc) for doc in documents(sets["yes"])] == [True] * 5
    assert [block.filter(doc) for doc in documents(sets["no"])] == [(False, "below_linear_threshold")] * 5


def test_the_transformer_scores_batches_of_what_the_linear_one_lets_pass(linear, lengths):
    block = Quality(QualityConfig(ThresholdConfig(linear), ThresholdConfig("lengths", least=0.6)))
    sets = make_sets(10, seed=7, share=1.0)
    docs = documents([text[:200] for pair in zip(sets["yes"], sets["no"]) for text in pair])
    kept = list(block.run(docs))
    assert ids(kept) == [doc.id for doc in docs[::2] if len(doc.text) >= 60]
    assert lengths.asked == [2] * 5
    assert all(doc.metadata["quality"] == doc.metadata["transformer_quality"] >= 0.6 for doc in kept)
    assert all(math.isnan(doc.metadata["transformer_quality"]) for doc in docs[1::2])


def test_languages_have_thresholds_of_their_own(lengths):
    block = Quality(QualityConfig(transformer=ThresholdConfig("lengths", least=0.9, languages={"de": 0.1})))
    assert ids(block.run([*documents(["x" * 50], language="de"), *documents(["x" * 50])])) == ["file#0"]


def test_source_code_is_not_scored(lengths):
    (doc,) = Quality(QualityConfig(transformer=ThresholdConfig("lengths"))).run(documents(["x"], media_type="text/x-code"))
    assert math.isnan(doc.metadata["quality"]) and lengths.asked == [0]


def test_every_text_gets_a_verdict(linear):
    docs = documents(ODD_TEXTS)
    verdicts = [Quality(QualityConfig(linear=ThresholdConfig(linear))).filter(doc) for doc in docs]
    assert all(verdict is True or verdict == (False, "below_linear_threshold") for verdict in verdicts)
    assert [doc.metadata["category"] for doc in Categories(CategoriesConfig()).run(docs)]


def test_wrong_settings_are_refused(linear):
    with pytest.raises(UserError, match="quality has no classifier"):
        Quality(QualityConfig())
    with pytest.raises(UserError, match="quality least is 2.0"):
        parse(QualityConfig, {"linear": {"path": "x", "least": 2}})
    with pytest.raises(UserError, match="quality languages.de is -1.0"):
        parse(QualityConfig, {"linear": {"path": "x", "languages": "de:-1"}})
    with pytest.raises(UserError, match="has no label 'good': choose one of yes, no"):
        Quality(QualityConfig(linear=ThresholdConfig(linear, "good"))).filter(documents(["x"])[0])
    with pytest.raises(UserError, match="does not exist"):
        Quality(QualityConfig(linear=ThresholdConfig("nowhere.npz"))).run(documents(["x"]))
    with pytest.raises(UserError, match="least_code_lines is 0"):
        CategoriesConfig(least_code_lines=0)


def test_categories_by_rule():
    sources = documents([CODE], language="code", media_type="text/x-code")
    given = [*documents([CODE, PROOF, PROSE, "\n"]), *sources, *documents([PROOF], language="fr")]
    docs = list(Categories(CategoriesConfig()).run(given))
    assert [doc.metadata["category"] for doc in docs] == ["code", "math_and_reasoning", "general", "general", "code", "multilingual"]
    assert {doc.metadata["topic"] for doc in docs} == {""}


def test_categories_by_classifier(linear):
    sets = make_sets(3, seed=8, share=1.0)
    docs = documents([*sets["yes"], *sets["no"], CODE])
    config = CategoriesConfig(reasoning=ClassifierConfig(linear, "no"), topics=linear)
    found = list(Categories(config).run(docs))
    assert [doc.metadata["category"] for doc in found] == ["general"] * 3 + ["math_and_reasoning"] * 3 + ["code"]
    assert [doc.metadata["topic"] for doc in found][:6] == ["yes"] * 3 + ["no"] * 3
    lone = documents(sets["yes"][:1])[0]
    assert Categories(CategoriesConfig(code=ClassifierConfig(linear))).filter(lone) is True and lone.metadata["category"] == "code"


def test_rates_of_an_over_represented_topic():
    assert topic_rates({"arts": 600, "science": 300, "law": 100}, {"arts": 0.2}) == pytest.approx({"arts": 1 / 6, "science": 1, "law": 1})
    assert topic_rates({"arts": 10, "science": 90}, {"arts": 0.2}) == {"arts": 1, "science": 1}
    with pytest.raises(UserError, match="caps of all topics sum to less than 1"):
        topic_rates({"arts": 60, "law": 40}, {"arts": 0.4, "law": 0.5})
    with pytest.raises(UserError, match="the cap of topic 'arts' is 0"):
        topic_rates({"arts": 60}, {"arts": 0})


@hypothesis.given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10**12), min_size=1),
    st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 1)),
)
def test_rates_keep_to_the_caps_and_drop_no_more(counts, caps):
    counts["free"] = 1000
    rates = topic_rates(counts, caps)
    kept = {topic: counts[topic] * rate for topic, rate in rates.items()}
    for topic, rate in rates.items():
        share = kept[topic] / sum(kept.values())
        assert 0 < rate <= 1 and share <= caps.get(topic, 1) * (1 + 1e-6)
        assert rate == 1 or share == pytest.approx(caps[topic])


def test_rebalance_keeps_the_same_share_every_time(tmp_path):
    def block(**rates):
        (tmp_path / "rates.json").write_text(json.dumps(rates))
        return Rebalance(tmp_path / "rates.json")

    arts = [Document("", f"file#{i}", metadata={"topic": "arts"}) for i in range(4000)]
    kept = ids(block(arts=0.25).run(arts))
    assert abs(len(kept) / 4000 - 0.25) < 0.02
    assert ids(block(arts=0.25).run(arts[::-1])) == kept[::-1]
    assert set(kept) < set(ids(block(arts=0.5).run(arts)))
    assert block(law=0.0).filter(Document("", "\ud800", metadata={"topic": "law"})) == (False, "topic_over_represented")
    assert block(other=1.0).filter(Document("", "a", metadata={"topic": "other"})) is True


def test_what_a_classifier_learns_from_is_read_as_in_a_run(tmp_path):
    """Pages are extracted, any format is known by its bytes, and the field of the text has a name."""
    (tmp_path / "page.html").write_text("<html><body><nav>home</nav><p>The text of a page.</p></body></html>")
    (tmp_path / "rows.ndjson").write_text('{"body": "first"}\n{"body": "second"}\n')
    (tmp_path / "list.json").write_text('[{"body": "third"}]')
    assert sorted(read_texts([str(tmp_path)], "body")) == ["The text of a page.", "first", "second", "third"]
    with pytest.raises(UserError, match="no text was found in .*rows.ndjson .lines without a text in field 'text': 2.: name files"):
        read_texts([str(tmp_path / "rows.ndjson")])
