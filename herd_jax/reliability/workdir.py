"""The names in a run's workdir, each in one place: what a run writes, and what its readers look for."""

from pathlib import Path

CHECKPOINTS = "checkpoints"
STAGES = "stages"  # a directory a stage, "1-8192", ..., each the workdir of a run
TOKENIZER = "tokenizer"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TIMELINE = "goodput.jsonl"
DECISIONS = "stages.jsonl"  # of the gates between stages
FLIGHT = "flight"  # what the watchdog saw of processes that hung
HISTORY = "history.jsonl"  # of settings that were changed on purpose when the run went on
INCIDENTS = "incidents.jsonl"  # of the supervisor


def stage_name(number: int, seq_len: int) -> str:
    """Returns the name of a stage's directory."""
    return f"{number}-{seq_len}"


def stage_directories(workdir: Path) -> list[Path]:
    """Returns the workdirs of the stages that have begun, in order; none where the run has no stages."""
    return sorted((workdir / STAGES).glob("*-*"), key=lambda path: int(path.name.partition("-")[0]))
