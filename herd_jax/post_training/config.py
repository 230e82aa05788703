"""The configurations of post-training runs: each is a training run's, in which `data.sources` are JSONL files and how often an epoch has them."""

import dataclasses
from typing import ClassVar

from herd_jax.errors import UserError
from herd_jax.training.config import RunConfig
from herd_jax.training.objectives import DPO_KINDS


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """How records become examples."""

    most_bad: float = 0.01  # share of a source's records that may be left out because they cannot be trained on
    held_out: float = 0.05  # share of the examples that evaluations measure on, chosen by their content; never trained on

    def __post_init__(self):
        if not 0 <= self.most_bad < 1 or not 0 < self.held_out < 1:
            raise UserError(f"examples has most_bad {self.most_bad} and held_out {self.held_out}: both are shares, held_out more than 0")


@dataclasses.dataclass(frozen=True)
class PreferencesConfig(ExamplesConfig):
    """How preferences become examples."""

    share_prompt: bool = True  # the prompt stands once before its responses (section 4.1.2); false: once for each
    most_responses: int = 16  # in a row; even

    def __post_init__(self):
        super().__post_init__()
        if self.most_responses < 2 or self.most_responses % 2:
            raise UserError(f"examples.most_responses is {self.most_responses}: it must be even, and 2 or more")


@dataclasses.dataclass(frozen=True)
class PostTrainConfig(RunConfig):
    """A run that begins with a model."""

    settled: ClassVar = (*RunConfig.settled, "examples.held_out", "examples.share_prompt", "examples.most_responses", "dpo", "reference")

    def __post_init__(self):
        super().__post_init__()
        if not self.init_from:
            raise UserError("init_from is empty: name the model that is trained on, the pre-trained one for SFT and the reward model, that of SFT for DPO")
        if self.train.stages or self.data.phases:
            raise UserError("post-training has no train.stages and no data.phases: leave them out")
        if not self.data.document_mask:
            raise UserError("data.document_mask is false, and packed examples must not see each other: leave it out")


@dataclasses.dataclass(frozen=True)
class SftConfig(PostTrainConfig):
    """What `python -m herd_jax.post_train sft` reads (section 4.1.3)."""

    examples: ExamplesConfig = ExamplesConfig()


@dataclasses.dataclass(frozen=True)
class RewardConfig(PostTrainConfig):
    """What `python -m herd_jax.post_train reward` reads (section 4.1.2)."""

    examples: PreferencesConfig = PreferencesConfig()


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """The loss of DPO (section 4.1.4)."""

    beta: float = 0.1  # the paper's
    nll: float = 0.2  # share of the cross-entropy of the chosen response; the paper's
    masks_format: bool = True  # the tokens that end a turn do not count in the preference
    label_smoothing: float = 0.0  # share of pairs whose order is taken to be wrong
    kind: str = "sigmoid"  # or ipo
    by_length: bool = False  # means over a response's tokens in place of sums

    def __post_init__(self):
        if self.kind not in DPO_KINDS:
            raise UserError(f"dpo.kind is '{self.kind}': it must be one of {', '.join(DPO_KINDS)}")
        if not self.beta > 0 or self.nll < 0 or not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"dpo has beta {self.beta}, nll {self.nll}, label_smoothing {self.label_smoothing}: more than 0, 0 or more, from 0 to less than 0.5")
        if self.kind == "ipo" and self.label_smoothing:
            raise UserError("dpo.kind is ipo, which has no label_smoothing: set it to 0")


@dataclasses.dataclass(frozen=True)
class DpoConfig(PostTrainConfig):
    """What `python -m herd_jax.post_train dpo` reads."""

    examples: PreferencesConfig = PreferencesConfig()
    dpo: PreferenceLoss = PreferenceLoss()
    reference: str = ""  # the model that the policy shall not leave far behind; empty: init_from
    reference_cache: str = "runs/reference"  # directory of the reference's log-probabilities, shared by runs


STAGES = {"reward": RewardConfig, "sft": SftConfig, "dpo": DpoConfig}  # by command
