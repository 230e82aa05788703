"""What a post-training run reads: examples from JSONL files, packed whole into rows, and a held-out part of them (`training.task.TaskData`)."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from herd_jax.data.batches import Batches, HostBatch, seed_of_length, validation_batches
from herd_jax.data.dialogs import Problem, check_problems
from herd_jax.data.packing import Example, PackedRows
from herd_jax.data.ramp import Phase
from herd_jax.errors import UserError
from herd_jax.files import user_path
from herd_jax.interop.load import open_source
from herd_jax.post_training.config import PostTrainConfig
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer
from herd_jax.training.step import Steps

Read = Callable[[str, Tokenizer, int], tuple[list[Example], list[Problem]]]  # (path, tokenizer, most tokens) -> examples and what is no example


class PackedData:
    """The examples of a run. `read` makes those of a source; `most`: see `PackedRows`."""

    def __init__(self, config: PostTrainConfig, steps: Steps, read: Read, most: Mapping[str, int] = {}) -> None:
        self._config, self._steps = config, steps
        self.ramp, self.tokenizer = config.train.ramp, find_tokenizer(config)
        shortest = min(phase.seq_len for phase in self.ramp.phases)
        if not config.data.sources:
            raise UserError("data.sources is empty: name at least one JSONL file, and how often an epoch has it")
        self.fingerprints, train, held_out = {}, [], []
        for path in config.data.paths:
            self.fingerprints[path] = fingerprint(path)
            examples, problems = read(path, self.tokenizer, shortest)
            note = check_problems(path, len(examples), problems, config.examples.most_bad)
            if note and jax.process_index() == 0:
                print(f"note: {note}", flush=True)
            self._check_vocabulary(path, examples)
            split = [is_held_out(example, config.examples.held_out) for example in examples]
            train.append([self._own(example) for example, out in zip(examples, split) if not out])
            held_out.append([self._own(example) for example, out in zip(examples, split) if out])
        if not any(train) or not any(held_out):
            raise UserError(
                f"of {sum(map(len, train)) + sum(map(len, held_out))} examples {sum(map(len, held_out))} are held out: give more, or change examples.held_out"
            )
        self.num_tokens = sum(len(example["tokens"]) for source in train for example in source)
        epochs = [config.data.sources[path] for path in config.data.paths]
        rows = {n: PackedRows(train, epochs, n, seed_of_length(config.seed, n), most) for n in {phase.seq_len for phase in self.ramp.phases}}
        self._held_out = functools.cache(lambda seq_len: PackedRows(held_out, [1] * len(held_out), seq_len, 0, most))
        self._batches = Batches(rows, self.ramp, config.train.num_steps, steps.batch_sharding)

    def iterate(self, first_step: int) -> Iterator[HostBatch]:
        return self._batches.iterate(first_step)

    def validate(self, params: Any, phase: Phase, heed: Callable[[], None]) -> dict[str, float]:
        """Returns the task's means over the held-out examples, in the same rows at every evaluation."""
        task, sharding = self._steps.task, self._steps.batch_sharding
        packed = self._held_out(phase.seq_len)
        rows = [packed[i] for i in range(min(len(packed.plan(0)), self._config.eval.num_batches * phase.global_batch_size))]
        found = []
        for batch in validation_batches(rows, phase, sharding):
            found.append(jax.tree.map(float, self._steps.evaluate(params, batch.to_devices(sharding))))
            heed()
        sums, counts = jax.tree.map(lambda *values: float(np.sum(values)), *found)
        return {f"val_{name}": float(mean) for name, mean in task.means(sums, {name: max(count, 1) for name, count in counts.items()}).items()}

    def _own(self, example: Example) -> Example:
        return {name: example[name] for name in self._steps.task.fields}

    def _check_vocabulary(self, path: str, examples: Sequence[Example]) -> None:
        largest, size = max((int(example["tokens"].max()) for example in examples), default=0), self._steps.model.config.vocab_size
        if largest >= size:
            raise UserError(f"{path} has token {largest} and the model's vocabulary {size}: name the model's own tokenizer in data.tokenizer")


def find_tokenizer(config: PostTrainConfig) -> Tokenizer:
    """Returns the tokenizer of `data.tokenizer`, or that of the model that the run begins with."""
    if config.data.tokenizer:
        return load_tokenizer(config.data.tokenizer)
    workdir = config.directory / "tokenizer"
    tokenizer = load_tokenizer(workdir) if workdir.is_dir() else open_source(config.init_from).tokenizer
    if tokenizer is None:
        raise UserError(f"init_from {config.init_from} has no tokenizer beside it: name one in data.tokenizer")
    return tokenizer


def is_held_out(example: Example, share: float) -> bool:
    """Returns whether an example is one of those that are measured on: by its content, so that the same text is never on both sides."""
    digest = hashlib.sha256(example["tokens"].tobytes()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def fingerprint(path: str) -> str:
    """Returns a text that is the same for the same files, wherever they lie. Raises UserError where there are none."""
    given, digest = user_path(path), hashlib.sha256()
    files: list[Path] = sorted(given.glob("*.jsonl")) if given.is_dir() else [given]
    for file in files:
        try:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        except OSError as error:
            raise UserError(f"data source {path} cannot be read ({error.strerror}): name a JSONL file, or a directory of them") from error
    return digest.hexdigest()
