"""A task: what is trained. The steps, the loop, the stages and the checkpoints are the same for every task.

A batch is a dict of arrays on the mesh: the fields that the model reads (`Llama.micro_batches`), and those of the task, which
reach its objective as they are.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
from jax.sharding import PartitionSpec

from herd_jax.data.batches import HostBatch
from herd_jax.data.ramp import Phase, Ramp
from herd_jax.text.tokenizer import Tokenizer

PyTree = Any
Fields = Mapping[str, jax.Array]
Sums = Mapping[str, jax.Array]  # FP32 scalars by name


class Objective(Protocol):
    def __call__(self, hidden_BTD: jax.Array, output_DV: jax.Array, fields: Fields) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns, for one device's share of a micro-batch, the scalar to minimise and the sums that are logged.

        Fields are [B, T] (for tokens) or [B] (for rows). What is returned is added up over all micro-batches and over (dp, cp), so a value that
        all cp ranks have must be returned as 1 / cp of it on each. Values are equal on every tp rank.
        """


class Stopped(Exception):
    """The run was told to stop while it computes something that the next start can compute again."""


class TaskData(Protocol):
    """What a run reads for a task."""

    ramp: Ramp
    tokenizer: Tokenizer
    num_tokens: int  # of the training data
    fingerprints: Mapping[str, str]  # of the data at each path that the config names

    def iterate(self, first_step: int) -> Iterator[HostBatch]:
        """Returns the batches from `first_step` on, each a function of (seed, step)."""

    def validate(self, params: PyTree, phase: Phase, heed: Callable[[], None]) -> dict[str, float]:
        """Returns metrics on held-out data, "val_loss" among them, in batches of the shape of `phase`. Calls `heed` between two batches, on all
        processes alike: it raises Stopped where the run was told to stop."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained. `objective(vocab_size, weights)` weights what is minimised and not what is logged, so that with weights 1 / (`counts` of the
    whole batch) the scalars of all devices and micro-batches sum to the mean loss, however the batch is cut."""

    name: str
    fields: Mapping[str, PartitionSpec]  # of a batch, those that the model reads among them: data.batches.TOKENS or ROWS
    objective: Callable[[int, Sums], Objective]
    counts: Callable[[Fields], Sums]  # a device's share of a batch -> its share of what means are over (targets, rows, pairs)
    means: Callable[[Sums, Sums], dict[str, jax.Array]]  # (the objective's sums, the counts) -> what is logged, "loss" among it
    open: Callable[[Any, Any], TaskData]  # (RunConfig, Steps) -> what the run reads. Raises UserError for data that does not fit
    has_rewards: bool = False  # whether the model is a reward model, whose head gives a number for a token in place of logits


def means_over(count: str) -> Callable[[Sums, Sums], dict[str, jax.Array]]:
    """Returns the `means` of a task that has one count."""
    return lambda sums, counts: {name: total / counts[count] for name, total in sums.items()}
