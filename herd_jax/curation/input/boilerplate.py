"""Elements of a page that are not its content: what its tag or role says so of, and what is called so and holds little of the page."""

import re

from resiliparse.parse.html import ElementNode, HTMLTree

MOST = 0.5  # of a page's text: what holds more is its content, whatever it is called
MUCH_TEXT, MUCH_SHARE = 300, 0.1  # characters outside links, and their share of the page's text, of what is no navigation, whatever it is called
_MARK = "data-herd-boilerplate"

# Sidebars are not among them: books set notes in them.
_BY_KIND = [
    "nav, dialog, svg, video, audio, object, iframe, template, rp, rt, [aria-hidden=true]",
    "[role=navigation], [role=search], [role=banner], [role=contentinfo], [role=dialog], [role=menu], [role=menubar]",
    '[style*="display:none" i]:not([class*=math]), [style*="display: none" i]:not([class*=math]), [class*=mwe-math-mathml] ~ img',
    "a.headerlink, a.anchor, a.anchorjs-link, .mw-editsection, .skip-link",
]
SKIPPED = [*_BY_KIND, f"[{_MARK}]"]

_NAVIGATION = frozenset(
    """
    nav menu navigation site-header pagination navheader nav-panel pager social share sharing share-buttons social-links
    advert advertisement
    """.split()
)
_FOOTERS = frozenset({"footer", "site-footer", "navfooter"})
_LONGEST_NAME = 100
_MOST_READ = 16  # times the page's text that is read to measure elements in each other
# What is called after these, and after nothing but furniture beside them, is a notice of the site; a chapter on them is called otherwise.
_NOTICES = "cookies? consent gdpr ccpa newsletters?".split()
_FURNITURE = """
    accept actions? alert app area area asset bar banner block body-?wrap bot bottom box button buttons cc center close cmp col column compliance component
    container content-?wrap custom cybot dialog disclaimer div element eu fixed floating footer form global group header hidden holder id info inner
    inline input item js lang law layer lightbox list main management manager message mc4wp md modal module moove notice notification onetrust open outer
    overlay panel platform plugin policy popin popup preferences privacy prompt root row sdk section settings sidebar sign-?up simple site slide slideup sticky
    subscribe subscription teaser text tnp toast tool top ui uk us user view visible wall warning widget window wp wrap wrapper \\d
""".split()
_NOTICE = re.compile(f"(?=.*(?:{'|'.join(_NOTICES)}))(?:{'|'.join([*_NOTICES, *_FURNITURE])}|[a-z](?![a-z])|[-_.])+", re.IGNORECASE)
_TRAIL = re.compile(r"(?:^|[-_.])(?:breadcrumbs?|navbar|docnav)(?:$|[-_.])", re.IGNORECASE)
_CANDIDATES = ", ".join(
    [
        *(f'[{where}*="{word}" i]' for word in "cookie consent gdpr ccpa newsletter breadcrumb navbar docnav".split() for where in ("id", "class")),
        *(f".{name}, #{name}" for name in sorted(_NAVIGATION | _FOOTERS)),
        *(f"{tag}:not(main {tag}, article {tag}, [role=main] {tag})" for tag in ("header", "footer", "aside")),
        ".header:not(main .header, article .header, :has(h1, h2))",
    ]
)


def mark(tree: HTMLTree, link_text: re.Pattern) -> None:
    """Marks the elements that `SKIPPED` names beside those of its own kinds. `link_text` finds the text of links in that of an element.

    What holds most of the page's text is given back, the largest element first, whether it does so alone or together with others.
    """
    found = tree.body.query_selector_all(_CANDIDATES)
    if not found:
        return
    total, marked = max(len(tree.body.text), 1), []
    left_to_read = _MOST_READ * total
    for element in found:
        text = element.text
        if (left_to_read := left_to_read - len(text)) < 0:
            break
        size = len(link_text.sub("", text).strip())
        if _is_boilerplate(element, size > MUCH_TEXT and size > MUCH_SHARE * total):
            element[_MARK] = ""
            marked.append((size, element))
    if sum(size for size, _ in marked) <= MOST * total:
        return
    marked = [(size, element) for size, element in marked if not element.parent.closest(f"[{_MARK}]")]
    marked.sort(key=lambda pair: pair[0])
    removed = sum(size for size, _ in marked)
    while marked and marked[-1][0] > MUCH_TEXT and removed > MOST * total:
        size, element = marked.pop()
        del element[_MARK]
        removed -= size


def _is_boilerplate(element: ElementNode, has_much: bool) -> bool:
    names = [name for name in (element.id, *element.class_list) if name and len(name) <= _LONGEST_NAME]
    if any(_NOTICE.fullmatch(name) for name in names):
        return True
    lower = {name.lower() for name in names}
    if element.tag == "footer" or lower & _FOOTERS:
        return True
    if has_much:
        return False
    if lower & _NAVIGATION or any(_TRAIL.search(name) for name in names):
        return True
    is_head = element.tag in ("header", "aside") or "header" in lower and not element.query_selector("h1, h2")
    return is_head and not element.matches("main *, article *, [role=main] *")
