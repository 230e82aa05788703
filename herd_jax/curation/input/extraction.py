"""From a web page to plain text: content, code and formulas stay; navigation, banners and markdown markers go (section 3.1.1 of the paper).

The tree is parsed, and written out as text, by resiliparse; `benchmarks/extract.py` compares it with trafilatura. Before, in the page's
source: code and formulas are put aside behind a token, so that nothing touches them, and the ends of links are marked. After, in the text:
blocks of nothing but links go, then the marks and the markdown, and what was put aside returns.
"""

import dataclasses
import html
import itertools
import re

import numpy as np
from datatrove.data import Document
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from herd_jax.curation.block import Block
from herd_jax.curation.input import boilerplate, mathematics
from herd_jax.errors import UserError

MAX_DEPTH = 512  # browsers stop there too; the time to write a tree out grows with the square
MENU_LINKS = 3  # so many links with nothing but each other around them are a menu
MAIN_SHARE = 0.3  # an element that calls itself the main one, but has less of the text, is not trusted
# Characters for private use; a token is INLINE or BLOCK, a number, END.
INLINE, BLOCK, END, LINK, LINK_END = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004"

_MATHJAX_OUTPUT = ".MathJax, .MathJax_Preview, .MathJax_Display, .MathJax_SVG, .MathJax_SVG_Display, .MathJax_CHTML"

# In the source of a page. A start tag never reaches over the next "<": the search stays linear whatever the input.
_ATTRIBUTES = r"""((?:[^<>"']|"[^"<]*"|'[^'<]*')*)"""
_ENDS = {name: re.compile(rf"</{name}\s*>", re.I) for name in ("script", "style", "pre", "math", "code", "kbd", "samp", "tt")}
_TAG = re.compile(rf"<(?:(!--)|(/a)\s*>|({'|'.join(_ENDS)}|img|a)\b{_ATTRIBUTES}>)", re.I)
_ENDS["!--"] = re.compile("-->")
_TEX_SCRIPT = re.compile(r"""\btype\s*=\s*["']?math/tex""", re.I)
_TEX_IMAGE = re.compile(r"""\bclass\s*=\s*["'][^"']*(?:math|tex\b|latex|equation)""", re.I)
_ALT = re.compile(r"""\balt\s*=\s*(?:"([^"]*)"|'([^']*)')""", re.I)
_DATA_URL = re.compile(r"""=\s*(["'])data:[^"'<>]*\1""")
_LONG_TAG = re.compile(r"<(\w+)[^<>]{8192,}>")  # the parser's time grows with the square of the number of attributes
_NOT_CODE = re.compile(
    r"""<(button)\b[^<>]*>[^<]*</button\s*>|<(\w+)\s[^<>]*\bclass=["']?line-?no(?:s|number|numbers)?\b[^<>]*>[^<]*</\2\s*>""", re.I
)
_LINE_BREAK = re.compile(r"<br\s*/?>", re.I)
_ANY_TAG = re.compile(r"</?[a-zA-Z!][^<>]*>")

# In the source that the parser writes: every element that can has its end.
_DEPTH_STEP = re.compile("<(/)?(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr)[\\s/>])[a-zA-Z]")

# In the text.
_MARKS = re.compile(f"[{INLINE}-{LINK_END}]")
_TOKEN = re.compile(f"(?m)(^[^\\S\n]*)?([{INLINE}{BLOCK}])(\\d{{1,9}}){END}")
_LINK_TEXT = re.compile(f"(?m){LINK}[^{LINK}{LINK_END}\n]*(?:{LINK_END}|$)|^[^{LINK}{LINK_END}\n]*{LINK_END}")
_WORD = re.compile(f"[^\\W\\d_]|[{INLINE}{BLOCK}]")
_BLANK_LINES = re.compile(r"\n\s*\n")
_FENCE = re.compile(r"(?m)^[^\S\n]{0,3}(?:```|~~~)[^`\n]*$\n?")
_FORMULA = re.compile(r"\$\$[^$]{1,2000}\$\$|\$[^$\s](?:[^$\n]{0,500}[^$\s])?\$|\\[(\[](?:[^\\]|\\(?![()\[\]])){1,2000}\\[)\]]")
_MARKDOWN = [  # a character without which there is none, what is found, and the group that stays; bounded lengths bound the time
    # Headings. What begins in lower case is rather a command of root's or C's "# include"; after one "#" alone, the line stands by itself.
    ("#", re.compile(r"(?m)^[^\S\n]{0,3}#{2,6}[^\S\n]+(?![a-z])"), ""),
    ("#", re.compile(r"(?m)(?:(?<=\n\n)|\A)[^\S\n]{0,3}#[^\S\n]+(?![a-z])(?=[^\n]*(?:\n[^\S\n]*\n|\n?\Z))"), ""),
    (">", re.compile(r"(?m)^[^\S\n]{0,3}(?:>(?:[^\S\n]|$))+(?!>)"), ""),  # quotes, and not Python's ">>>" or the ">>" of mail
    ("", re.compile(r"(?m)^[^\S\n]{0,3}(?:(?:[-*_][^\S\n]{0,3}){3,200}|[=~]{3,200})$"), ""),  # rules, underlines
    ("](", re.compile(r"(?<![\w)\]])!?\[([^\[\]\n]{1,500})\]\((?:https?:|mailto:|[/#.])[^()\s]{0,1000}\)"), r"\1"),  # links, images
    ("*", re.compile(r"(?<![\w*\\])(\*{1,3})(?=[^\s*])([^*\n]{1,500})(?<=[^\s*])\1(?![\w*])"), r"\2"),  # *emphasis*
    ("_", re.compile(r"(?<![\w\\])(_{1,3})(?=[^\s_])([^_\n]{1,500}\s[^_\n]{1,500})(?<=[^\s_])\1(?!\w)"), r"\2"),  # _of words_, not __init__
    ("`", re.compile(r"(?<![`\\])`([^`\n]{1,500})`(?!`)"), r"\1"),  # code
]


@dataclasses.dataclass(frozen=True)
class ExtractionConfig:
    """Documents of more than `max_characters` are dropped: longer than any book, they are data, whatever the later blocks would say after
    tens of seconds each. They bound the memory of a worker: 80 bytes each for the densest markup, 0.7 GiB."""

    max_characters: int = 2**23  # above which a document is dropped

    def __post_init__(self):
        if self.max_characters < 1:
            raise UserError(f"curation max_characters is {self.max_characters}: it must be 1 or more")


class Extraction(Block):
    """text/html becomes text/plain; of text/plain the markdown markers go; text/x-code stays as it is."""

    name = "extraction"

    def __init__(self, config: ExtractionConfig = ExtractionConfig()):
        super().__init__()
        self.config = config

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if len(doc.text) > self.config.max_characters:
            return False, "too_long"
        if doc.metadata["media_type"] == "text/html":
            text = extract_text(doc.text)
            if text is None:
                return False, "nested_too_deep"
            doc.text = text
            doc.metadata["media_type"] = "text/plain"
        elif doc.metadata["media_type"] == "text/plain":
            doc.text = strip_markdown(doc.text)
        return True if doc.text and not doc.text.isspace() else (False, "no_content")


def extract_text(page: str) -> str | None:
    """Returns the text of an HTML page, "" where it has none; None where elements are nested more than MAX_DEPTH deep."""
    aside: list[str] = []
    skipped = [*boilerplate.SKIPPED, _MATHJAX_OUTPUT] if "math/tex" in page else boilerplate.SKIPPED
    page = _put_aside(_without_marks(page), aside)
    source = page.encode("utf-8", "replace")
    tree = HTMLTree.parse_from_bytes(source, "utf-8")
    if _may_be_deep(source) and _is_deep(tree):
        return None
    main = tree.document.query_selector("main, [role=main]")
    if main and len(main.text) > MAIN_SHARE * len(tree.body.text):
        tree.body.replace_children(main)
    boilerplate.mark(tree, _LINK_TEXT)
    text = _drop_menus(extract_plain_text(tree, skip_elements=skipped))
    text = _BLANK_LINES.sub("\n\n", _strip_markdown(text, aside))
    return _put_back(text, aside).strip("\n")


def strip_markdown(text: str) -> str:
    """Returns the text without the markers of headings, quotes, rules, links, emphasis and code. What is code or a formula stays as it is."""
    aside: list[str] = []
    return _put_back(_strip_markdown(_without_marks(text), aside), aside)


def _without_marks(text: str) -> str:
    return text if text.isascii() else _MARKS.sub("", text)


def _put_aside(page: str, aside: list[str]) -> str:
    """Returns the page with code and formulas moved to `aside`, tokens in their places, and the text of links between marks."""
    page = _LONG_TAG.sub(r"<\1>", _DATA_URL.sub("", page) if "data:" in page else page)
    parts, position, never_ended = [], 0, set()
    for match in _TAG.finditer(page):
        start, end = match.span()
        if start < position:  # within what was put aside
            continue
        comment, link_end, name, attributes = match.groups()
        name = comment or (name or "").lower()
        parts.append(page[position:start])
        position = end
        if link_end:
            parts.append(f"{LINK_END}</a>")
        elif name == "a":
            parts.append(match[0] + LINK)
        elif name == "img":
            alt = _TEX_IMAGE.search(attributes) and _ALT.search(attributes)
            parts.append(_token(mathematics.delimit(html.unescape(alt[1] or alt[2] or "")), aside) if alt else match[0])
        elif name in never_ended or not (end := _ENDS[name].search(page, position)):
            never_ended.add(name)
            parts.append(match[0])
        else:
            parts.append(_element(name, attributes, page[position : end.start()], aside))
            position = end.end()
    parts.append(page[position:])
    return "".join(parts)


def _element(name: str, attributes: str, content: str, aside: list[str]) -> str:
    match name:
        case "!--" | "style":
            return ""
        case "script":
            return _token(mathematics.delimit(content, attributes), aside) if _TEX_SCRIPT.search(attributes) else ""
        case "math":
            return _token(mathematics.from_mathml(attributes, content), aside)
        case "pre":
            return f"<pre>{_token(_code(content).strip(chr(10)), aside, BLOCK)}</pre>"
        case _:
            return _token(" ".join(_code(content).split()), aside)


def _token(content: str, aside: list[str], kind: str = INLINE) -> str:
    if not content.strip():
        return ""
    aside.append(content)
    return f"{kind}{len(aside) - 1}{END}"


def _code(content: str) -> str:
    if "<" in content:
        content = _ANY_TAG.sub("", _LINE_BREAK.sub("\n", _NOT_CODE.sub("", content)))
    return html.unescape(content)


def _put_back(text: str, aside: list[str]) -> str:
    def content(match: re.Match) -> str:
        indent, kind, index = match[1], match[2], int(match[3])
        inner = aside[index] if index < len(aside) else ""  # a page may spell our marks as entities
        inner = _TOKEN.sub(content, inner) if END in inner else inner
        if kind == INLINE:
            return (indent or "") + inner
        return inner if indent is not None else f"\n{inner}"

    return _MARKS.sub("", _TOKEN.sub(content, text))


def _may_be_deep(source: bytes) -> bool:
    """Returns whether MAX_DEPTH elements may be open at once, for all that start and end tags tell: quick, and never wrongly False."""
    if source.count(b"<") <= MAX_DEPTH:
        return False
    codes = np.frombuffer(source, np.uint8)
    after = codes[np.flatnonzero(codes[:-1] == ord("<")) + 1]
    starts, ends = (after | 32) - ord("a") < 26, after == ord("/")
    return bool((np.cumsum(starts, dtype=np.int64) - np.cumsum(ends, dtype=np.int64)).max(initial=0) > MAX_DEPTH)


def _is_deep(tree: HTMLTree) -> bool:
    steps = (-1 if match[1] else 1 for match in _DEPTH_STEP.finditer(tree.document.html))
    return max(itertools.accumulate(steps), default=0) > MAX_DEPTH


def _drop_menus(text: str) -> str:
    """Leaves out runs of lines in which only links have words, MENU_LINKS or more of them; takes the marks of links away."""
    lines = text.split("\n")
    kept, run, num_links = [], [], 0
    for line, rest in zip(lines, _LINK_TEXT.sub("", text).split("\n"), strict=True):
        if rest and not rest.isspace() and _WORD.search(rest):
            kept += run if num_links < MENU_LINKS else [""]
            kept.append(line)
            run, num_links = [], 0
        else:
            run.append(line)
            num_links += line.count(LINK)
    kept += run if num_links < MENU_LINKS else []
    return "\n".join(kept).replace(LINK, "").replace(LINK_END, "")


def _strip_markdown(text: str, aside: list[str]) -> str:
    fences = list(_FENCE.finditer(text))
    parts, position = [], 0
    for start, end in zip(fences[::2], fences[1::2], strict=False):
        code = text[start.end() : end.start()]
        parts += [text[position : start.start()], _token(code.strip("\n"), aside, BLOCK) + "\n"]
        position = end.end()
    text = "".join([*parts, text[position:]])
    if "$" in text or "\\" in text:
        text = _FORMULA.sub(lambda match: _token(match[0], aside), text)
    for marker, pattern, kept in _MARKDOWN:
        if marker in text:
            text = pattern.sub(kept, text)
    return text
