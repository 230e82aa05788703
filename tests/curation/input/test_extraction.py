"""Pages to text: content, code and formulas stay, navigation and markdown go, and every input gets a verdict in time."""

import pytest
from datatrove.data import Document
from hypothesis import example, given, settings
from hypothesis import strategies as st

from herd_jax.curation.input.extraction import MAX_DEPTH, Extraction, ExtractionConfig, extract_text, strip_markdown
from herd_jax.errors import UserError

PARAGRAPH = "<p>This is a paragraph of the article, long enough to be read.</p>"


def judge(text, media_type="text/html", config=ExtractionConfig()):
    doc = Document(text, "id", metadata={"url": "", "date": "", "source": "", "media_type": media_type})
    return Extraction(config).filter(doc), doc


def body(content):
    return extract_text(f"<html><head><title>T</title></head><body>{content}</body></html>")


def test_content_stays_and_what_says_it_is_no_content_goes():
    text = body(
        "<nav><a href=/>Home</a></nav><header>Site name</header><div class='breadcrumbs'>Here</div><div id='cookie-banner'>cookies</div>"
        f"<main><header><h1>Title</h1></header>{PARAGRAPH}<ul><li>first point</li><li>second point</li></ul><ol><li>step</li></ol>"
        "<dl><dt>term</dt><dd>meaning</dd></dl><table><tr><td>a</td><td>b</td></tr></table><blockquote>quoted</blockquote>"
        "<aside>an aside of the article</aside><details><summary>more</summary>hidden at first</details></main>"
        "<aside>Other sites</aside><script>var x = '<p>script</p>';</script><style>p {}</style><!-- <p>comment</p> -->"
        "<footer>Imprint</footer><div role=navigation>Again</div><noscript>switch it on</noscript><button>Press</button>"
        "<div style='display:none'>never shown</div><div style='color: red; display: none'>hardly shown</div><svg><text>drawn</text></svg>"
    )
    for kept in "Title;This is a paragraph;first point;second point;step;term;meaning;a;b;quoted;an aside of;hidden at first".split(";"):
        assert kept in text
    for gone in "Home;Site name;Here;cookies;Other sites;script;p {};comment;Imprint;Again;switch it on;Press;shown;drawn".split(";"):
        assert gone not in text


def test_navigation_beside_the_main_element_goes_without_a_name():
    page = f"<div><p>Teasers of other articles</p></div><div role=main>{PARAGRAPH * 5}</div><div>Contact</div>"
    assert body(page) == "\n\n".join(["This is a paragraph of the article, long enough to be read."] * 5)
    assert "real content" in body(f"<main>banner</main><div><p>{'the real content is elsewhere ' * 20}</p></div>")


def test_menus_are_links_in_a_row_and_a_link_in_a_sentence_is_none():
    menu = "".join(f"<li><a href=/{i}>Topic {i}</a></li>" for i in range(4))
    text = body(f"<ul>{menu}</ul>{PARAGRAPH}<p>See <a href=/a>that <b>book</b></a> and <a href=/b>this</a>.</p><div>{menu}</div>")
    assert "Topic" not in text
    assert text.endswith("See that book and this.")
    assert "Topic 0" in body(f"{PARAGRAPH}<ul>{menu[: len(menu) // 2]}</ul>{PARAGRAPH}")  # two links are not a menu
    assert "<" not in text and not any("\ue000" <= sign <= "\ue0ff" for sign in text)
    assert "Up: " not in body(PARAGRAPH + "<p><a href=a>Back</a> | <a href=b>Up: all</a> | <a href=c>Next</a></p>")
    assert "of the list" in body("".join(f"<li><a href=/{i}>Item {i}</a>: words of the list</li>" for i in range(5)))


CODE = "def f(x):\n    if x < 3 and x & 1:\n\n\n        return   '**bold**'  # [a](http://b) `c`\n\n# done\n\tend"


@pytest.mark.parametrize("wrap", ["<pre>{}</pre>", "<div><pre><code>\n{}\n</code></pre></div>", "<ul><li><pre>{}</pre></li></ul>"])
def test_code_blocks_stay_to_the_letter(wrap):
    source = CODE.replace("&", "&amp;").replace("<", "&lt;")
    colored = source.replace("return", "<span class='k'>return</span>").replace("\n\tend", "<br/>\tend")
    for shown in (source, colored):
        assert f"\n{CODE}\n" in body(PARAGRAPH + wrap.format(shown) + PARAGRAPH)


def test_code_without_line_numbers_and_buttons_and_inline_code():
    text = body("<pre><button class=copy>Copy</button><span class='lineno'>1</span>x = 1\n<span class=linenos>2</span>y = 2</pre>")
    assert text == "x = 1\ny = 2"
    assert body("<p>Call <code>__init__(*args, **kwargs)</code> or <kbd>a*b*c</kbd>.</p>") == "Call __init__(*args, **kwargs) or a*b*c."


@pytest.mark.parametrize(
    "formula, tex",
    [
        ("<math><semantics><mi>x</mi><annotation encoding='application/x-tex'>x_1 &lt; x_2</annotation></semantics></math>", "$x_1 < x_2$"),
        ("<math display='block' alttext='\\sum_{i} a_{i}*b_{i}*c'><mi>a</mi></math>", r"$$\sum_{i} a_{i}*b_{i}*c$$"),
        ("<math><msup><mi>x</mi><mn>2</mn></msup><mo>=</mo><mfrac><mn>1</mn><mi>y</mi></mfrac></math>", r"$x^{2} = \frac{1}{y}$"),
        ("<math><msqrt><mi>a</mi><mo>+</mo><mi>b</mi></msqrt></math>", r"$\sqrt{a + b}$"),
        ("<math><mroot><mi>a</mi><mn>3</mn></mroot></math>", r"$\sqrt[3]{a}$"),
        ("<math><mfrac><mn>1</mn></mfrac></math>", "$1$"),
        ("<math><msup><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow><mn>2</mn></msup></math>", "${a + b}^{2}$"),
        ("<math><munderover><mo>∑</mo><mi>i</mi><mi>n</mi></munderover><mi>sin</mi></math>", r"$∑_{i}^{n} \mathrm{sin}$"),
        ("<math><mtext>if so</mtext><msub><mi>x</mi><mi>i</mi></msub></math>", r"$\text{if so} x_{i}$"),
        ("<script type='math/tex'>\\frac{a}{b} < c</script>", r"$\frac{a}{b} < c$"),
        ("<i class=MathJax_Preview>a/b</i><i class=MathJax>a b</i><script type='math/tex; mode=display'>a_b</script>", "$$a_b$$"),
        (
            "<i class=katex><i class=katex-mathml><math><semantics><mi>x</mi><annotation encoding='application/x-tex'>x^*</annotation>"
            "</semantics></math></i><i class=katex-html aria-hidden=true>x*</i></i>",
            "$x^*$",
        ),
        ("<mjx-math aria-hidden=true>glyphs</mjx-math><mjx-assistive-mml><math><mi>q</mi></math></mjx-assistive-mml>", "$q$"),
        (
            "<span class=mwe-math-element><span style='display:none'><math alttext='{\\displaystyle x*y*z}'><mi>x</mi></math></span>"
            "<img class='mwe-math-fallback-image-inline' alt='{\\displaystyle x*y*z}' src=x></span>",
            "$x*y*z$",
        ),
        ("<img class='tex' alt='$a_{1}$' src=x>", "$a_{1}$"),
        ("<span class='math'>\\(a_i * b_i * c\\)</span>", r"\(a_i * b_i * c\)"),
        ("<img alt='E = mc^2' src=x>", "E = mc^2"),
    ],
)
def test_formulas_are_tex(formula, tex):
    assert body(f"<p>It is {formula} here.</p>") == f"It is {tex} here."


@pytest.mark.parametrize(
    "plain",
    [
        ">>> print(1)\n1\n>>> for i in range(2):\n...     print(i)\n",
        "  >>> import os\n",
        ">> a reply to a reply\n",
        "# include <stdio.h>\n# define X 1\n\nint main(void) { return f[i](/* x */); }\n",
        "Become root, then\n\n# apt install python3\n\nand wait.",
        "#!/bin/sh\n# Install it.\napt install python3\n",
        "x = f[i](/x) + table[key](#y) + g(a)[0](https://b)",
        "#hashtag and #1 of 3",
        "a > b\nand 2 >= 1",
    ],
)
def test_what_is_no_markdown_stays(plain):
    assert strip_markdown(plain) == plain


def test_headings_and_quotes_go():
    assert strip_markdown("# Title\n\nText.\n\n## Part\nMore.\n\n> quoted\n> > twice\n>\n") == "Title\n\nText.\n\nPart\nMore.\n\nquoted\ntwice\n\n"
    assert strip_markdown("# Über uns\n\n### 1. Anfang\n[link](http://a.b) ![image](/c.png)") == "Über uns\n\n1. Anfang\nlink image"


def test_markdown_markers_go_and_what_only_looks_like_them_stays():
    marked = (
        "# Title\n\n## Part ##x\nSome **bold**, *slanted*, __strong words__, ***both*** and `code_of()`.\n> quoted\n\n---\n\n"
        "A [link](http://x.y/z) and ![picture](/p.png).\nTitle\n=====\n"
    )
    text = strip_markdown(marked)
    assert text == "Title\n\nPart ##x\nSome bold, slanted, strong words, both and code_of().\nquoted\n\n\n\nA link and picture.\nTitle\n\n"
    for plain in (
        "2 * 3 * 4 and a*b*c, f(*args, **kwargs) and __init__ or snake_case_name, *note",
        "#include <x>, #1, C# and 5 > 3, arr[0](x), a[i] (see there)",
        r"$a_{1} * b * c_{1}$ and \[ x_1 *y* z_1 \] and \*no\*",
        "- item\n  - item\n1. first\n• bullet",
    ):
        assert strip_markdown(plain) == plain


def test_fenced_code_stays_to_the_letter():
    fenced = "Text **b**\n```python\n# comment\nx = a **b** c\n```\nmore *e*\n~~~\n*x*\n~~~\n```\nopen *e*"
    assert strip_markdown(fenced) == "Text b\n# comment\nx = a **b** c\nmore e\n*x*\n```\nopen e"


def test_media_types():
    verdict, doc = judge("<p>a page")
    assert verdict is True and (doc.text, doc.metadata["media_type"]) == ("a page", "text/plain")
    verdict, doc = judge("# Title <p>", "text/plain")
    assert verdict is True and (doc.text, doc.metadata["media_type"]) == ("Title <p>", "text/plain")
    verdict, doc = judge("# comment **x**", "text/x-code")
    assert verdict is True and (doc.text, doc.metadata["media_type"]) == ("# comment **x**", "text/x-code")


@pytest.mark.parametrize("page", ["", "\n", "<html></html>", "<nav>Home</nav>", "<script>x</script>", "<p>&nbsp;</p>", "<!-- only", "\0"])
def test_pages_without_content_have_a_reason(page):
    assert judge(page)[0] == (False, "no_content")


def test_pages_in_other_scripts_and_broken_ones():
    assert body("<p dir=rtl>كل الناس <b>يولدون</b> أحرارا</p>") == "كل الناس يولدون أحرارا"
    assert body("<p>一二<em>三</em>四<br>五") == "一二三四\n五"
    assert body("<p>a<p>b<div>c</p></span></div>d") .split() == ["a", "b", "c", "d"]
    assert "kept" in body("<p>kept <pre>never ended <b>x") and "kept" in body("<math><p>kept") and "kept" in body("<p>kept <a href='")
    assert body("<p>lone \ud800 surrogate</p>") == "lone ? surrogate"
    assert body("<p>a &#xE000;7&#xE002; b &#xE001;0&#xE002; c &#xE000;99999999999999&#xE002;</p><pre>x</pre>").startswith("a")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="<>/&;\"'= apre!-mthcodbiu*_#`[]()$\\\n\ue000\ue001\ue002\ue003é\ud800", max_size=200))
@example("<pre><math></pre></math>")
@example("<a<a<a<!--<pre")
def test_any_string_gets_a_verdict(text):
    for media_type in ("text/html", "text/plain"):
        verdict, doc = judge(text, media_type)
        assert verdict is True or verdict[0] is False
        assert not any("\ue000" <= sign <= "\ue004" for sign in doc.text) or verdict is not True


def test_deep_pages_have_a_reason_and_wide_ones_pass():
    assert judge("<div>" * 100_000 + "text")[0] == (False, "nested_too_deep")
    assert judge("<b>" * 100_000 + "text")[0] is not None
    assert judge("<div>" * (MAX_DEPTH - 1) + "text")[0] is True
    verdict, doc = judge("line<br>" * 3 * MAX_DEPTH + "<p>text" * 3 * MAX_DEPTH)
    assert verdict is True and doc.text.count("line") == doc.text.count("text") == 3 * MAX_DEPTH
    assert judge("<math>" + "<mrow>" * 50_000 + "x")[0] is not None
    assert judge("<p>y<math>" + "<mrow>" * 5_000 + "x</math>")[0] is True


HOSTILE = {
    "words": "word ",
    "starts of links": "<a ",
    "starts of pre": "<pre>",
    "comments": "<!--",
    "quotes": '<a "',
    "attributes": "<p " + " a=1" * 200_000 + ">",
    "annotations": "<math><annotation tex tex tex ",
    "links": "<a href=x>y</a>",
    "breaks": "<br>",
    "depth": "<i><br>",
    "ampersands": "&amp;",
    "stars": "**a ",
    "underscores": "_a b",
    "rules": "- ",
    "fences": "```python\n",
    "brackets": "[a](",
    "dollars": "$a ",
    "backslashes": "\\(\\[",
    "blank lines": "\n \n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pages_end_in_time(name):
    """Each takes a second or so; quadratic time would take minutes."""
    text = (HOSTILE[name] * (2**20 // len(HOSTILE[name]) + 1))[: 2**20]
    for media_type in ("text/html", "text/plain"):
        verdict, _ = judge(text, media_type)
        assert verdict is True or verdict[1] in ("no_content", "nested_too_deep")


def test_fifty_megabytes_on_one_line():
    page = "<p>" + "word " * 10_000_000
    assert judge(page)[0] == (False, "too_long")
    verdict, doc = judge(page[:8_000_002])
    assert verdict is True and doc.text == page[3:8_000_002]
    assert judge(page, "text/plain")[0] == (False, "too_long")


def test_settings():
    with pytest.raises(UserError, match="curation max_characters is 0"):
        ExtractionConfig(max_characters=0)
