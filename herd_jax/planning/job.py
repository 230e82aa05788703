"""The job to plan: a model on hardware, how it is laid out and fed. All that the planner predicts follows from it."""

import dataclasses
import functools
import re
from fractions import Fraction

from jax.sharding import AbstractMesh

from herd_jax.errors import UserError
from herd_jax.machines.hardware import Hardware
from herd_jax.mesh import AXES
from herd_jax.models.config import LlamaConfig
from herd_jax.models.llama import REMAT
from herd_jax.parallel.data import GATHER
from herd_jax.parallel.schedule import PipelineConfig, split_layers
from herd_jax.parallel.table import Table, lower

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "B": 10**9, "T": 10**12}


@dataclasses.dataclass(frozen=True)
class Job:
    """One training step, repeated.

    `batch_per_dp` sequences of `seq_len` tokens a step on each dp rank, in micro-batches of `micro_batch_size` sequences.
    `mean_document_length` in tokens is that of the documents packed in a row; None: a row is one document.
    """

    model_name: str
    model: LlamaConfig
    hardware: Hardware
    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    seq_len: int = 8192
    batch_per_dp: int = 1
    micro_batch_size: int = 1
    pipeline: PipelineConfig = PipelineConfig()
    remat: str = "none"  # none | attention | layer: what the backward recomputes
    gather: str = "step"  # step | layer: how often FSDP gathers the weights
    mean_document_length: float | None = None

    def __post_init__(self):
        for name in (*AXES, "seq_len", "batch_per_dp", "micro_batch_size", "mean_document_length"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UserError(f"{name} is {size}: it must be 1 or more")
        for name, choices in (("remat", REMAT), ("gather", GATHER)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is '{getattr(self, name)}': it must be one of {', '.join(choices)}")
        self.model.check_mesh(self.mesh)
        self.pipeline.check_ranks(self.pp)
        parts = self.tp * self.cp * (2 if self.cp > 1 else 1)
        if self.seq_len % parts:
            halves = " x 2 zigzag chunks" if self.cp > 1 else ""
            raise UserError(
                f"seq_len {self.seq_len} does not divide by tp {self.tp} x cp {self.cp}{halves} = {parts}: choose a multiple of {parts}, "
                "or a smaller tp or cp"
            )
        if self.batch_per_dp % self.micro_batch_size:
            raise UserError(
                f"batch_per_dp {self.batch_per_dp} does not divide by micro_batch_size {self.micro_batch_size}: choose a divisor, or 1"
            )

    @property
    def mesh(self) -> AbstractMesh:
        """Returns the mesh without devices, for code that needs only its shape."""
        return AbstractMesh(tuple(getattr(self, axis) for axis in AXES), AXES)

    @property
    def num_devices(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def num_micro_batches(self) -> int:
        """Returns the number of micro-batches of one dp rank in a step."""
        return self.batch_per_dp // self.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.dp * self.batch_per_dp * self.seq_len

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Returns the number of layers of each stage, in stage order; stage s is chunk s // pp of rank s % pp."""
        return _layers_per_stage(self.model.num_layers, self.pp * self.pipeline.num_chunks)

    @property
    def table(self) -> Table:
        """Returns the pipeline's schedule, made ready to run."""
        return _table(self.pipeline, self.pp, self.num_micro_batches, self.layers_per_stage)


@functools.cache
def _layers_per_stage(num_layers: int, num_stages: int) -> tuple[int, ...]:
    return tuple(len(layers) for layers in split_layers(num_layers, num_stages))


@functools.lru_cache(maxsize=128)  # many jobs of a search have the same schedule, and it takes a while to make
def _table(pipeline: PipelineConfig, num_ranks: int, num_micro_batches: int, layers_per_stage: tuple[int, ...]) -> Table:
    return lower(pipeline.build(num_ranks, num_micro_batches), layers_per_stage)


def parse_tokens(text: str) -> int:
    """Reads a number of tokens: plain (also 16_777_216 or 16,777,216), or with a unit.

    K, M and G are powers of 1024, as batches and sequences are counted (16M is 16,777,216); B and T are powers of 1000, as budgets are
    (15.6T is 15,600,000,000,000). Raises UserError for anything else, and for what is not a whole number above 0.
    """
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)\s*([KMGBT]?)", text.strip(), re.IGNORECASE)
    if match:
        tokens = Fraction(re.sub("[_,]", "", match[1])) * _UNITS[match[2].upper()]
        if tokens > 0 and tokens.denominator == 1:
            return int(tokens)
    raise UserError(
        f"'{text}' is not a number of tokens: give a whole number above 0, or one such as 16M (16 x 1024 x 1024) or 15.6T (decimal)"
    )
