"""What the gate after each stage of a run found and what was decided, in `WORKDIR/stages.jsonl`: a line for each time that it was asked.

"stage" (from 1), "seq_len", "steps" and "tokens" (of the stage, done by then), "short_loss_before" (at the end of the first stage) and
"short_loss" (nats a token), "needle_recall" (length -> depth -> share found), "verdict" ("passed", "trains on" or "stopped"), "reason",
"asked_steps" (that the config asked for), "trains_to" (steps, of a stage that trains on), "gate" (its settings).
"""

import dataclasses
import json
from pathlib import Path

import jax

from herd_jax.config import to_dict
from herd_jax.errors import UserError
from herd_jax.files import write_whole
from herd_jax.reliability.workdir import DECISIONS
from herd_jax.training.config import RunConfig

KEYS = {"stage", "steps", "short_loss", "verdict", "reason", "trains_to", "gate"}  # that every line has


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the gate found; `needle_recall` (length -> depth -> share found) is {} where needles were not asked for."""

    passed: bool
    reason: str
    short_loss: float
    needle_recall: dict[int, dict[float, float]] = dataclasses.field(default_factory=dict)


class Decisions:
    """The decisions about the run in `workdir`, oldest first. Raises UserError where the file cannot be read or written."""

    def __init__(self, workdir: Path) -> None:
        self._path = workdir / DECISIONS
        try:
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
            self._lines = [json.loads(line) for line in text.splitlines()]
            if not all(isinstance(line, dict) and KEYS <= line.keys() for line in self._lines):
                raise ValueError("a line is no decision")
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path} is damaged ({error}): bring back a good copy, or move it away to ask the gates again") from error

    @property
    def short_loss(self) -> float | None:
        """Returns the short-context loss at the end of the first stage; None before."""
        first = self.last(1)
        return first["short_loss"] if first and first["verdict"] == "passed" else None

    def last(self, number: int) -> dict | None:
        """Returns the newest line of a stage; None where there is none."""
        return next((line for line in reversed(self._lines) if line["stage"] == number), None)

    def num_rounds(self, number: int) -> int:
        """Returns how often the stage was made to train on."""
        return sum(line["stage"] == number and line["verdict"] == "trains on" for line in self._lines)

    def add(self, number: int, stage: RunConfig, asked_steps: int, passed: bool, trains_to: int | None, verdict: Verdict) -> dict:
        """Notes and prints what was decided at the end of `stage` as it was trained last, of which the config asked for `asked_steps`; returns
        the line."""
        num_steps = stage.train.num_steps
        line = {"stage": number, "seq_len": stage.train.seq_len, "steps": num_steps, "tokens": stage.train.ramp.tokens_before(num_steps)}
        line |= {"short_loss_before": self.short_loss, "short_loss": verdict.short_loss, "needle_recall": verdict.needle_recall}
        line |= {"verdict": "passed" if passed else "stopped" if trains_to is None else "trains on", "reason": verdict.reason}
        line |= {"asked_steps": asked_steps, "trains_to": trains_to, "gate": to_dict(stage.train.gate)}
        self._lines.append(json.loads(json.dumps(line)))
        if jax.process_index() == 0:
            self._write()
            to = "" if trains_to is None else f" to step {trains_to}"
            print(f"stage {number}, {stage.train.seq_len} tokens, step {num_steps}: {line['verdict']}{to}: {verdict.reason}", flush=True)
        return self._lines[-1]

    def _write(self) -> None:
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in self._lines), sync=True)
