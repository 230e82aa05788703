"""Claim: the extraction block keeps more of a page's content and code, and leaks less of its navigation, than trafilatura or resiliparse as
they come, and is more than ten times as fast as trafilatura with datatrove's settings.

    python benchmarks/extract.py --html DIR [--pages 40]

DIR holds unpacked documentation, e.g. of the Debian packages debian-handbook, python3.11-doc, libreoffice-help-de, libreoffice-help-fr,
octave-doc, rust-doc and python-statsmodels-doc (`dpkg-deb -x`). Of these sites we know which element is the content and which are
navigation, so each page has a gold text. Needs `pip install trafilatura`, which the project itself does not.
"""

import argparse
import random
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

import lxml.html

# site: part of the path, XPath of the content, XPath of navigation below or beside it
SITES = {
    "handbook": (
        "debian-handbook/html",
        "//body/div[@lang]",
        "//div[@id='banner']|//p[@id='title']|//ul[contains(@class,'docnav')]|//div[@class='toc']",
    ),
    "python": ("python3.11/html", "//div[@role='main']", "//div[@role='navigation']|//div[@class='footer']|//nav|//a[@class='headerlink']"),
    "libreoffice": ("libreoffice/help", "//div[@id='DisplayArea']", "//header|//aside|//footer|//div[@id='DonationFrame']"),
    "octave": ("octave/octave.html", "//body", "//div[@class='header']|//div[@class='nav-panel']"),
    "rust": ("rust-doc/html", "//main", "//nav|//div[@class='out-of-band']|//a[@class='anchor']"),
    "statsmodels": ("statsmodels-doc", "//article|//div[@role='main']", "//nav|//footer|//header|//a[@class='headerlink']"),
}
SILENT = "//script[not(starts-with(@type,'math/tex'))]|//style|//noscript|//template|//comment()|//head|//button|//form"
BLOCKS = frozenset("p div li td th dt dd tr pre br h1 h2 h3 h4 h5 h6 section ul ol table img".split())
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")  # Han and kana: each sign


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=40, help="of each site")
    args = parser.parse_args()
    pages = sample(args.html, args.pages)
    total_bytes = sum(len(html) for site in pages.values() for html, *_ in site)
    print(f"{sum(map(len, pages.values()))} pages, {total_bytes / 2**20:.1f} MiB")
    print(f"{'engine':<24}{'site':<13}{'recall':>8}{'precision':>10}{'nav leaked':>11}{'code exact':>11}{'pages/s':>9}{'MiB/s':>7}")
    for name, extract in engines().items():
        rows, seconds = defaultdict(list), defaultdict(float)
        for site, site_pages in pages.items():
            for html, content, navigation, code in site_pages:
                start = time.process_time()
                text = extract(html) or ""
                seconds[site] += time.process_time() - start
                rows[site].append(score(text, content, navigation, code))
        for site in pages:
            report(name, site, rows[site], seconds[site], sum(len(html) for html, *_ in pages[site]))
        report(name, "all", [row for site in rows.values() for row in site], sum(seconds.values()), total_bytes)


def engines():
    import trafilatura
    from datatrove.data import Document
    from resiliparse.extract.html2text import extract_plain_text

    from herd_jax.curation.input.extraction import Extraction

    block = Extraction()

    def ours(html):
        doc = Document(html, "", metadata={"media_type": "text/html", "url": ""})
        return doc.text if block.filter(doc) is True else ""

    return {
        "trafilatura precision": lambda html: trafilatura.extract(html, favor_precision=True, include_comments=False, deduplicate=True),
        "trafilatura recall": lambda html: trafilatura.extract(html, favor_recall=True, include_comments=False),
        "resiliparse main": lambda html: extract_plain_text(html, main_content=True),
        "resiliparse all": extract_plain_text,
        "herd_jax": ours,
    }


def sample(directory, num_pages):
    """site -> [(html, words of the content, words of the navigation, code blocks)]; pages without 20 words of content are left out."""
    files = [path for path in sorted(directory.rglob("*.html")) if path.is_file() and not path.is_symlink()]
    random.Random(0).shuffle(files)
    pages = defaultdict(list)
    for path in files:
        site = next((site for site, (part, _, _) in SITES.items() if part in str(path)), None)
        if site and len(pages[site]) < num_pages and "genindex" not in path.name:
            page = gold(path.read_text(errors="replace"), *SITES[site][1:])
            if page and page[1].total() >= 20:
                pages[site].append(page)
    return {site: pages[site] for site in SITES if pages[site]}


def gold(html, content_path, navigation_path):
    tree = lxml.html.document_fromstring(html.encode(), parser=lxml.html.HTMLParser(encoding="utf-8", huge_tree=True))
    for element in tree.xpath(SILENT):
        if element.getparent() is not None:
            element.drop_tree()
    navigation = Counter()
    for element in tree.xpath(navigation_path):
        if element.getroottree().getroot() is tree and element.getparent() is not None:
            navigation += words(text_of(element))
            element.drop_tree()
    content = tree.xpath(content_path)
    if not content:
        return None
    for line_break in tree.xpath("//pre//br"):
        line_break.tail = "\n" + (line_break.tail or "")
    code = [text for element in content for pre in element.iter("pre") if (text := lines("".join(pre.itertext())))]
    return html, sum((words(text_of(element)) for element in content), Counter()), navigation, code


def text_of(element):
    parts = []
    for event, node in lxml.etree.iterwalk(element, events=("start", "end")):
        text = node.get("alt", "") + (node.text or "") if event == "start" else node.tail or ""
        parts.append(" " + text if node.tag in BLOCKS else text)
    return "".join(parts)


def words(text):
    return Counter(WORD.findall(text.lower()))


def lines(text):
    return "\n".join(line.rstrip() for line in text.strip("\n").split("\n")).rstrip()


def score(text, content, navigation, code):
    found = words(text)
    common = (found & content).total()
    leaked = ((found - content) & navigation).total()
    exact = sum(block in lines(text) for block in code)
    return common / content.total(), common / max(found.total(), 1), leaked, navigation.total(), exact, len(code)


def report(name, site, rows, seconds, num_bytes):
    recall, precision, leaked, navigation, exact, code = (sum(column) for column in zip(*rows, strict=True))
    print(
        f"{name:<24}{site:<13}{recall / len(rows):8.1%}{precision / len(rows):10.1%}{leaked / max(navigation, 1):11.1%}"
        f"{exact / code if code else float('nan'):11.1%}{len(rows) / seconds:9.0f}{num_bytes / seconds / 2**20:7.1f}"
    )


if __name__ == "__main__":
    main()
