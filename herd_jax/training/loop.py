"""The training loop: restores, steps, logs, evaluates, saves. All side effects of a run start here."""

import contextlib
import dataclasses
import time

import jax

from herd_jax.config import to_dict
from herd_jax.errors import StartAgain, UserError
from herd_jax.machines.hardware import peak_flops
from herd_jax.mesh import make_mesh
from herd_jax.models.params import count
from herd_jax.reliability.goodput import GoodputSoFar, read_goodput
from herd_jax.reliability.pulse import OWN_TIMES, Beat, Pulse, host_names
from herd_jax.reliability.run_lock import only_run
from herd_jax.reliability.signals import Signals, ending_at_once
from herd_jax.reliability.stragglers import Stragglers
from herd_jax.reliability.timeline import Timeline
from herd_jax.reliability.watchdog import Watchdog
from herd_jax.reliability.workdir import CHECKPOINTS, TOKENIZER
from herd_jax.training.checkpoints.local_and_durable import TieredCheckpointer
from herd_jax.training.compilation import kept_compilations
from herd_jax.training.config import RunConfig, build_steps
from herd_jax.training.corruption import Verification
from herd_jax.training.metrics import Console, MetricsWriter
from herd_jax.training.resume import Identities, Initial, identities, restore
from herd_jax.training.spikes import Spikes
from herd_jax.training.state import State
from herd_jax.training.step import Steps
from herd_jax.training.task import Stopped, Task, TaskData


def train(config: RunConfig, task: Task, initial: Initial | None = None) -> None:
    """Trains `task` from the newest checkpoint in the workdir, or from `initial` weights, or from random ones, to `train.num_steps`.

    Raises UserError for anything in the config, the data, the checkpoints or the losses that the user has to mend, and for a Ctrl-C;
    StartAgain where a signal of the scheduler (SIGTERM, SIGUSR1) ended it. After both the run has saved and the same command continues it.
    """
    start = time.time()
    mesh = make_mesh(config.mesh)
    steps = build_steps(config, mesh, task)
    data = task.open(config, steps)
    known = identities(config, data, initial)
    workdir = config.directory
    if initial:
        initial.check_tokenizer(data.tokenizer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_run(workdir))
        data.tokenizer.save(workdir / TOKENIZER)
        signals = stack.enter_context(Signals().noted())
        stack.enter_context(kept_compilations(workdir, config.train.compilation_cache))
        timeline = Timeline(workdir, start)
        stack.callback(timeline.close)
        stack.enter_context(Watchdog(config.train.watchdog, timeline, workdir))
        checkpointer = stack.enter_context(TieredCheckpointer(workdir / CHECKPOINTS, config.checkpoint))
        with ending_at_once("before the first step of this start"):  # nothing is lost
            state, position = restore(checkpointer, config, steps, known, initial)
        first_step = position["step"]
        timeline.begin(first_step)
        writer = MetricsWriter(workdir, first_step)
        stack.callback(writer.close)
        console = stack.enter_context(Console(config.train.num_steps))
        console.message(describe(config, steps, data.num_tokens, first_step))
        spikes = Spikes(config.train.on_spike, config.train.spike_factor, config.train.spike_window, position)
        goodput = GoodputSoFar(workdir, timeline, first_step)
        # A model that is trained on with shorter sequences keeps the context that it was made for.
        context_length = position.get("context_length") or initial and initial.context_length
        pulse = Pulse(mesh)
        loop = _Loop(config, steps, data, checkpointer, writer, console, timeline, signals, spikes, initial, known, context_length, goodput, pulse)
        loop.train(state, first_step, position.get("evaluation_due"))
        timeline.enter("checkpoint stall")
        checkpointer.wait()
        timeline.enter("checkpoint stall")
        if jax.process_index() == 0:
            console.message("\n".join(read_goodput(workdir).lines()))


def describe(config: RunConfig, steps: Steps, num_tokens: int, first_step: int) -> str:
    axes = " ".join(f"{axis} {size}" for axis, size in steps.layout.mesh.shape.items())
    device = steps.layout.mesh.devices.flat[0]
    begin = f"continues at step {first_step}" if first_step else "starts"
    return (
        f"{config.init_from or config.model.name}: {count(steps.model.declared):,} parameters, {num_tokens:,} training tokens, mesh {axes} of {device.device_kind} "
        f"({device.platform}), {steps.compute_dtype.__name__}; {begin} in {config.workdir}"
    )


@dataclasses.dataclass
class _UnderWay:
    """The step that the devices were given at `start` (of time.perf_counter)."""

    step: int
    metrics: dict
    start: float
    compiled: bool

    def is_done(self) -> bool:
        return self.metrics["loss"].is_ready()


@dataclasses.dataclass
class _Loop:
    config: RunConfig
    steps: Steps
    data: TaskData
    checkpointer: TieredCheckpointer
    writer: MetricsWriter
    console: Console
    timeline: Timeline
    signals: Signals
    spikes: Spikes
    initial: Initial | None
    identities: Identities
    context_length: int | None  # of the model that the run began with
    goodput: GoodputSoFar
    pulse: Pulse
    beat: Beat | None = None  # the last one that was read
    num_skipped: int = 0  # since the last line of metrics
    leave_out: dict[int, int] = dataclasses.field(default_factory=dict)  # step -> the last step after it whose batch is left out
    last_done: float = 0.0  # when the devices finished a step (of time.perf_counter)

    def train(self, state: State, first_step: int, evaluation_due: dict | None) -> None:
        """Trains from `first_step` to the end. `evaluation_due` is that step's line of metrics where its evaluation was stopped."""
        config, num_steps, timeline = self.config, self.config.train.num_steps, self.timeline
        if evaluation_due:
            found = self.evaluate(state, first_step)
            if found is None:
                raise self.stopped(first_step)
            self.report(first_step, evaluation_due | found)
        if first_step >= num_steps:
            self.console.message(f"nothing to do: {first_step} steps are done and train.num_steps is {num_steps}")
            return
        self.peak = peak_flops(jax.local_devices()[0], jax.local_device_count())
        pulse, hosts = self.pulse, host_names()
        stragglers = Stragglers(hosts)
        verification = Verification(config.train.verify_every_steps, self.steps, hosts, first_step, timeline)
        own_times = dict.fromkeys(OWN_TIMES, 0.0)  # of the step under way
        pending: list[dict] = []  # metrics of the steps since the last line, still on their way
        waited, since = 0.0, time.perf_counter()
        iterator = self.data.iterate(first_step)
        step = saved = first_step  # saved: durably
        compiled: set[tuple] = set()  # shapes of batches
        evaluation_due = None
        under_way: _UnderWay | None = None  # the devices have a step while this process prepares the next
        while step < num_steps:
            if step in self.leave_out:
                last_bad = self.leave_out.pop(step)
                state, iterator = self.spikes.leave_out(state, step + 1, last_bad), self.data.iterate(last_bad)
                step = last_bad
                continue
            timeline.enter("input wait", step)
            batch = next(iterator).to_devices(self.steps.batch_sharding)
            hidden = under_way is not None and not under_way.is_done()
            if hidden:
                timeline.rename("step")
            compiles = batch["tokens"].shape not in compiled
            input_seconds = timeline.enter("compile" if compiles else "step")
            waited += input_seconds
            own_times["input"] = 0.0 if hidden else input_seconds
            sent = pulse.send(self.signals.seen, list(own_times.values()))
            if compiles and self.is_told_to_stop(sent):
                break  # at once, rather than compile first
            own_times, start = dict.fromkeys(OWN_TIMES, 0.0), time.perf_counter()
            compute = self.steps.train
            if self.spikes.limits_steps:
                limits = self.spikes.limits(step + 1)
                compute = lambda state, batch: self.steps.train_within(state, batch, limits)
            state, metrics = verification.run(step + 1, compute, state, batch)
            own_times["own work"] = 0.0 if compiles else time.perf_counter() - start
            pending.append(metrics)
            step += 1
            wrong = self.finish(under_way) if under_way else None
            told = self.is_told_to_stop(sent)
            stragglers.add(self.beat)
            bad_step, under_way = step - 1, _UnderWay(step, metrics, start, compiles)
            compiled.add(batch["tokens"].shape)
            last = step == num_steps
            evaluates = last or step % config.eval.every_steps == 0
            saves = last or config.checkpoint.is_due(step)
            logs = evaluates or saves or step % config.log.every_steps == 0 or step == first_step + 1
            if wrong is None and (logs or compiles or told):
                wrong, bad_step, under_way = self.finish(under_way), step, None
            if wrong:
                state, step = self.rewind(state, wrong, bad_step)
                saved, under_way, iterator = step, None, self.data.iterate(step)
                pending, waited, since = [], 0.0, time.perf_counter()
            elif logs:
                values = self.interval_metrics(pending, step, since, waited)
                if evaluates:
                    found = self.evaluate(state, step)
                    if found is None:
                        evaluation_due = values
                        break
                    values |= found
                self.report(step, values)
                for line in stragglers.report(values["step_time_s"]):
                    self.console.message(line)
                if saves:
                    durable = last or config.checkpoint.is_durable(step)
                    own_times["checkpoint"] = self.save(state, step, values.get("val_loss"), durable)
                    saved = step if durable else saved
                pending, waited, since = [], 0.0, time.perf_counter()
            if told:
                break
        if under_way and self.finish(under_way):
            saved = step  # not to be saved: the next start finds it bad too, and rewinds
        if step > saved:
            self.save(state, step, None, evaluation_due=evaluation_due)
        if step < num_steps or evaluation_due:
            raise self.stopped(step)

    def is_told_to_stop(self, sent) -> bool:
        """Returns whether a signal has told a process to stop; all processes learn it at the same place."""
        self.beat = self.pulse.read(sent)
        return bool(self.beat.stop)

    def evaluate(self, state: State, step: int) -> dict | None:
        """Returns the metrics on held-out data; None where a signal stopped it between two batches."""
        self.timeline.enter("evaluation", step)

        def heed() -> None:
            if self.is_told_to_stop(self.pulse.send(self.signals.seen, [0.0] * len(OWN_TIMES))):
                raise Stopped

        with contextlib.suppress(Stopped):
            return self.data.validate(state.params, self.data.ramp.phase_at(step - 1), heed)
        return None

    def stopped(self, step: int) -> Exception:
        """Returns the exception that ends a run which was told to stop when `step` steps are done and saved."""
        if step:
            where, remedy = f"after step {step}", "the same command continues there"
        else:
            where, remedy = "before the first step", "the same command starts it"
        if self.beat.start_again:
            return StartAgain(f"stopped {where}{' and saved' if step else ''}: {remedy}")
        return UserError(f"interrupted {where}: {remedy}")

    def report(self, step: int, values: dict) -> None:
        self.writer.write(step, values)
        self.console.update(step, values)

    def finish(self, under_way: _UnderWay) -> str | None:
        """Waits for a step; returns what is wrong with it where the run has to rewind. Raises UserError where the run has to stop."""
        jax.block_until_ready(under_way.metrics["loss"])
        before, self.last_done = self.last_done, time.perf_counter()
        self.timeline.step_done(None if under_way.compiled else self.last_done - max(under_way.start, before))
        step, wrong = under_way.step, self.spikes.judge(under_way.step, under_way.metrics)
        if wrong and self.spikes.on_spike == "stop":
            self.checkpointer.wait()
            good = self.checkpointer.steps()
            last_good = f"the last good checkpoint is of step {good[-1]}" if good else "there is no checkpoint yet"
            raise UserError(
                f"the loss or its gradient is {wrong} and {last_good}: lower optimizer.peak_learning_rate and "
                "give --config.resume.allow=optimizer.peak_learning_rate, or set train.on_spike=skip or rewind to leave such batches out"
            )
        if wrong and self.spikes.on_spike == "skip":
            self.spikes.note_skipped(step, step)
            self.num_skipped += 1
            return None
        return wrong

    def rewind(self, state: State, wrong: str, bad_step: int) -> tuple[State, int]:
        """Returns an earlier state and its step; the batches from the last regular checkpoint to `bad_step` will be left out.

        Which ones does not depend on checkpoints that an interruption made. Raises UserError where no checkpoint is early enough.
        """
        target = (bad_step - 1) // self.config.checkpoint.every_steps * self.config.checkpoint.every_steps
        self.spikes.rewind_to(target, wrong)
        self.timeline.enter("checkpoint stall", bad_step)
        jax.tree.map(lambda array: array.delete(), state)  # there may be no room for two
        self.checkpointer.wait()
        state, position = restore(self.checkpointer, self.config, self.steps, self.identities, self.initial, last_step=target)
        if target and not position["step"]:
            raise UserError(
                f"the loss or its gradient is {wrong} and no checkpoint of step {target} or before is left: raise checkpoint.keep, "
                "or set train.on_spike=skip"
            )
        self.spikes.load(position)
        self.leave_out[target] = bad_step
        self.num_skipped += bad_step - target
        left_out = f"the batches of steps {target + 1} to {bad_step} are left out"
        self.console.message(f"the loss or its gradient is {wrong}: back to step {target}, {left_out}")
        self.timeline.begin(position["step"])
        self.goodput = GoodputSoFar(self.config.directory, self.timeline, position["step"])
        return state, position["step"]

    def interval_metrics(self, pending: list[dict], step: int, since: float, waited: float) -> dict:
        """Returns the line of metrics of the steps since the last one, which are done."""
        elapsed = time.perf_counter() - since
        ramp, first = self.config.train.ramp, step - len(pending)
        tokens = ramp.tokens_before(step)
        rate = (tokens - ramp.tokens_before(first)) / elapsed
        keys_seen = ramp.phase_at(step - 1).seq_len / 2  # causally over whole rows; documents may need less
        flops = rate * self.steps.model.config.flops_per_token(keys_seen) / self.steps.layout.mesh.size
        newest = pending[-1]
        values = {name: float(value) for name, value in newest.items() if name != "finite"}
        values |= {"tokens": tokens, "tokens_per_second": rate, "mfu": flops / self.peak if self.peak else None}
        values |= {"step_time_s": elapsed / len(pending), "input_wait_fraction": waited / elapsed, "goodput": self.goodput.fraction()}
        if self.num_skipped:
            values["skipped_steps"], self.num_skipped = self.num_skipped, 0
        return values

    def save(self, state: State, step: int, val_loss: float | None, durable: bool = True, evaluation_due: dict | None = None) -> float:
        """Starts saving the state; returns once it is copied, with the seconds that this took."""
        self.timeline.enter("checkpoint stall", step)
        position = {"step": step, "tokens": self.config.train.ramp.tokens_before(step), "identities": self.identities} | self.spikes.record()
        position |= {"evaluation_due": evaluation_due} if evaluation_due else {}
        position |= {"context_length": self.context_length} if self.context_length else {}
        canonical = self.steps.plan.to_canonical(state)
        return self.checkpointer.save(step, canonical, to_dict(self.config), position, val_loss, durable=durable)
