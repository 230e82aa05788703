"""What a small data set is worth (section 3.1.3 of the paper): a half-trained model is annealed twice, with 30 % of its batches from the
candidate and with none, and the two are compared in bits per byte of held-out text. Cheaper than scaling laws for each small data set.

The interval of a difference is that of the held-out rows, on which both are measured. Of another seed of the training it knows nothing.
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.special import stdtrit

from herd_jax.data.batches import validation_batches
from herd_jax.data.rows import MixPhase, load_data_tokenizer, open_streams, validation_rows
from herd_jax.errors import UserError
from herd_jax.evaluation.evaluation import Evaluation
from herd_jax.files import user_path, whole_directory
from herd_jax.interop.load import load_params, open_source
from herd_jax.mesh import make_mesh, request_cpu_devices
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.reliability.workdir import CHECKPOINTS
from herd_jax.training.checkpoints.checkpoint import Checkpointer
from herd_jax.training.config import RunConfig, build_steps
from herd_jax.training.loop import train
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.resume import parse_saved
from herd_jax.training.validation import HeldOutLoss, source_names

COMMAND = "dataset-value"
TOTAL = "default mix"


def dataset_value(
    evaluation: Evaluation, candidate: str, share: float = 0.3, num_tokens: int | None = None, held_out: Sequence[str] = ()
) -> str:
    """Trains both anneals, writes `dataset-value.json` and returns its table. What is evaluated is the workdir of a run, on the run's mesh
    where the evaluation has none.

    They begin with the checkpoint that is nearest to half of the run's steps, optimizer and all, go on for `num_tokens` (default: a tenth of
    those that it has seen; the paper's 8B: 40B) while the rate falls linearly to 0, and are measured on the held-out rows of the run's
    sources, of the candidate and of `held_out`: directories made by herd_jax.tokenize. Where interrupted, the same command goes on. Raises
    UserError for a run without a checkpoint to begin with, and as training does.
    """
    if not 0 < share < 1:
        raise UserError(f"--share is {share}: it must lie between 0 and 1, without both")
    mesh = evaluation.mesh
    if mesh:
        with contextlib.suppress(RuntimeError):  # jax has started, on devices that the mesh then fits or is refused for
            request_cpu_devices(mesh)
    checkpoint, config = _half_trained(user_path(evaluation.path))
    if mesh:
        config = dataclasses.replace(config, mesh=mesh, pipeline=PipelineConfig())
    step, fraction = int(checkpoint.name), int(checkpoint.name) / config.train.num_steps
    arms = {name: _annealed(config, step, num_tokens, chosen, share) for name, chosen in (("default", None), ("candidate", candidate))}
    sources = list(dict.fromkeys((*arms["candidate"].data.paths, *held_out)))
    _check_readable(arms["candidate"], sources)  # before hours of training
    places = {}
    for name, arm in arms.items():
        places[name] = evaluation.directory / COMMAND / name
        _begin(places[name], checkpoint)
        train(dataclasses.replace(arm, workdir=str(places[name])), NEXT_TOKEN)
    losses = held_out_losses([checkpoint, *places.values()], arms["candidate"], sources)
    defaults = [name for name, path in zip(source_names(sources), sources) if path in arms["default"].data.paths]
    for found in losses:
        found[TOTAL] = SourceLoss([group for name in defaults if name in found for group in found[name].groups])
    table = {name: _row(*(found[name] for found in losses)) for name in losses[0]}
    ramp, steps_taken = config.train.ramp, arms["default"].train.num_steps
    trained = ramp.tokens_before(steps_taken) - ramp.tokens_before(step)
    settings = {"candidate": candidate, "share": share, "tokens": trained, "steps": steps_taken - step, "held_out": list(held_out)}
    settings |= {"checkpoint_step": step, "fraction_of_run": fraction, "data": arms["candidate"].data.mixtures[-1]}
    (stream,) = open_streams(dataclasses.replace(config.data, sources={candidate: 1.0}, phases=()), "train")
    epochs = share * trained / stream.num_tokens
    path = evaluation.write(COMMAND, settings, {"bits_per_byte": table, "candidate_epochs": epochs})
    return _report(candidate, settings, epochs, table, path)


@dataclasses.dataclass(frozen=True)
class SourceLoss:
    """The loss on one source, by groups of held-out rows: a group has one row for each dp rank."""

    groups: Sequence[HeldOutLoss]

    @property
    def bits_per_byte(self) -> float:
        return HeldOutLoss.total(self.groups).bits_per_byte


def held_out_losses(models: Sequence[str | Path], config: RunConfig, sources: Sequence[str]) -> list[dict[str, SourceLoss]]:
    """Measures each model, in whatever format, on the held-out rows of each source that has any: `eval.num_batches` batches of it, as `config`
    trains."""
    data = dataclasses.replace(config.data, sources=dict.fromkeys(sources, 1.0), phases=())
    steps, streams = build_steps(config, make_mesh(config.mesh), NEXT_TOKEN), open_streams(data, "validation")
    tokenizer, sharding = load_data_tokenizer(data, streams), steps.batch_sharding
    num_bytes = np.array([tokenizer.num_bytes(token_id) for token_id in range(tokenizer.vocab_size)])
    trained, dp = config.train.ramp.phase_at(config.train.num_steps - 1), steps.layout.mesh.shape["dp"]
    num_rows = config.eval.num_batches * trained.global_batch_size * len(sources)
    rows = validation_rows(streams, trained.seq_len, num_rows, data.document_mask)
    phase = dataclasses.replace(trained, global_batch_size=dp, num_micro_batches=1)

    def measure(params, rows) -> SourceLoss:
        groups = []
        for first, batch in zip(range(0, len(rows), dp), validation_batches(rows, phase, sharding)):
            sums, counts = steps.evaluate(params, batch.to_devices(sharding))
            group = [rows[i] for i in range(first, min(first + dp, len(rows)))]
            size = sum(int(num_bytes[row["targets"][row["loss_mask"]]].sum()) for row in group)
            groups.append(HeldOutLoss(float(sums["loss"]), float(counts["targets"]), size))
        return SourceLoss(groups)

    found = []
    for model in models:
        params = load_params(open_source(model), steps.layout, steps.model.declared, jnp.float32)
        found.append({name: measure(params, of_source) for name, of_source in zip(source_names(sources), rows) if len(of_source)})
    return found


def half_interval(default: SourceLoss, candidate: SourceLoss) -> float | None:
    """Returns half of the 95 % interval of candidate less default, in bits per byte: the standard error of the ratio of bits (the difference
    on each group) to bytes over the groups, times Student's quantile for their number. None of fewer than two."""
    num_groups = len(default.groups)
    if num_groups < 2:
        return None
    bits_G = np.array([b.nats - a.nats for a, b in zip(default.groups, candidate.groups, strict=True)]) / math.log(2)
    bytes_G = np.array([group.num_bytes for group in default.groups])
    residual_G = bits_G - bits_G.sum() / bytes_G.sum() * bytes_G
    error = math.sqrt(num_groups / (num_groups - 1) * (residual_G**2).sum()) / bytes_G.sum()
    return float(error * stdtrit(num_groups - 1, 0.975))


def _half_trained(workdir: Path) -> tuple[Path, RunConfig]:
    """Returns the directory of the checkpoint nearest to half of the run's steps, and the run's config."""
    checkpointer = Checkpointer(workdir / CHECKPOINTS, keep=1)
    config = checkpointer.config() if workdir.is_dir() else None
    if config is None:
        raise UserError(f"{workdir} has no readable checkpoint: --run is the workdir of a run of herd_jax.train")
    config = parse_saved(config)
    annealed_from = config.optimizer.anneal_from if config.optimizer.anneal_steps else config.train.num_steps
    steps = [step for step in checkpointer.steps() if config.optimizer.warmup_steps <= step <= annealed_from]
    if not steps:
        raise UserError(
            f"{workdir} has no checkpoint after optimizer.warmup_steps and before optimizer.anneal_from: keep more of them with checkpoint.keep"
        )
    half = min(steps, key=lambda step: abs(2 * step - config.train.num_steps))
    return workdir / CHECKPOINTS / str(half), config


def _annealed(config: RunConfig, step: int, num_tokens: int | None, candidate: str | None, share: float) -> RunConfig:
    """Returns the run's config with its end from `step` on: the mixture that the run has there, or that and the candidate."""
    ramp, start = config.train.ramp, config.train.ramp.tokens_before(step)
    num_steps = ramp.step_at(start + (start // 10 if num_tokens is None else num_tokens)) - step
    if num_steps < 1:
        raise UserError(f"--tokens is {num_tokens}: it must be 1 or more")
    phases = tuple(phase for phase in config.data.phases if phase.from_tokens < start)
    mixture = (phases[-1] if phases else config.data).sources
    if candidate is not None:
        mixture = {path: (1 - share) * weight / sum(mixture.values()) for path, weight in mixture.items()}
        mixture[candidate] = share + mixture.get(candidate, 0.0)
        phases = (*phases, MixPhase(start, mixture))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, phases=phases),
        train=dataclasses.replace(config.train, num_steps=step + num_steps),
        optimizer=dataclasses.replace(config.optimizer, anneal_from=step, anneal_steps=num_steps),
    )


def _check_readable(config: RunConfig, sources: Sequence[str]) -> None:
    for split in ("train", "validation"):
        open_streams(config.data, split)
    open_streams(dataclasses.replace(config.data, sources=dict.fromkeys(sources, 1.0), phases=()), "validation")


def _begin(workdir: Path, checkpoint: Path) -> None:
    """Copies the checkpoint to where a run that begins with it looks, unless that run has begun."""
    target = workdir / CHECKPOINTS / checkpoint.name
    if target.parent.exists():
        return
    try:
        with whole_directory(target.parent) as directory:
            shutil.copytree(checkpoint, directory / checkpoint.name)
    except OSError as error:
        raise UserError(f"cannot copy {checkpoint} to {workdir} ({error.strerror or error}): mend that, or give another --output") from error


def _row(before: SourceLoss, default: SourceLoss, candidate: SourceLoss) -> dict[str, float | None]:
    row = {"before": before.bits_per_byte, "default": default.bits_per_byte, "candidate": candidate.bits_per_byte}
    return row | {"difference": row["candidate"] - row["default"], "half_interval": half_interval(default, candidate)}


def _report(candidate: str, settings: dict[str, Any], epochs: float, table: dict[str, dict[str, float | None]], path: Path) -> str:
    head = "bits per byte, held out"
    width = max(map(len, (head, *table)))
    lines = [
        f"annealed from step {settings['checkpoint_step']} ({settings['fraction_of_run']:.0%} of the run) for {settings['tokens']:,} tokens, "
        f"{settings['share']:.0%} of them from {candidate} ({epochs:.2g} epochs)",
        f"{head:<{width}}  {'before':>8}  {'default':>8}  {'candidate':>9}  {'difference':>10}   95 %",
    ]
    for name, row in table.items():
        interval = "" if row["half_interval"] is None else f" ±{row['half_interval']:7.4f}"
        values = f"{row['before']:8.4f}  {row['default']:8.4f}  {row['candidate']:9.4f}  {row['difference']:+10.4f}"
        lines.append(f"{name:<{width}}  {values}{interval}")
    about = "difference: candidate less default; 95 %: of the held-out rows, measured in pairs (another seed of training moves it, too)"
    return "\n".join([*lines, about, f"wrote {path}"])
