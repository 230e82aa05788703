"""Makes the data of configs/long_context_small.py out of text files: a tokenizer that holds the words of the records whole, the text as a token
stream, and for each length documents of exactly so many tokens in which records are hidden in the text and asked for again.

    python benchmarks/make_needles.py --source 'docs/**/*.md' --target runs/long-context-data

A record stands in a line of its own, `@ river quartz onyx`, and comes again elsewhere in the text or at its end. So every time but the first it is
a question with its answer (`herd_jax.evaluate needle --template record` asks it).
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from herd_jax.data.documents import find_files
from herd_jax.data.streams import StreamWriter, TokenStream
from herd_jax.data.tokenization import tokenize_files
from herd_jax.evaluation.needles.haystack import TEMPLATES, PromptMaker, draw_needles, text_ids
from herd_jax.text.sentencepiece_training import train_sentencepiece
from herd_jax.text.tokenizer import load_tokenizer

RECORD = TEMPLATES["record"]
VOCAB_SIZE = 2048
SAMPLE_CHARS = 12_000  # of each file, for the tokenizer
SPARSE = {256: 0.0, 512: 0.5, 1024: 0.9, 2048: 0.9}  # see `one_record`
SEVERAL = {2048: 0.5}  # the share of documents by length with several records, see `several_records`
TOKENS = {256: 4_000_000, 512: 2_000_000, 1024: 3_000_000, 2048: 8_000_000}  # of documents by length


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, nargs="+", help="files, directories or globs of text")
    parser.add_argument("--target", required=True, help="gets tokenizer/, text/ and needles-256/ to needles-2048/; what is there is replaced")
    args = parser.parse_args()
    target = Path(args.target)
    shutil.rmtree(target, ignore_errors=True)
    (target / "tokenizer").mkdir(parents=True)
    train_sentencepiece(sample(args.source, target), VOCAB_SIZE, target / "tokenizer" / "tokenizer.model")
    print(tokenize_files(args.source, str(target / "tokenizer"), target / "text", validation_fraction=0.03))
    for length, num_tokens in TOKENS.items():
        write(target, length, "train", num_tokens // length)
        write(target, length, "validation", max(num_tokens // length // 50, 40))
        print(f"{num_tokens // length:,} documents of {length:,} tokens with records in them")


def sample(sources: list[str], target: Path) -> Iterator[str]:
    """The beginning of each file, and as many characters of records."""
    rng = np.random.default_rng(0)
    for file in find_files(sources, leave_out=target):
        text = file.read_text(errors="replace")[:SAMPLE_CHARS]
        yield text
        needles = [needle for _ in range(len(text) // 1000 + 1) for needle in draw_needles(RECORD, [0.0] * 40, rng)]
        yield "".join(RECORD.needle.format(key=needle.key, value=needle.value) for needle in needles)


def write(target: Path, length: int, split: str, num_documents: int) -> None:
    tokenizer = load_tokenizer(target / "tokenizer")
    maker = PromptMaker(RECORD, tokenizer, text_ids(TokenStream(target / "text" / split), tokenizer))
    rng = np.random.default_rng([length, split == "train"])
    documents = [document(maker, length, rng) for _ in range(num_documents)]
    num_bytes = sum(len(tokenizer.decode(ids).encode()) for ids in documents)
    path = target / f"needles-{length}" / split
    with StreamWriter(path, tokenizer.vocab_size, "../../tokenizer", tokenizer.fingerprint) as writer:
        writer.append(np.concatenate(documents), np.full(num_documents, length), num_bytes)


def document(maker: PromptMaker, length: int, rng: np.random.Generator) -> list[int]:
    if length in SEVERAL and rng.random() < SEVERAL[length]:
        return several_records(maker, length, rng)
    return one_record(maker, length, SPARSE[length], rng)


def several_records(maker: PromptMaker, length: int, rng: np.random.Generator) -> list[int]:
    """Text with one to 32 records in it, which come again at its end in another order."""
    num_hidden = int(np.exp(rng.uniform(0, np.log(33))))
    records = [maker.needle_ids(needle) for needle in draw_needles(RECORD, [0.0] * num_hidden, rng)]
    num_text = length - 2 - 2 * sum(map(len, records))
    text = piece(maker, num_text, rng)
    ids = hide(records, np.sort(rng.integers(num_text + 1, size=num_hidden)), text)
    asked = [token for i in rng.permutation(num_hidden) for token in records[i]]
    return [maker.tokenizer.bos_id, *ids, *asked, maker.tokenizer.eos_id]


def one_record(maker: PromptMaker, length: int, sparse: float, rng: np.random.Generator) -> list[int]:
    """Text with one record at two places or more, up to nine tenths of the document, and in half of the documents once more at the end. Few are
    as likely as many: of many it is learnt to read them back, of few to find them from afar. A share `sparse` of the documents has nine at most."""
    room = length - 2  # beside the begin and end tokens
    record = maker.needle_ids(draw_needles(RECORD, [0.0], rng)[0])
    at_end = int(rng.integers(2))
    most = 8 if rng.random() < sparse else 0.9 * room / len(record)
    num_hidden = 1 - at_end + int(np.exp(rng.uniform(0, np.log(most))))
    num_text = room - (num_hidden + at_end) * len(record)
    text = piece(maker, num_text, rng)
    cuts = np.sort(rng.integers(num_text + 1, size=num_hidden))
    cuts[0] *= rng.integers(5) > 0  # a fifth of the documents begin with the record
    return [maker.tokenizer.bos_id, *hide([record] * num_hidden, cuts, text), *record * at_end, maker.tokenizer.eos_id]


def piece(maker: PromptMaker, num_tokens: int, rng: np.random.Generator) -> list[int]:
    start = rng.integers(len(maker.haystack) - num_tokens)
    return maker.haystack[start : start + num_tokens].tolist()


def hide(records: list[list[int]], cuts: np.ndarray, text: list[int]) -> list[int]:
    """The text with a record at each of its cuts."""
    ids, last = [], 0
    for cut, record in zip(cuts, records, strict=True):
        ids += [*text[last:cut], *record]
        last = cut
    return ids + text[last:]


if __name__ == "__main__":
    main()
