"""Formulas in HTML as TeX between dollar signs: from an annotation or alternative text where the page has one, else from MathML itself."""

import html
import re

from resiliparse.parse.html import ElementNode, HTMLTree

MAX_DEPTH = 100  # of a formula; what lies deeper is read as plain text
_ANNOTATION = re.compile(r"<annotation\b[^<>]{0,200}\btex\b[^<>]{0,200}>([^<]*)<", re.IGNORECASE)
_ALTTEXT = re.compile(r"""\balttext\s*=\s*(?:"([^"]*)"|'([^']*)')""", re.IGNORECASE)
_DISPLAY = re.compile(r"""\b(?:display\s*=\s*["']?block|mode\s*=\s*["']?display)""", re.IGNORECASE)
_STYLE = re.compile(r"\{\\(?:displaystyle|textstyle)\s(.*)\}", re.DOTALL)
_DELIMITED = re.compile(r"\$.*\$|\\\(.*\\\)|\\\[.*\\\]", re.DOTALL)
# Elements of MathML whose children play roles, and how many have to be there; the children of all others stand in a row.
_TEMPLATES = {
    "mfrac": (r"\frac{{{0}}}{{{1}}}", 2),
    "msup": ("{0}^{{{1}}}", 2),
    "msub": ("{0}_{{{1}}}", 2),
    "msubsup": ("{0}_{{{1}}}^{{{2}}}", 3),
    "munder": ("{0}_{{{1}}}", 2),
    "mover": ("{0}^{{{1}}}", 2),
    "munderover": ("{0}_{{{1}}}^{{{2}}}", 3),
    "mroot": (r"\sqrt[{1}]{{{0}}}", 2),
}


def delimit(tex: str, attributes: str = "") -> str:
    """Returns `$tex$`, or `$$tex$$` where the attributes say that it stands on a line of its own; what has delimiters keeps them."""
    tex = tex.strip()
    if match := _STYLE.fullmatch(tex):
        tex = match[1].strip()
    if not tex or _DELIMITED.fullmatch(tex):
        return tex
    return f"$${tex}$$" if _DISPLAY.search(attributes) else f"${tex}$"


def from_mathml(attributes: str, content: str) -> str:
    """Returns the formula of `<math ATTRIBUTES>CONTENT</math>`, both as they stand in the page."""
    if match := _ANNOTATION.search(content):
        tex = html.unescape(match[1])
    elif match := _ALTTEXT.search(attributes):
        tex = html.unescape(match[1] or match[2] or "")
    else:
        tex = _tex(HTMLTree.parse(f"<math>{content}</math>").document.query_selector("math"))
    return delimit(tex, attributes)


def _tex(node: ElementNode, depth: int = 0) -> str:
    children, child = [], node.first_element_child
    while child is not None:
        if not child.tag.startswith("annotation"):
            children.append(child)
        child = child.next_element_sibling
    if not children or depth > MAX_DEPTH:
        text = " ".join(node.text.split())
        if node.tag == "mtext":
            return rf"\text{{{text}}}"
        return rf"\mathrm{{{text}}}" if node.tag == "mi" and len(text) > 1 else text
    parts = [_tex(child, depth + 1) for child in children]
    if node.tag in _TEMPLATES:
        template, num_parts = _TEMPLATES[node.tag]
        if template.startswith("{0}") and " " in parts[0]:
            parts[0] = f"{{{parts[0]}}}"
        if len(parts) == num_parts:
            return template.format(*parts)
    match node.tag:
        case "msqrt":
            return rf"\sqrt{{{' '.join(parts)}}}"
        case "mtable":
            return r" \\ ".join(parts)
        case "mtr":
            return " & ".join(parts)
    return " ".join(parts)
