"""Claim: finding near duplicates is no step of a single process: a reducer holds its share of the band records, and time grows with their number.

    python benchmarks/deduplicate.py --documents 1000000

Signatures are random, but for 5 % of the documents that copy 10 of the 14 bands of an earlier one. Emitters write the records of 50,000 documents
each, reducers take a range of hashes each, one after another in one process, whose peak memory is printed; then the documents to drop are read
back for each emitter and compared with those that were planted.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from herd_jax.curation.deduplication import exchange
from herd_jax.curation.deduplication.duplicates import Reduce
from herd_jax.curation.deduplication.minhash import BAND, MinHash, near_duplicates
from herd_jax.curation.parquet import document_number

BANDS, COPIED_BANDS, COPIES, TASK_DOCUMENTS = 14, 10, 0.05, 50_000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[125_000, 1_000_000])
    parser.add_argument("--reducers", type=int, default=16)
    args = parser.parse_args()
    print(f"{1 / seconds_of_signature(600):,.0f} signatures a second of documents of 600 words, {1 / seconds_of_signature(100):,.0f} of 100 words")
    for num_documents in args.documents:
        with tempfile.TemporaryDirectory() as directory:
            measure(Path(directory), num_documents, args.reducers)


def seconds_of_signature(num_words: int) -> float:
    minhash, shingles = MinHash(BANDS, 8), np.random.default_rng(0).integers(0, 2**64, num_words, np.uint64)
    minhash.signature(shingles)
    start = time.perf_counter()
    for _ in range(500):
        minhash.signature(shingles)
    return (time.perf_counter() - start) / 500


def measure(directory: Path, num_documents: int, num_reducers: int) -> None:
    random = np.random.default_rng(0)
    is_copy = random.random(num_documents) < COPIES
    is_copy[0] = False
    copies = np.flatnonzero(is_copy)
    earlier = (random.random(len(copies)) * copies).astype(np.int64)
    originals = np.maximum.accumulate(np.where(is_copy, 0, np.arange(num_documents)))[earlier]  # the last before it that is no copy
    keys = random.integers(0, 2**64, (num_documents, BANDS), np.uint64)
    keys[copies, :COPIED_BANDS] = keys[originals, :COPIED_BANDS]
    numbers = np.array([document_number(*divmod(i, TASK_DOCUMENTS)) for i in range(num_documents)], np.uint64)
    num_tasks = -(-num_documents // TASK_DOCUMENTS)
    start = time.perf_counter()
    for task in range(num_tasks):
        mine = slice(task * TASK_DOCUMENTS, (task + 1) * TASK_DOCUMENTS)
        records = np.empty(keys[mine].size, BAND)
        records["key"], records["document"] = keys[mine].reshape(-1), np.repeat(numbers[mine], BANDS)
        exchange.write(directory / "bands", task, records)
    emitted = time.perf_counter()
    del keys, records
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rank in range(num_reducers):
        Reduce(directory / "bands", directory / "near", near_duplicates).run(None, rank, num_reducers)
    reduced = time.perf_counter()
    found = [set(exchange.read(directory / "near", task << 32, (task + 1) << 32)["key"].tolist()) for task in range(num_tasks)]
    read = time.perf_counter()
    assert set().union(*found) == set(numbers[copies].tolist()), "the documents found are not those planted"
    size = sum(file.stat().st_size for file in (directory / "bands").iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{num_documents:,} documents: {num_tasks} emitters {emitted - start:.1f} s ({size / 1e6:,.0f} MB), {num_reducers} reducers "
        f"{reduced - emitted:.1f} s ({(reduced - emitted) / num_reducers:.2f} s and {size / num_reducers / 1e6:.0f} MB of records each; peak of the process "
        f"{before / 1e3:,.0f} MB before, {peak / 1e3:,.0f} after), read back {read - reduced:.1f} s; all {len(copies):,} copies found, no other"
    )


if __name__ == "__main__":
    main()
