"""URLs that name the same are the same, in deduplication and in block lists; what names another page is another."""

import pytest

from herd_jax.curation.safety import urls
from herd_jax.curation.web_address import host_of, normalise, without_fragment

SAME = [
    ["http://example.org/a", "https://EXAMPLE.org/a", "//example.org/a", "http://example.org:80/a", "https://example.org:443/a", "http://example.org./a",
     "http://user:word@example.org/a", "http://@example.org/a", "http://example.org:/a", "http://example%2Eorg/a", "http://exam\nple.org/a ",
     "http://example.org/./a", "http://example.org/b/../a"],
    ["http://example.org", "http://example.org/", "http://example.org/.", "http://example.org/a/.."],
    ["http://example.org/~who", "http://example.org/%7Ewho", "http://example.org/%7ewho"],
    ["http://example.org/caf\u00e9", "http://example.org/caf%C3%A9", "http://example.org/caf%c3%a9"],
    ["http://münchen.example/x", "http://xn--mnchen-3ya.example/x", "http://MÜNCHEN.example/x"],
    ["http://пример.рф/", "http://xn--e1afmkfd.xn--p1ai"],
    ["http://example.org/?q=%2d1", "http://example.org?q=-1", "https://example.org/?q=-1"],
    ["http://[2001:DB8::1]/x", "http://[2001:db8::1]:80/x"],
    ["http:\\\\example.org\\a".replace("http:\\\\", "http://"), "http://example.org/a"],
]  # fmt: skip
OTHER = [
    "http://example.org/a", "http://example.org/a/", "http://example.org/A", "http://example.org/a?b", "http://example.org/a?b=1", "http://example.org/a?B=1",
    "http://example.org:8080/a", "http://example.org:443/a", "http://www.example.org/a", "http://example.org/a%2Fb", "http://example.org/a/b",
    "http://example.org/a#one", "http://example.org/a#two", "http://example.org/a#!/one", "http://example.org/a%23one", "http://example.com/a",
    "http://example.org/a%3Fb", "http://example.org/a+b", "http://example.org/a%20b", "http://example.org/a//b",
]  # fmt: skip


@pytest.mark.parametrize("same", SAME)
def test_one_page_has_one_name(same):
    assert len({normalise(url) for url in same}) == 1, [normalise(url) for url in same]
    assert len({urls._address(url) for url in same}) == 1
    assert len({host_of(url) for url in same}) == 1


def test_other_pages_have_other_names():
    assert len({normalise(url) for url in OTHER}) == len(OTHER)


def test_what_is_no_url_is_left_as_it_is():
    for text in ("", "doc-17", "urn:isbn:123#4", "mailto:a@b.example", "C:\\texts\\a.txt", "file name#3", "http:///path only"):
        assert normalise(text) == text.strip()
    for odd in ("http://[", "http://]:x/", "http://" + "a" * 500, "//", "http://%ff%00/", "http://a/\ud800", "http://exa mple.org/%zz%"):
        normalise(odd), host_of(odd), urls._address(odd)  # never fails


def test_fragments_of_crawled_pages():
    assert without_fragment("http://a.org/manual.html#section-2") == "http://a.org/manual.html"
    assert without_fragment("http://a.org/#!/one") == "http://a.org/#!/one"
