"""The configuration of a run of several stages: the stages and the gate between two of them. `herd_jax.training.stages.stages` runs them."""

import dataclasses
from collections.abc import Sequence

from herd_jax.config import NOT_GIVEN, NotGiven
from herd_jax.data.rows import DataConfig
from herd_jax.errors import UserError
from herd_jax.mesh import MeshConfig
from herd_jax.models.rope import RopeScaling
from herd_jax.parallel.schedule import PipelineConfig


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """What a stage has to show before the next one begins (section 3.4.2 of the paper, which gives no margin); else it trains on.

    Short rows are of the first stage's `seq_len`, and their loss is compared with that at the end of the first stage. Needles are looked for
    at the first stage's length, doubled up to the stage's own. A stage that fails goes on for `round_tokens` and is asked again.
    """

    short_margin: float = 0.02  # nats a token by which the loss on short rows may be above the first stage's; inf: not asked
    needle_recall: float = 1.0  # least share of needles found, at each length and depth; 0: not asked
    num_depths: int = 11  # depths at which needles are hidden
    num_samples: int = 4  # needles at each length and depth
    template: str = "sentence"  # how needles are worded: sentence or record
    round_tokens: int = 0  # tokens of further training after a refusal; 0: a tenth of the stage's
    max_rounds: int = 4  # refusals after which the run ends

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
    """One stage of a run (`training.stages`); what is None, or 0, is as the run has it."""

    seq_len: int  # tokens of a sequence
    tokens: int  # trained on before the gate is asked
    global_batch_size: int = 0  # sequences a step; 0: as the run has it
    num_micro_batches: int = 0  # of each dp rank in a step; 0: as the run has it
    rope_theta: float | None = None  # none: as the run has it
    rope_scaling: RopeScaling | None | NotGiven = NOT_GIVEN  # none: no scaling; not given: as the run has it
    learning_rate: float | None = None  # reached after warmup_steps; none: the run's optimizer as it stands, from step 0
    final_learning_rate: float | None = None  # at the end of the stage, by a cosine; none: it stays; 0: linearly
    warmup_steps: int = 0  # steps of the stage in which the rate rises
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
