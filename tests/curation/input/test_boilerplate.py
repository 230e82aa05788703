"""What is called like boilerplate and holds the page's text is its text; what is called so and is so goes."""

import time

import pytest

from herd_jax.curation.input.extraction import extract_text

TEXT = "The chapter explains how the thing works, and why it was made in the way in which it was made. " * 6
OTHER = "Here is what comes before, in a paragraph of some length about another matter. " * 2
BANNER = "We use cookies to make this site better. By going on you accept them. <a href=/c>Settings</a>"


@pytest.mark.parametrize(
    "attributes",
    [
        'id="module-http.cookies"', 'id="module-http.cookiejar"', 'class="what-is-gdpr"', 'id="informed-consent"', 'class="chocolate-chip-cookies recipe"',
        'class="newsletter-body"', 'id="menu"', 'class="menu"', 'class="share"', 'id="the-age-of-consent"', 'class="section" id="cookies-in-php"',
        'id="gdpr-article-17"', 'class="consent-theory"', 'id="newsletter-2024-05-archive-text"', 'class="breadcrumb-recipes"', 'id="navbars"',
        'class="social"', 'class="advertisement-history"', 'id="cookie-clicker-guide"', 'class="pager"', 'id="sharing"',
    ],
)  # fmt: skip
@pytest.mark.parametrize("tag", ["div", "section"])
def test_content_stays_whatever_it_is_called(attributes, tag):
    page = f"<html><body><p>{OTHER}</p><{tag} {attributes}><h2>A heading</h2><p>{TEXT}</p></{tag}><p>{OTHER}</p></body></html>"
    assert TEXT.strip() in extract_text(page)


@pytest.mark.parametrize("name", ["cookie-banner", "gdpr", "newsletter", "footer"])
def test_what_holds_most_of_the_page_is_given_back(name):
    page = f'<html><body><p>{OTHER}</p><div class="{name}"><p>{TEXT}</p></div></body></html>'
    assert TEXT.strip() in extract_text(page)
    several = "".join(f'<div class="{name}"><p>Part {i}. {TEXT}</p></div>' for i in range(5))
    assert extract_text(f"<html><body><p>{OTHER}</p>{several}</body></html>").count("Part") >= 3


@pytest.mark.parametrize(
    "attributes",
    [
        'id="cookie-banner"', 'class="cookieConsent"', 'class="js-cookie-notice is-visible"', 'id="gdpr-popup"', 'id="onetrust-consent-sdk"',
        'id="CybotCookiebotDialog"', 'class="moove_gdpr_cookie_info_bar"', 'id="eu-cookie-law"', 'class="newsletter-signup-form"', 'class="cookies"',
        'class="cookie_policy__wrapper"', 'id="cmp-consent-modal"', 'class="site-footer"', 'class="breadcrumb"', 'class="c-breadcrumbs"', 'class="navbar navbar-top"',
        'class="share-buttons"', 'id="nav"', 'class="menu"',
    ],
)  # fmt: skip
def test_notices_and_navigation_go(attributes):
    page = f"<html><body><div {attributes}><p>{BANNER}</p></div><h1>Title</h1><p>{TEXT}</p><p>{TEXT}</p></body></html>"
    found = extract_text(page)
    assert "By going on" not in found and found.count(TEXT.strip()) == 2


def test_heads_and_asides_of_pages_without_a_main_part():
    page = "<html><body><header><h1>Site</h1><p>tag line</p></header><aside><p>{}</p></aside><p>" + TEXT + "</p></body></html>"
    assert TEXT.strip() in extract_text(page.format("small")) and "small" not in extract_text(page.format("small"))
    found = extract_text(page.format(f"A long note. {TEXT}"))
    assert "A long note." in found and "tag line" not in found
    inside = f'<html><body><article><p>{TEXT}</p><aside class="cookies-explained"><p>A note on cookies.</p></aside></article></body></html>'
    assert "A note on cookies." in extract_text(inside)
    head = f"<html><body><header><h1>Title</h1><p>{TEXT}</p></header><p>{OTHER}</p></body></html>"
    assert TEXT.strip() in extract_text(head)


@pytest.mark.parametrize("name", ["cookie" + "1" * 60 + "!", "cookielaw" * 9 + "!", "c" * 90 + "cookie?", "cookie" * 16 + "?", "cookie-banner-" * 5000])
def test_hostile_names_take_no_time(name):
    began = time.process_time()
    extract_text(f'<html><body><div id="{name}" class="{name}"><p>{OTHER}</p></div><p>{TEXT}</p></body></html>' * 5)
    assert time.process_time() - began < 5  # of a search that grows with 2^n there would be no end


def test_elements_in_each_other_are_measured_a_few_times():
    deep = '<div class="menu">' * 400 + f"<p>{TEXT * 300}</p>" + "</div>" * 400
    began = time.process_time()
    assert TEXT.strip() in extract_text(f"<html><body>{deep}<p>{OTHER}</p></body></html>")
    assert time.process_time() - began < 20
