"""The task of pre-training: the next token of packed documents, from token streams (section 3.4 of the paper)."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from herd_jax.data.batches import TOKENS, HostBatch, stream_batches
from herd_jax.data.ramp import Phase
from herd_jax.data.rows import check_vocabulary, load_data_tokenizer, open_streams
from herd_jax.training.config import RunConfig
from herd_jax.training.objectives import next_token
from herd_jax.training.step import Steps
from herd_jax.training.task import Fields, Sums, Task, means_over
from herd_jax.training.validation import Validation


class StreamData:
    """The token streams of a run (`herd_jax.training.task.TaskData`)."""

    def __init__(self, config: RunConfig, steps: Steps) -> None:
        streams, held_out = open_streams(config.data, "train"), open_streams(config.data, "validation")
        check_vocabulary(streams, steps.model.config.vocab_size)
        self.fingerprints = {
            path: f"{train.fingerprint}-{validation.fingerprint}"
            for path, train, validation in zip(config.data.paths, streams, held_out, strict=True)
        }
        self.ramp, self.num_tokens = config.train.ramp, sum(stream.num_tokens for stream in streams)
        self._batches = stream_batches(config.data, streams, self.ramp, config.seed, config.train.num_steps, steps.batch_sharding)
        self.tokenizer = load_data_tokenizer(config.data, streams)
        self._validation = Validation(config, steps, held_out, self.tokenizer)
        self._validation.check(self.ramp.phases)

    def iterate(self, first_step: int) -> Iterator[HostBatch]:
        return self._batches.iterate(first_step)

    def validate(self, params: Any, phase: Phase, heed: Callable[[], None]) -> dict[str, float]:
        return self._validation.metrics(params, phase, heed)


def count_targets(fields: Fields) -> Sums:
    """Returns the number of tokens that have a loss."""
    return {"targets": jnp.sum(fields["loss_mask"], dtype=jnp.float32)}


NEXT_TOKEN = Task(
    "next token",
    {field: TOKENS for field in ("tokens", "targets", "loss_mask", "segment_ids", "positions")},
    next_token,
    count_targets,
    means_over("targets"),
    StreamData,
)
