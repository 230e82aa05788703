"""A curation run: from raw files to token streams, continued where it was left."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from herd_jax.config import differences, to_dict
from herd_jax.curation.checks import check
from herd_jax.curation.execution import run_phases
from herd_jax.curation.input.reading import find_inputs, plan_tasks
from herd_jax.curation.phases import CurationPlan
from herd_jax.curation.settings import CurationConfig
from herd_jax.errors import UserError
from herd_jax.files import user_path, write_whole
from herd_jax.reliability.lock import only_writer

_DIGESTED_BYTES = 2**18
# What may differ when a run is continued: how it is run, not what it makes.
EXECUTION = ("executor", "workers", "cluster")


def curate(config: CurationConfig) -> str:
    """Runs what is missing of the run in `config.workdir`; returns what to tell the user.

    Raises UserError for a workdir of another configuration or input, a task that failed, and at the end of a run that left out inputs.
    """
    workdir = user_path(config.workdir)
    try:
        return _curate(config, workdir)
    except OSError as error:
        reason = f"{error.filename or workdir} cannot be read or written: {error.strerror or error}"
        raise UserError(f"{reason}; when the cause is removed, the same command continues") from error


def _curate(config: CurationConfig, workdir: Path) -> str:
    files = find_inputs(config.input, leave_out=workdir)
    phases = CurationPlan(config, workdir, plan_tasks(files)).phases()
    check(config)
    with only_writer(workdir):
        _settle(workdir, config, files)
        run_phases(phases, config.executor, config.workers, config.cluster, workdir / "phases")
    see = f"python -m herd_jax.curate inspect {workdir}"
    if config.executor == "slurm":
        return f"submitted; when the last job has ended, {see}"
    problems = [problem for file in sorted((workdir / "problems").glob("*.json")) for problem in json.loads(file.read_text())]
    if problems:
        reasons = {problem["file"]: problem["reason"] for problem in reversed(problems)}  # the first of each file
        first = ", ".join(f"{file} ({reason})" for file, reason in sorted(reasons.items())[:3])
        raise UserError(
            f"the run is done, but {len(reasons)} inputs were damaged or unreadable, at least in part: {first}; all are listed in "
            f"{workdir / 'problems'}, what came of the rest is shown by {see}"
        )
    trains = f"python -m herd_jax.train --config {workdir / 'train.py'} trains on the result"
    rest = trains if (workdir / "train.py").exists() else "too few are left to train on"
    return f"done; {see} shows what became of each document, and {rest}"


def _settle(workdir: Path, config: CurationConfig, files: Sequence[Path]) -> None:
    """Notes configuration and input in a new workdir; raises UserError where they differ from those of an old one."""
    inputs, contents = {str(file): file.stat().st_size for file in files}, {str(file): _content(file) for file in files}
    settled = {name: value for name, value in to_dict(config).items() if name not in (*EXECUTION, "workdir", "input")}
    note = workdir / "config.json"
    if note.exists():
        old = json.loads(note.read_text())
        if changed := differences(old["config"], settled):
            both = ", ".join(f"{name} is {_value(settled, name)} and was {_value(old['config'], name)}" for name in changed)
            raise UserError(f"{workdir} was made with other settings ({both}): go on with the old ones, or name another workdir")
        known = old.get("contents", contents)  # an older version noted sizes alone
        changed = {name for name, _ in old["inputs"].items() ^ inputs.items()} | {name for name, _ in known.items() ^ contents.items()}
        if names := sorted(changed):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{workdir} was made from other input, such as {', '.join(names[:3])}{more}: restore it, or name another workdir")
        return
    write_whole(note, json.dumps({"config": settled, "inputs": inputs, "contents": contents}, indent=1))


def _content(file: Path) -> str:
    """Returns a digest of a file's content; of a long one, of its ends and the time of its last change."""
    status, digest = file.stat(), hashlib.blake2b(digest_size=8)
    with contextlib.suppress(OSError), file.open("rb") as content:  # reading it will say why it cannot be read
        digest.update(content.read(_DIGESTED_BYTES))
        if status.st_size > _DIGESTED_BYTES:
            content.seek(-_DIGESTED_BYTES, os.SEEK_END)
            digest.update(content.read() + str(status.st_mtime_ns).encode())
    return digest.hexdigest()


def _value(config: dict, name: str) -> str:
    """Returns the value of a dotted name, in few characters."""
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return shorten(json.dumps(config), 60)
