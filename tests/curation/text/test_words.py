"""Words: where they are cut, what their hashes ignore, and that a text's size or rubbish in it changes neither."""

import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_jax.curation.text import words


def cut(text: str) -> list[str]:
    found = words.split(text)
    return [text[start:end] for start, end in zip(found.starts, found.ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world!", "Hello|,|world|!"),
        ('("It\'s fine.")', "(|\"|It|'s|fine|.|\"|)"),
        ("They don't, I'm sure; we’ve won.", "They|do|n't|,|I|'m|sure|;|we|’ve|won|."),
        ("The U.S. and NASA. Dr. Smith, e.g., p.m.", "The|U.S.|and|NASA|.|Dr.|Smith|,|e.g.|,|p.m."),
        ("well-known 1914–1918 twenty–thirty", "well|-|known|1914–1918|twenty|–|thirty"),
        ("10km, 50% of $3.50 and 1,234.5", "10|km|,|50|%|of|$|3.50|and|1,234.5"),
        ("wait... what…no", "wait|...|what|…|no"),
        ("see https://a-b.org/x-y_z?q=1, or re-run.py", "see|https://a-b.org/x-y_z?q=1|,|or|re-run.py"),
        ("end.Begin a,b key=value x:y", "end|.|Begin|a|,|b|key|=|value|x|:|y"),
        ("__init__ *bold* # [3]", "_|_|init|_|_|*|bold|*|#|[|3|]"),
        ("word--word -- x", "word|--|word|--|x"),
        ("«Здравствуй, мир!»", "«|Здравствуй|,|мир|!|»"),
        ("漢字かな。テスト123", "漢|字|か|な|。|テ|ス|ト|123"),
        ("मुझे हिन्दी आती है।", "मुझे|हिन्दी|आती|है|।"),
        ("'", "'"),
        ("-", "-"),
        ("", ""),
        (" \n\t ", ""),
    ],
)
def test_where_words_are_cut(text, expected):
    assert "|".join(cut(text)) == expected


def test_kinds_of_words():
    found = words.split("Ah, 12 © 3a …")
    assert found.is_symbol.tolist() == [False, True, False, False, False, True]
    assert found.has_alpha.tolist() == [True, False, False, False, True, False]


def test_hashes_tell_words_apart_wherever_they_stand():
    first, second, third = words.split("apple pear apple").hashes
    assert first == third != second
    assert words.split("xx pear").hashes[1] == second
    assert len(np.unique(words.split("ab ba aab abb a\0 a").hashes)) == 6


def test_folded_ignores_case_diacritics_and_punctuation_and_on_demand_digits():
    composed, other = words.split("Café, NAÏVE 1999: don’t 3.14!"), words.split("cafe\u0301 naive (7) don't 22.5")
    assert composed.folded_without_digits.tolist() == other.folded_without_digits.tolist()
    assert len(composed.folded) == len(composed.folded_without_digits) == 6  # do|n't are two
    differs = composed.folded != other.folded
    assert differs.tolist() == [False, False, True, False, False, True]
    assert words.split("resume").folded != words.split("resumes").folded
    assert words.split("١٢٣ 123 １２３ १२३").folded.tolist() == words.split("123 123 123 123").folded.tolist()


def folded(text):
    return words.split(text).folded.tolist()


@pytest.mark.parametrize(
    "text, same",
    [
        ("Straße GROSS", "STRASSE groß"),
        ("ﬅone ﬁne oﬃce ﬀ", "stone fine office ff"),
        ("ὈΔΥΣΣΕΎΣ λόγος", "οδυσσευς λογος"),
        ("İstanbul", "istanbul"),
        ("한국 사람", "한국 사람"),
        ("Ａｂｃ ２", "abc 2"),
        ("Ёлка", "елка"),
        ("Việt Nam", "viet nam"),
        ("naïve résumé", "naive resume"),
        ("co\u00adop\u200bera\u2060tion", "cooperation"),
        ("क़लम", "क़लम"),
    ],
)
def test_one_word_written_in_two_ways(text, same):
    assert folded(text) == folded(same)
    assert folded(unicodedata.normalize("NFD", text)) == folded(unicodedata.normalize("NFC", text)) == folded(same)
    assert folded(unicodedata.normalize("NFKD", text)) == folded(same)


@pytest.mark.parametrize(
    "text, other",
    [
        ("한국", "학교"), ("사람", "소리"), ("가", "각"), ("ガラス", "カラス"), ("はし", "ばし"), ("パリ", "ハリ"), ("мой", "мои"), ("крик й", "крик и"),
        ("ﬅ", "s"), ("ß", "s"), ("㍿", "株"), ("กา", "ก้า"), ("कि", "की"), ("کتاب", "كتب"), ("ⅳ", "i"), ("7 x 8", "7 x 9"), ("1999", "2000"),
    ],
)  # fmt: skip
def test_words_that_differ(text, other):
    assert folded(text) != folded(other)
    assert folded(unicodedata.normalize("NFD", text)) != folded(unicodedata.normalize("NFD", other))


def test_no_two_syllables_of_hangul_are_one():
    syllables = [chr(point) for point in range(0xAC00, 0xD7A4)]
    assert len(set(folded(" ".join(syllables)))) == len(syllables)


def test_ngrams_keep_order():
    hashes = words.split("a b a b c").hashes
    pairs = words.ngrams(hashes, 2)
    assert len(pairs) == 4 and pairs[0] == pairs[2] != pairs[1]
    assert len(words.ngrams(hashes, 6)) == 0
    assert words.ngrams(hashes, 1).tolist() == words.ngrams(hashes[:5], 1).tolist()


def test_hashes_are_those_of_other_machines():
    assert words.split("herd").hashes.tolist() == [3464712237589848716]
    code = "from herd_jax.curation.text import words; print(*words.split('herd Ünïcode 12').folded)"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}).stdout
    assert [int(word) for word in elsewhere.split()] == words.split("herd Ünïcode 12").folded.tolist()


def test_long_texts_are_cut_as_their_parts_are():
    line = "Prose of some length, with 12 signs; it isn't much - well-known...\n"
    once, often = words.split(line), words.split(line * 3000)
    assert often.hashes.tolist() == once.hashes.tolist() * 3000
    assert often.folded.tolist() == once.folded.tolist() * 3000
    assert often.starts[-1] == len(line) * 2999 + once.starts[-1]


def test_one_word_longer_than_a_piece():
    found = words.split("a" * 200_000)
    assert found.lengths.sum() == 200_000 and len(found) == 4


@given(st.text(st.characters(codec=None), max_size=200) | st.text("ab1.,'-)(:/ \n…$%+#é漢\ud800", max_size=80))
def test_any_text_is_covered_once_and_in_order(text):
    found = words.split(text)
    assert (found.starts < found.ends).all() and (found.ends[:-1] <= found.starts[1:]).all()
    covered = np.zeros(len(text), bool)
    for start, end in zip(found.starts, found.ends, strict=True):
        covered[start:end] = True
    assert covered.tolist() == [not char.isspace() for char in text]
    assert len(found.folded) == np.count_nonzero(~found.is_symbol)
    assert (words.split.__wrapped__(text).hashes == found.hashes).all()


@given(st.lists(st.sampled_from(["Dr.", "it's", "(x)", "a-b", "3km", "...", "U.S.", "end.", "x.y-z.com", "漢字"]), max_size=20))
def test_white_space_does_not_change_the_words(chunks):
    assert words.split(" ".join(chunks)).hashes.tolist() == words.split("\n\n".join(chunks)).hashes.tolist()


def test_words_travel_to_other_processes():
    found = words.split("to another process")
    assert pickle.loads(pickle.dumps(found)).hashes.tolist() == found.hashes.tolist()
