"""The training loop: restores, steps, logs, evaluates, saves. All side effects of a run start here."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from herd_jax.config import to_dict
from herd_jax.data.batches import TrainingBatches, validation_batches
from herd_jax.data.rows import check_vocabulary, load_data_tokenizer, open_streams
from herd_jax.errors import UserError
from herd_jax.hardware import peak_flops
from herd_jax.mesh import make_mesh
from herd_jax.models.params import count
from herd_jax.text.tokenizer import Tokenizer
from herd_jax.training.checkpoint import Checkpointer
from herd_jax.training.metrics import Console, MetricsWriter
from herd_jax.training.run import RunConfig, build_steps, contradictions
from herd_jax.training.state import State
from herd_jax.training.step import Steps


class Initial(Protocol):
    """Weights to begin with."""

    def load_params(self, steps: Steps) -> Any:
        """FP32, as the steps store them."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError where the weights belong to another tokenizer."""


def train(config: RunConfig, initial: Initial | None = None) -> None:
    """Trains from the newest checkpoint in the workdir, or from `initial` weights, or from random ones, to `train.num_steps`.

    Raises UserError for anything in the config, the data, the checkpoints or the losses that the user has to mend.
    """
    mesh = make_mesh(config.mesh)
    steps = build_steps(config, mesh)
    streams, held_out = open_streams(config.data, "train"), open_streams(config.data, "validation")
    check_vocabulary(streams, steps.model.config.vocab_size)
    ramp = config.train.ramp
    batches = TrainingBatches(config.data, streams, ramp, config.seed, config.train.num_steps, steps.batch_sharding)
    workdir = Path(config.workdir)
    tokenizer = load_data_tokenizer(config.data, streams)
    tokenizer.save(workdir / "tokenizer")
    if initial:
        initial.check_tokenizer(tokenizer)
    checkpointer = Checkpointer(workdir / "checkpoints", config.checkpoint.keep)
    try:
        state, first_step = restore(checkpointer, config, steps, initial)
        writer = MetricsWriter(workdir, first_step)
        with Console(config.train.num_steps) as console:
            console.message(describe(config, steps, sum(stream.num_tokens for stream in streams), first_step))
            run = _Run(config, steps, checkpointer, writer, console, held_out)
            run.train(state, first_step, batches)
        writer.close()
    finally:
        checkpointer.close()


def restore(checkpointer: Checkpointer, config: RunConfig, steps: Steps, initial: Initial | None = None) -> tuple[State, int]:
    """The newest readable state and the number of steps it has taken, else a fresh one, with the `initial` weights if there are any."""
    newest = checkpointer.newest()
    if newest is not None:
        _, saved = newest
        wrong = contradictions(saved["config"], to_dict(config), saved["position"]["tokens"])
        if wrong:
            raise UserError(
                f"the checkpoints in {config.workdir} were made with other values of {', '.join(wrong)}: "
                "give the values they were made with, or another workdir"
            )
    restored = checkpointer.restore(steps.plan.abstract_canonical())
    if restored is None:
        fresh = steps.plan.init(config.seed)
        return (fresh._replace(params=initial.load_params(steps)) if initial else fresh), 0
    return steps.plan.from_canonical(restored.state), restored.step


def describe(config: RunConfig, steps: Steps, num_tokens: int, first_step: int) -> str:
    axes = " ".join(f"{axis} {size}" for axis, size in steps.layout.mesh.shape.items())
    device = steps.layout.mesh.devices.flat[0]
    begin = f"continues at step {first_step}" if first_step else "starts"
    return (
        f"{config.init_from or config.model.name}: {count(steps.model.declared):,} parameters, {num_tokens:,} training tokens, mesh {axes} of {device.device_kind} "
        f"({device.platform}), {steps.compute_dtype.__name__}; {begin} in {config.workdir}"
    )


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collects a Ctrl-C instead of raising it, which could strike after a step has taken the state and before it has given it back.

    The second one raises.
    """
    seen: list[int] = []

    def note(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


@dataclasses.dataclass
class _Run:
    config: RunConfig
    steps: Steps
    checkpointer: Checkpointer
    writer: MetricsWriter
    console: Console
    held_out: list

    def train(self, state: State, first_step: int, batches: TrainingBatches) -> None:
        config, ramp, num_steps = self.config, batches.ramp, self.config.train.num_steps
        if first_step >= num_steps:
            self.console.message(f"nothing to do: {first_step} steps are done and train.num_steps is {num_steps}")
            return
        self.peak = peak_flops(jax.local_devices()[0], jax.local_device_count())
        pending: list[dict] = []  # metrics of the steps since the last look at them, still on their way
        waited, since = 0.0, time.perf_counter()
        iterator = batches.iterate(first_step)
        step = saved = first_step
        with interrupts() as interrupted:
            while step < num_steps and not interrupted:
                start = time.perf_counter()
                batch = next(iterator).to_devices(self.steps.batch_sharding)
                waited += time.perf_counter() - start
                state, metrics = self.steps.train(state, batch)
                pending.append(metrics)
                step += 1
                last = step == num_steps
                evaluates = last or step % config.eval.every_steps == 0
                saves = last or step % config.checkpoint.every_steps == 0
                if not (evaluates or saves or step % config.log.every_steps == 0 or step == first_step + 1):
                    continue
                values = self.look(pending, step, since, waited)
                val_loss = self.evaluate(state, ramp.phase_at(step - 1), values) if evaluates else None
                self.writer.write(step, values)
                self.console.update(step, values)
                if saves:
                    self.save(state, step, val_loss)
                    saved = step
                pending, waited, since = [], 0.0, time.perf_counter()
            if step < num_steps:
                if pending:
                    self.look(pending, step, since, waited)
                if step > saved:
                    self.save(state, step, None)
                raise UserError(f"interrupted after step {step}: the same command continues there")

    def look(self, pending: list[dict], step: int, since: float, waited: float) -> dict:
        """Waits for the steps since the last look; their metrics, or UserError where a loss was not finite."""
        finite = self.is_finite(pending)
        elapsed = time.perf_counter() - since
        ramp, first = self.config.train.ramp, step - len(pending)
        if not all(finite) and not self.config.train.skip_nonfinite:
            bad = first + finite.index(False) + 1
            self.checkpointer.wait()
            good = self.checkpointer.steps()
            last_good = f"the last good checkpoint is of step {good[-1]}" if good else "there is no checkpoint yet"
            raise UserError(
                f"the loss or its gradient is not finite at step {bad} and {last_good}: lower optimizer.peak_learning_rate, "
                "or set train.skip_nonfinite=true to leave such batches out"
            )
        tokens = ramp.tokens_before(step)
        rate = (tokens - ramp.tokens_before(first)) / elapsed
        keys_seen = ramp.phase_at(step - 1).seq_len / 2  # causally over whole rows; documents may need less
        flops = rate * self.steps.model.config.flops_per_token(keys_seen) / self.steps.layout.mesh.size
        newest = pending[-1]
        values = {name: float(newest[name]) for name in ("loss", "grad_norm", "learning_rate")}
        values |= {"tokens": tokens, "tokens_per_second": rate, "mfu": flops / self.peak if self.peak else None}
        values |= {"step_time_s": elapsed / len(pending), "input_wait_fraction": waited / elapsed}
        if not all(finite):
            values["skipped_steps"] = finite.count(False)
        return values

    @staticmethod
    def is_finite(pending: list[dict]) -> list[bool]:
        return [bool(metrics["finite"]) for metrics in pending]

    def evaluate(self, state: State, phase, values: dict) -> float:
        """Validation loss in nats per token, written into `values` together with bits per byte (at the split's mean bytes a token)."""
        found = [
            self.steps.evaluate(state.params, batch.to_devices(self.steps.batch_sharding))
            for batch in validation_batches(self.config.data, self.held_out, phase, self.config.eval.num_batches, self.steps.batch_sharding)
        ]
        loss, num_targets = (float(np.sum([float(sums[name]) for sums in found])) for name in ("loss", "num_targets"))
        val_loss = loss / num_targets
        tokens_per_byte = sum(s.num_tokens for s in self.held_out) / sum(s.num_bytes for s in self.held_out)
        values |= {"val_loss": val_loss, "val_bits_per_byte": val_loss * tokens_per_byte / math.log(2)}
        return val_loss

    def save(self, state: State, step: int, val_loss: float | None) -> None:
        position = {"step": step, "tokens": self.config.train.ramp.tokens_before(step)}
        self.checkpointer.save(step, self.steps.plan.to_canonical(state), to_dict(self.config), position, val_loss)
