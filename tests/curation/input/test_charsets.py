"""Labels as the web means them, the characters of vendors, and a few bad bytes in a page."""

import pytest

from herd_jax.curation.input.charsets import codecs_of
from herd_jax.curation.input.decoding import decode

JAPANESE = "これは日本語の文章です。漢字とかなが交じっています。" * 5
KOREAN = "이것은 한국어로 쓴 문장입니다. 띄어쓰기가 있습니다. " * 5
CHINESE = "这是用中文写的一段文字，里面有许多常用的汉字。" * 5
TAIWAN = "這是用中文寫的一段文字，裡面有許多常用的漢字。" * 5


@pytest.mark.parametrize(
    "label, codec, text, rare",
    [
        ("Shift_JIS", "cp932", JAPANESE, "①髙﨑Ⅳ㈱∑"),
        ("x-sjis", "cp932", JAPANESE, "㍻纊"),
        ("windows-31j", "cp932", JAPANESE, "～①"),
        ("euc-kr", "cp949", KOREAN, "똠방각하 뷁 펲시콜라 쓩"),
        ("ks_c_5601-1987", "cp949", KOREAN, "찦차"),
        ("cp949", "cp949", KOREAN, "햏"),
        ("Big5", "big5hkscs", TAIWAN, "嘅喺咗冇"),
        ("gb2312", "gb18030", CHINESE, "镕囍€㙍"),
        ("GBK", "gb18030", CHINESE, "𠮷"),
        ("latin-1", "cp1252", "Das kostet viel und ist größer. " * 5, "€“”’…"),
        ("iso-8859-1", "cp1252", "C'est l'été à la forêt. " * 5, "œ™"),
        ("us-ascii", "cp1252", "plain text " * 5, "“quoted” – é"),
        ("iso-8859-9", "cp1254", "Türkçe bir cümle, ığüşöç. " * 5, "“€"),
        ("tis-620", "cp874", "นี่คือประโยคภาษาไทย " * 5, "“…"),
        ("win-1251", "cp1251", "Это русское предложение. " * 5, "№"),
        ("cp-1253", "cp1253", "Αυτή είναι μια πρόταση. " * 5, "€"),
        ('"utf-8"', "utf-8", "naïve" * 5, "💡"),
        ("iso-2022-kr", "iso2022_kr", KOREAN, "한글"),
        ("johab", "johab", KOREAN, "똠"),
        ("hz-gb-2312", "hz", CHINESE, "中"),
    ],
)
def test_labels_mean_what_the_web_means(label, codec, text, rare):
    text = f"{text}{rare}{text}"
    content = text.encode(codec)
    assert decode(content, charset=label) == text
    if label.isascii() and '"' not in label:
        page = f'<html><head><meta charset="{label}"></head><body><p>'.encode() + content
        assert codecs_of(label) and (decode(page, charset=label, is_html=True) or "").endswith(text)


def test_vendors_characters_in_other_japanese_codes():
    """NEC's and IBM's rows of JIS X 0208, which Python's own codecs of these names lack."""
    assert decode("①".join([JAPANESE] * 2).encode("cp932"), "shift_jis") == decode(to_euc("①".join([JAPANESE] * 2)), "euc-jp")
    for rare in "①⑳Ⅰ㍉㌔№㏍℡㊤㈱㍾纊":
        text = f"{JAPANESE}{rare}ｶﾀ{JAPANESE}"
        assert decode(to_euc(text), "euc-jp") == text
        text = f"{JAPANESE}{rare}{JAPANESE}"
        assert decode(to_iso_2022(text), "iso-2022-jp") == text
    assert decode("丂丄".join([JAPANESE] * 2).encode("euc_jp") + to_euc("①"), "euc-jp").count("丂丄") == 1  # JIS X 0212


def to_jis(character):
    """The row and cell of a character that windows-31j has in two bytes."""
    lead, trail = character.encode("cp932")
    row = ((lead - (0x81 if lead < 0xA0 else 0xC1)) * 2 + (trail >= 0x9F)) + 0x21
    cell = trail - 0x7E if trail >= 0x9F else trail - 0x1F - (trail > 0x7F)
    return bytes((row, cell))


def to_euc(text):
    parts = []
    for character in text:
        content = character.encode("cp932")
        parts.append(bytes(byte | 0x80 for byte in to_jis(character)) if len(content) == 2 else b"\x8e" + content if content[0] > 0x7F else content)
    return b"".join(parts)


def to_iso_2022(text):
    return b"\x1b$B" + b"".join(map(to_jis, text)) + b"\x1b(B"


@pytest.mark.parametrize(
    "codec, label, text",
    [
        ("utf-8", "iso-8859-1", "Viele Grüße aus Köln, schöne Tage! " * 5),
        ("utf-8", "", "Καλημέρα κόσμε " * 5),
        ("utf-8", "windows-1251", "Привет, мир " * 5),
        ("cp932", "shift_jis", JAPANESE),
        ("cp949", "euc-kr", KOREAN),
        ("gb18030", "gbk", CHINESE),
        ("big5hkscs", "big5", TAIWAN),
        ("cp1253", "windows-1253", "Αυτή είναι μια πρόταση. " * 5),
    ],
)
@pytest.mark.parametrize("bad", [b"\xff", b"\x80\x81 ", b"\xfe\xff\n"])
def test_a_few_bad_bytes_cost_no_more_than_themselves(codec, label, text, bad):
    whole = text.encode(codec)
    found = decode(whole + b" " + bad + b" " + whole, charset=label)
    assert found.startswith(text) and found.endswith(text)
    page = b'<meta charset="%s"><p>' % label.encode() + whole + b" " + bad + b" " + whole
    if label:
        assert decode(page, is_html=True).endswith(text)


def test_a_label_that_lies_is_found_out():
    for text, codec, label in (
        (JAPANESE, "euc_jp", "shift_jis"),
        (KOREAN, "cp949", "utf-8"),
        ("Это русское предложение, довольно длинное. " * 5, "cp1251", "utf-8"),
    ):
        assert decode(text.encode(codec), charset=label) == text, (codec, label)


def test_what_no_codec_explains_is_no_text():
    noise = bytes((i * 7919 + i // 3) % 128 + 128 for i in range(3000))
    assert decode(noise, charset="utf-8") is None or "\ufffd" not in decode(noise, charset="utf-8")[:10]


def test_controls_of_the_windows_codes():
    """What windows-1252 has no character for is a control character, as in browsers; five such bytes are no error."""
    assert decode(b"caf\xe9 \x81\x8d\x8f\x90\x9d", charset="latin1") == "café \x81\x8d\x8f\x90\x9d"


def test_unknown_labels():
    assert codecs_of("no such thing") == codecs_of("") == codecs_of("base64") == codecs_of("x-user-defined") == codecs_of("none") == ()


def test_codecs_of_python_that_are_no_charsets():
    for label in ("unicode_escape", "raw_unicode_escape", "punycode", "idna", "rot13", "utf-7", "undefined"):
        assert codecs_of(label) == (), label
    assert decode(b"a\\u0041 plain text", charset="unicode_escape") == "a\\u0041 plain text"
