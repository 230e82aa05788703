"""Where a run begins: from its newest checkpoint, if its config agrees with the one that the checkpoint keeps, or with initial weights.

Data and weights are the same if their contents are, wherever they lie: checkpoints keep fingerprints of them, and paths are compared only
where an earlier checkpoint has none.
"""

import dataclasses
import json
import math
import os
import textwrap
import time
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from herd_jax.config import differences, parse, to_dict
from herd_jax.data.ramp import Ramp
from herd_jax.errors import UserError
from herd_jax.files import user_path
from herd_jax.reliability.appender import Appender
from herd_jax.reliability.workdir import HISTORY
from herd_jax.text.tokenizer import Tokenizer
from herd_jax.training.checkpoints.local_and_durable import TieredCheckpointer
from herd_jax.training.config import RunConfig
from herd_jax.training.state import State
from herd_jax.training.step import Steps
from herd_jax.training.task import TaskData

GONE = ("skip_nonfinite",)  # fields of `train` that only earlier checkpoints have in their configs

Identities = Mapping[str, Mapping[str, str]]  # "data" and "init_from" -> path -> fingerprint of what is there


class Initial(Protocol):
    """What a run begins with."""

    @property
    def fingerprint(self) -> str:
        """Returns the same text for the same weights, wherever they lie."""

    @property
    def context_length(self) -> int | None:
        """Returns how many tokens the model was made for, if that is known."""

    def load_state(self, steps: Steps, seed: int) -> State:
        """Returns the state before the first step; what is not given is made from `seed`."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError where the weights belong to another tokenizer."""


def identities(config: RunConfig, data: TaskData, initial: Initial | None) -> Identities:
    """Returns what the paths of the config hold now."""
    return {"data": data.fingerprints, "init_from": {config.init_from: initial.fingerprint} if config.init_from and initial else {}}


@dataclasses.dataclass(frozen=True)
class Change:
    """A settled field in which a config differs from that of a checkpoint."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        """Returns what it was before, in brief."""
        before = f"other content at {self.before}" if self.before == self.now else str(self.before)
        return f"{self.name} was {textwrap.shorten(before, 80)}"


def parse_saved(config: dict, kind: type[RunConfig] = RunConfig) -> RunConfig:
    """Returns the config that a checkpoint keeps, without fields that exist no longer; newer fields have their defaults. What only a more special
    kind of run has is left out."""
    given = lambda section: {name: value for name, value in section.items() if (name, value) != ("rope_scaling", None)}  # see config.NotGiven
    train = {name: value for name, value in config.get("train", {}).items() if name not in GONE}
    train |= {"stages": [given(stage) for stage in train.get("stages", ())]}
    own = {field.name for field in dataclasses.fields(kind)}
    values = {**config, "model": given(config.get("model", {})), "train": train}
    return parse(kind, {name: value for name, value in values.items() if name in own})


def changes(record: dict, config: RunConfig, identities: Identities) -> list[Change]:
    """Returns in what `config` contradicts that of the run whose checkpoint has `record`; `identities` are those of now."""
    saved, position = parse_saved(record["config"], type(config)), record["position"]
    known = position.get("identities")
    if known and config.init_from not in identities["init_from"]:  # it is gone: then its name is all that can be compared
        known = {**known, "init_from": {}}
    before = _settled(saved, position["tokens"], config.train.ramp, known)
    now = _settled(config, position["tokens"], config.train.ramp, known and identities)
    names = [name for name in differences(before, now) if any(name == key or name.startswith(key + ".") for key in config.settled)]
    as_written = lambda name, settled, config: _at(to_dict(config) if name.startswith(("data", "init_from")) else settled, name)
    return [Change(name, as_written(name, before, saved), as_written(name, now, config)) for name in names]


def _settled(config: RunConfig, tokens: int, ramp: Ramp, identities: Identities | None) -> dict:
    """Returns the config as a dict, without what has changed no result so far: numbers of micro-batches, later mixtures, annealing to come.

    Paths stand for what `identities` says they hold; where it says nothing, they are compared as they would be opened.
    """

    def identify(kind: str, path: str) -> str:
        return (identities or {}).get(kind, {}).get(path) or os.path.normpath(user_path(path))

    in_order = lambda sources: [[identify("data", path), weight] for path, weight in sources.items()]
    mixtures = [[phase.from_tokens, in_order(phase.sources)] for phase in config.data.phases if phase.from_tokens < tokens]
    tokenizer = "" if identities else config.data.tokenizer  # the sources' fingerprints say it
    found = to_dict(config)
    found["model"] = to_dict(config.model.resolve())
    found["init_from"] = config.init_from and identify("init_from", config.init_from)
    found["data"] |= {"sources": in_order(config.data.sources), "phases": mixtures, "tokenizer": tokenizer}
    found["train"]["phases"] = [{**phase, "num_micro_batches": 0} for phase in found["train"]["phases"]]
    if not config.optimizer.anneal_steps or ramp.step_at(tokens) <= config.optimizer.anneal_from:
        found["optimizer"] |= {"anneal_from": 0, "anneal_steps": 0}
    return found


def _at(config: dict, name: str) -> Any:
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def restore(
    checkpointer: TieredCheckpointer,
    config: RunConfig,
    steps: Steps,
    identities: Identities,
    initial: Initial | None = None,
    last_step: float = math.inf,
) -> tuple[State, dict]:
    """Returns the newest readable state not after `last_step` and its position, else a fresh one, with the `initial` weights if there are any.

    Raises UserError where the config contradicts that of the checkpoint in what `resume.allow` does not name.
    """
    newest = checkpointer.newest()
    if newest is not None:
        _allow(changes(newest[1], config, identities), config, newest[1]["position"]["step"])
    restored = checkpointer.restore(steps.plan.abstract_canonical(), last_step)
    if restored is None:
        if config.init_from and initial is None:
            raise UserError(f"the run has to begin again and its init_from {config.init_from} cannot be read: bring it back")
        return (initial.load_state(steps, config.seed) if initial else steps.plan.init(config.seed)), {"step": 0}
    return steps.plan.from_canonical(restored.state), restored.position


def _allow(found: list[Change], config: RunConfig, step: int) -> None:
    """Raises UserError for a change that is not allowed; notes those that are in the run's history."""
    is_allowed = lambda change: any(change.name == name or change.name.startswith(name + ".") for name in config.resume.allow)
    wrong = [change for change in found if not is_allowed(change)]
    if wrong:
        names = [change.name for change in wrong]
        raise UserError(
            f"the checkpoints in {config.workdir} were made with other values of {', '.join(names)}: give the values they were made with, or "
            f"another workdir, or allow the change from here on with --config.resume.allow={','.join(names)} ({', '.join(map(str, wrong))})"
        )
    if found and jax.process_index() == 0:
        line = {"time": time.time(), "step": step, "changes": {change.name: [change.before, change.now] for change in found}}
        history = Appender(config.directory / HISTORY)
        history.append(json.dumps(line).encode() + b"\n")
        history.close()
