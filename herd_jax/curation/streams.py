"""Clean text -> token streams: their names, a tokenizer for all, parts by task, streams joined from parts."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.classification.categories import MULTILINGUAL
from herd_jax.curation.parquet import rows
from herd_jax.data.parts import validation_rule, write_part, write_streams
from herd_jax.errors import UserError
from herd_jax.files import whole_directory
from herd_jax.text.sentencepiece_training import SAMPLE_BYTES, train_sentencepiece
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer

HIGH = "-high"  # the end of a stream's name
SAMPLE_FILES = 64  # a trained tokenizer sees the beginnings of at most so many files of a category


def load_ending(tokenizer: str | Path) -> Tokenizer:
    """Returns the tokenizer, which has an end token. Raises UserError where it has none or cannot be loaded."""
    found = load_tokenizer(tokenizer)
    if found.eos_id is None:
        raise UserError(f"tokenizer {tokenizer} has no end token: name it as eos_token in a tokenizer_config.json beside it")
    return found


class NameStream(PipelineStep):
    """Notes in "stream" which one a document goes to: that of its category, if that is multilingual also of its language, from a quality of
    `high_quality` on one of its own: general, general-high, multilingual-fr, ..."""

    type = "count"
    name = "stream"

    def __init__(self, high_quality: float | None):
        super().__init__()
        self._high_quality = high_quality

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for doc in data:
            quality = doc.metadata.get("quality")
            is_high = self._high_quality is not None and quality is not None and quality >= self._high_quality
            category = doc.metadata["category"]
            language = f"-{doc.metadata['language']}" if category == MULTILINGUAL else ""
            doc.metadata["stream"] = category + language + (HIGH if is_high else "")
            yield doc


class MakeTokenizer(PipelineStep):
    """Saves the tokenizer `name` (for `load_tokenizer`) to `target`; a number is the size of a SentencePiece vocabulary to train on clean text,
    as much of it from each category."""

    type = "tokens"
    name = "tokenizer"

    def __init__(self, tokenizer: str, clean: Path, target: Path):
        super().__init__()
        self._tokenizer, self._clean, self._target = tokenizer, clean, target

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        if not any(self._clean.glob("*/*.parquet")):
            raise UserError(f"no document is left: see which block dropped them with python -m herd_jax.curate inspect {self._clean.parent}")
        model = self._tokenizer
        if self._tokenizer.isdecimal():
            model = self._target.with_name("trained.model")
            model.parent.mkdir(parents=True, exist_ok=True)
            train_sentencepiece(self._sample(), int(self._tokenizer), model)
        tokenizer = load_ending(model)
        with whole_directory(self._target, overwrite=True) as directory:
            tokenizer.save(directory)
        self._target.with_name("trained.model").unlink(missing_ok=True)

    def _sample(self) -> Iterator[str]:
        files = {category: sorted(category.glob("*.parquet")) for category in sorted(self._clean.glob("*"))}
        for some in files.values():
            chosen = some[:: -(-len(some) // SAMPLE_FILES)]
            for file in chosen:
                left = SAMPLE_BYTES // len(files) // len(chosen)
                for row in rows(file, ["text"]):
                    yield row["text"][:left]
                    left -= len(row["text"].encode())
                    if left <= 0:
                        break


class Tokenize(PipelineStep):
    """Writes a part of each stream: `PARTS/STREAM/TASK.documents` and `.tokens`."""

    type = "tokens"
    name = "tokenize"

    def __init__(self, clean: Path, tokenizer: Path, parts: Path):
        super().__init__()
        self._clean, self._tokenizer, self._parts = clean, tokenizer, parts

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        tokenizer = load_tokenizer(self._tokenizer)
        for file in sorted(self._clean.glob(f"*/{rank:05d}.parquet")):
            directory = self._parts / file.parent.name
            directory.mkdir(parents=True, exist_ok=True)
            write_part(tokenizer, (row["text"] for row in rows(file, ["text"]) if row["text"].strip()), directory / f"{rank:05d}.documents")


class Join(PipelineStep):
    """The i-th of n tasks joins the parts of every n-th stream to `TARGET/STREAM/train` and `validation`."""

    type = "tokens"
    name = "join"

    def __init__(self, parts: Path, tokenizer: Path, target: Path, validation_fraction: float):
        super().__init__()
        self._parts, self._tokenizer, self._target = parts, tokenizer, target
        self._validation_fraction = validation_fraction

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        for directory in sorted(self._parts.glob("*"))[rank::world_size]:
            parts = [part for part in sorted(directory.glob("*.documents")) if part.stat().st_size]
            if parts:
                self._join(parts, self._target / directory.name)

    def _join(self, parts: list[Path], target: Path) -> None:
        rule = validation_rule(parts, self._validation_fraction)
        with whole_directory(target, overwrite=True) as directory:  # of a task that was killed there may be one
            write_streams(parts, rule, load_tokenizer(self._tokenizer), directory, "../../../tokenizer")
