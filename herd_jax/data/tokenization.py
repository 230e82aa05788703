"""Tokenizes source files in parallel into token streams, holds out a validation split, and writes both and their tokenizer.

Source formats are in `documents.py`, the format on disk in `streams.py`.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from herd_jax.data.documents import Piece, read_documents, work_units
from herd_jax.data.parts import DOCUMENT, validation_rule, write_part, write_streams
from herd_jax.data.source_files import find_files
from herd_jax.errors import UserError
from herd_jax.files import UNFINISHED, user_path
from herd_jax.reliability.lock import only_writer
from herd_jax.text.sentencepiece_training import SAMPLE_BYTES, train_sentencepiece
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer

RESULTS = ("tokenizer", "validation", "train")  # in this order they appear in the target: train completes it
SAMPLE_UNITS = 64  # a trained tokenizer sees the beginnings of at most so many units of work


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `tokenize_files` made; documents, tokens and bytes are pairs (train, validation)."""

    num_documents: tuple[int, int]
    num_tokens: tuple[int, int]
    num_bytes: tuple[int, int]
    skipped: dict[str, int]  # reason -> how many
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{split}: {documents:,} documents, {tokens:,} tokens, {size:,} bytes of text"
            for split, documents, tokens, size in zip(
                ("train", "validation"), self.num_documents, self.num_tokens, self.num_bytes, strict=True
            )
        ]
        lines.append(f"{sum(self.num_bytes) / sum(self.num_tokens):.2f} bytes per token, {self.seconds:.1f} seconds")
        lines += [f"skipped {count:,} {reason}" for reason, count in sorted(self.skipped.items())]
        return "\n".join(lines)


def tokenize_files(
    sources: Sequence[str],
    tokenizer: str | int,
    target: str | Path,
    *,
    text_field: str = "text",
    validation_fraction: float = 0.01,
    processes: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Makes `target/train`, `target/validation` (token streams) and `target/tokenizer`; shows its progress on stderr.

    `sources` are files, directories or globs. `tokenizer` is a name or path for `load_tokenizer`, or the size of a SentencePiece
    vocabulary to train on the sources. Each document is stored as begin token, ids, end token. A document is held out by the hash
    of its text, so copies stay together; of fewer documents than 1 / `validation_fraction`, the one whose size comes nearest to
    that fraction is held out, and a lone document is cut in two at a line end. The bytes written do not depend on `processes` (default:
    all CPUs). Raises UserError for sources without text, a target that exists (unless `overwrite`), and what cannot be written.
    """
    started = time.monotonic()
    target = user_path(target)
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}: it must be at least 0 and less than 1")
    if processes is not None and processes < 1:
        raise UserError(f"processes is {processes}: it must be at least 1")
    if not overwrite and (made := [name for name in RESULTS if (target / name).exists()]):
        raise UserError(f"{target} already holds {', '.join(made)}: name another target, or allow to overwrite it")
    units = work_units(find_files(sources, leave_out=target))
    with only_writer(target):
        unfinished = target / UNFINISHED
        try:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            num_processes = processes or os.cpu_count() or 1
            counts, skipped = _make_results(unfinished, units, tokenizer, text_field, validation_fraction, num_processes)
            for name in reversed(RESULTS):
                shutil.rmtree(target / name, ignore_errors=True)
            for name in RESULTS:
                (unfinished / name).rename(target / name)
        except OSError as error:
            raise UserError(f"{target} cannot be made: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Summary(*counts, dict(skipped), time.monotonic() - started)


def _make_results(
    directory: Path, units: Sequence[list[Piece]], tokenizer: str | int, text_field: str, fraction: float, num_processes: int
) -> tuple[list[tuple[int, int]], Counter[str]]:
    """Makes tokenizer and streams in `directory`; returns (train, validation) documents, tokens, bytes, and what was skipped."""
    (directory / "parts").mkdir(parents=True)
    encoder = _make_tokenizer(tokenizer, units, text_field)
    if encoder.eos_id is None:
        raise UserError(f"tokenizer {tokenizer} has no end token: name it as eos_token in a tokenizer_config.json beside it")
    encoder.save(directory / "tokenizer")
    skipped = _tokenize_units(units, encoder, directory, text_field, num_processes)
    parts = sorted((directory / "parts").glob("*.documents"))
    if not any(part.stat().st_size for part in parts):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UserError(f"the sources hold no text ({reasons or 'nothing in them'}): name others")
    if fraction and (lone := _lone_document(parts, units, text_field)):
        parts = [directory / "parts" / "halves.documents"]
        write_part(encoder, _cut_in_two(lone, fraction), parts[0])
    return write_streams(_used_up(parts), validation_rule(parts, fraction), encoder, directory), skipped


def _make_tokenizer(tokenizer: str | int, units: Sequence[list[Piece]], text_field: str) -> Tokenizer:
    if not isinstance(tokenizer, int):
        return load_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "tokenizer.model"
        train_sentencepiece(_sample_texts(units, text_field), tokenizer, model)
        return load_tokenizer(model)


def _sample_texts(units: Sequence[list[Piece]], text_field: str) -> Iterator[str]:
    """Yields the beginnings of units chosen at random, about as much text from each."""
    chosen = random.Random(0).sample(units, min(len(units), SAMPLE_UNITS))
    for unit in chosen:
        left = SAMPLE_BYTES // len(chosen)
        for text in itertools.chain.from_iterable(read_documents(piece, text_field, Counter()) for piece in unit):
            yield text[:left]
            left -= len(text.encode())
            if left <= 0:
                break


def _tokenize_units(
    units: Sequence[list[Piece]], tokenizer: Tokenizer, directory: Path, text_field: str, num_processes: int
) -> Counter[str]:
    """Writes a part for each unit below `directory/parts` and returns what was skipped."""
    jobs = [(unit, directory / "parts" / f"{i:08d}.documents", text_field) for i, unit in enumerate(units)]
    num_processes = min(num_processes, len(jobs))
    skipped: Counter[str] = Counter()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    if num_processes == 1:
        results = (_tokenize_unit(tokenizer, *job) for job in jobs)
    else:
        results = _parallel_results(jobs, directory / "tokenizer", num_processes)
    with contextlib.closing(results), Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("tokenizing", total=sum(piece.num_bytes for unit in units for piece in unit))
        for unit_skipped, num_bytes in results:
            skipped += unit_skipped
            progress.advance(task, num_bytes)
    return skipped


def _parallel_results(jobs: Sequence[tuple], tokenizer_path: Path, num_processes: int) -> Iterator[tuple[Counter[str], int]]:
    # Fresh processes: the caller may run jax, whose threads do not survive a fork.
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _start_worker, (tokenizer_path,))
    try:
        for future in as_completed([pool.submit(_tokenize_in_worker, *job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError("a tokenizing process was killed, most likely for want of memory: use fewer processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer_path: Path) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt
    _worker_tokenizer = load_tokenizer(tokenizer_path)


def _tokenize_in_worker(unit: list[Piece], part: Path, text_field: str) -> tuple[Counter[str], int]:
    return _tokenize_unit(_worker_tokenizer, unit, part, text_field)


def _tokenize_unit(tokenizer: Tokenizer, unit: list[Piece], part: Path, text_field: str) -> tuple[Counter[str], int]:
    """Writes the unit's part; returns what was skipped and how many source bytes are done."""
    skipped: Counter[str] = Counter()
    write_part(tokenizer, (text for piece in unit for text in read_documents(piece, text_field, skipped)), part)
    return skipped, sum(piece.num_bytes for piece in unit)


def _used_up(parts: Sequence[Path]) -> Iterator[Path]:
    """Yields the parts; removes the tokens of each once it is used."""
    for part in parts:
        yield part
        part.with_suffix(".tokens").unlink()


def _lone_document(parts: Sequence[Path], units: Sequence[list[Piece]], text_field: str) -> str | None:
    """Returns the text of the sources where it is the same in all their documents, else None."""
    hashes = np.unique(np.concatenate([np.unique(np.fromfile(part, DOCUMENT)["hash"]) for part in parts]))
    if len(hashes) > 1:
        return None
    pieces = itertools.chain.from_iterable(units)
    return next(text for piece in pieces for text in read_documents(piece, text_field, Counter()))


def _cut_in_two(text: str, fraction: float) -> list[str]:
    """Cuts the last `fraction` off a text, after a line where there is one; a part left blank is left out."""
    middle = int(len(text) * (1 - fraction))
    cut = text.rfind("\n", 0, middle) + 1 or middle
    return [half for half in (text[:cut], text[cut:]) if half.strip()]
