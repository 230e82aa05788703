"""The configuration of a run of several stages: the stages and the gate between two of them. `herd_jax.training.stages.stages` runs them."""

import dataclasses
from collections.abc import Sequence

from herd_jax.data.rows import DataConfig
from herd_jax.errors import UserError
from herd_jax.mesh import MeshConfig
from herd_jax.models.rope import RopeScaling
from herd_jax.parallel.schedule import PipelineConfig


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """What a stage has to show before the next one begins (section 3.4.2 of the paper, which gives no margin); else it trains on.

    `short_margin`: nats a token by which the validation loss on rows of the first stage's `seq_len` may lie above what it was at that stage's
    end (inf: not asked). `needle_recall`: the least share of needles found at each length (the first stage's, doubled up to the stage's own)
    and at each of `num_depths` depths, of `num_samples` needles there (0: not asked); `template` is how they are worded. A stage that fails
    goes on for `round_tokens` (0: a tenth of its tokens) and is asked again, at most `max_rounds` times.
    """

    short_margin: float = 0.02
    needle_recall: float = 1.0
    num_depths: int = 11
    num_samples: int = 4
    template: str = "sentence"
    round_tokens: int = 0
    max_rounds: int = 4

    def __post_init__(self):
        if not self.short_margin >= 0:
            raise UserError(f"train.gate.short_margin is {self.short_margin}: it must be 0 or more nats a token (inf: not asked)")
        if not 0 <= self.needle_recall <= 1:
            raise UserError(f"train.gate.needle_recall is {self.needle_recall}: it must lie between 0 (not asked) and 1")
        for name, least in (("num_depths", 2), ("num_samples", 1), ("round_tokens", 0), ("max_rounds", 0)):
            if getattr(self, name) < least:
                raise UserError(f"train.gate.{name} is {getattr(self, name)}: it must be {least} or more")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a run (`training.stages`); what is None, or 0, is as the run has it.

    `tokens` are trained on before the gate is asked. `learning_rate`, reached after `warmup_steps` of the stage, falls by a cosine until then
    to `final_learning_rate` (None: it stays), or linearly to 0; without it the stage has the run's `optimizer` as it stands, from step 0.
    """

    seq_len: int
    tokens: int
    global_batch_size: int = 0
    num_micro_batches: int = 0
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    learning_rate: float | None = None
    final_learning_rate: float | None = None
    warmup_steps: int = 0
    mesh: MeshConfig | None = None
    pipeline: PipelineConfig | None = None
    data: DataConfig | None = None
    gate: GateConfig | None = None

    def __post_init__(self):
        for name in ("seq_len", "tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of one of train.stages is {getattr(self, name)}: it must be 1 or more")
        if self.learning_rate is None and (self.final_learning_rate is not None or self.warmup_steps):
            raise UserError("one of train.stages has final_learning_rate or warmup_steps without learning_rate: set that too")


def check_order(stages: Sequence[StageConfig]) -> None:
    """Raises UserError for stages that get shorter, or one that differs from the one before it in nothing but its tokens."""
    for number, (before, stage) in enumerate(zip(stages, stages[1:]), start=2):
        if stage.seq_len < before.seq_len:
            lengths = [stage.seq_len for stage in stages]
            raise UserError(f"train.stages have lengths {lengths}, which shrink at stage {number}: order the stages by seq_len")
        if dataclasses.replace(stage, tokens=1, gate=None) == dataclasses.replace(before, tokens=1, gate=None):
            raise UserError(f"stage {number} of train.stages repeats the one before it: give that one more tokens, or this one something new")
