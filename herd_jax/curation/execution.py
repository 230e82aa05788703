"""Running phases of a datatrove pipeline: as processes of this machine, or through datatrove's executors for Slurm and Ray.

A phase is a pipeline that runs once a task; a task that has completed is marked in the workdir and not run again.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import Stats
from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from herd_jax.errors import UserError
from herd_jax.reliability import lock

EXECUTORS = ("local", "slurm", "ray")


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """A task's share of a cluster. Slurm alone has a partition, a limit of time, and a shell command before each task."""

    cpus_per_task: int = 1  # cores of a task
    memory_per_cpu_gb: int = 4  # of a core, in GB
    partition: str = ""  # of Slurm
    time: str = "20:00:00"  # limit of a Slurm task
    setup: str = ""  # such as 'source .venv/bin/activate'


@dataclasses.dataclass(frozen=True)
class CurationPhase:
    name: str
    pipeline: Sequence[PipelineStep]
    num_tasks: int


def run_phases(phases: Sequence[CurationPhase], executor: str, workers: int, cluster: ClusterConfig, directory: Path) -> None:
    """Runs the phases one after another, `workers` tasks at a time (0: as many as there are cores; on a cluster, as fit), with logs, marks
    of completion and the number of tasks of each phase below `directory`. For Slurm all are submitted at once, each job waiting for the one before.

    Raises UserError where a task fails; what was completed stays.
    """
    logger.remove()  # datatrove's log stays in files
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tasks.json").write_text(json.dumps({phase.name: phase.num_tasks for phase in phases}, indent=1))
    match executor:
        case "local":
            _run_here([LocalExecutor(phase, directory / phase.name) for phase in phases], workers or os.cpu_count(), directory.parent)
        case "slurm":
            _submit_to_slurm(phases, workers, cluster, directory)
        case "ray":
            _run_on_ray(phases, workers, cluster, directory)
        case _:
            raise UserError(f"executor is '{executor}': it must be one of {', '.join(EXECUTORS)}")


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's executor, but for who runs the tasks."""

    def __init__(self, phase: CurationPhase, directory: Path):
        super().__init__(list(phase.pipeline), phase.num_tasks, logging_dir=str(directory))
        self.phase_name, self.directory = phase.name, directory

    def run_task(self, rank: int) -> None:
        for step in self.pipeline:
            step.stats = Stats(str(step))  # its own, of this task
        with contextlib.redirect_stderr(io.StringIO()):
            self._run_for_rank(rank)

    def explained(self, error: Exception, rank: int) -> UserError:
        if isinstance(error, UserError):
            return error
        if isinstance(error, BrokenProcessPool):
            return UserError(
                f"a process of phase {self.phase_name} was killed, most likely for want of memory: the same command with fewer workers "
                "continues"
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(f"the disk is full, as task {rank} of {self.phase_name} found: make room, and the same command continues")
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        log = self.directory / "logs" / f"task_{rank:05d}.log"
        return UserError(
            f"task {rank} of phase {self.phase_name} failed ({reason}), see {log}: when the cause is removed, the same command continues"
        )


def _run_here(executors: Sequence[LocalExecutor], workers: int, workdir: Path) -> None:
    """Runs tasks in this process with one worker, else in processes that serve all phases, are missed when they die, and end with this one."""
    columns = (TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn(), TextColumn("tasks"), TimeElapsedColumn())
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
        pool = None
        if workers > 1:
            # Fresh processes: a step may have run jax, whose threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            arguments = (list(executors), os.getpid(), workdir)
            pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, arguments)
            stack.callback(pool.shutdown, cancel_futures=True)
            stack.enter_context(_ending_workers())
        for phase, executor in enumerate(executors):
            missing = executor.get_incomplete_ranks()
            bar = progress.add_task(executor.phase_name, total=executor.tasks, completed=executor.tasks - len(missing))
            if pool is None:
                outcomes = ((rank, functools.partial(executor.run_task, rank)) for rank in missing)
            else:
                ranks = {pool.submit(_run_in_worker, phase, rank): rank for rank in missing}
                outcomes = ((ranks[future], future.result) for future in concurrent.futures.as_completed(ranks))
            for rank, outcome in outcomes:
                try:
                    outcome()
                except Exception as error:
                    raise executor.explained(error, rank) from error
                progress.advance(bar)


@contextlib.contextmanager
def _ending_workers() -> Iterator[None]:
    """Where the block is interrupted, tasks that run are not waited for."""
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.kill()
        raise


def _start_worker(executors: list[LocalExecutor], parent: int, workdir: Path) -> None:
    global _executors
    _executors = executors
    lock.join(workdir)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_in_worker(phase: int, rank: int) -> None:
    _executors[:phase] = [None] * phase  # with the models that earlier phases have loaded
    _executors[phase].run_task(rank)


def _submit_to_slurm(phases: Sequence[CurationPhase], workers: int, cluster: ClusterConfig, directory: Path) -> None:
    from datatrove.executor.slurm import SlurmPipelineExecutor

    if shutil.which("sbatch") is None:
        raise UserError("executor is 'slurm', but there is no sbatch on this machine: start it on a login node of the cluster, or take 'local'")
    if not cluster.partition:
        raise UserError("cluster.partition is empty: name the Slurm partition with --config.cluster.partition=NAME")
    previous = None
    for phase in phases:
        previous = SlurmPipelineExecutor(
            list(phase.pipeline),
            phase.num_tasks,
            cluster.time,
            cluster.partition,
            cpus_per_task=cluster.cpus_per_task,
            mem_per_cpu_gb=cluster.memory_per_cpu_gb,
            workers=workers or -1,
            job_name=f"herd-{phase.name}",
            env_command=cluster.setup or None,
            depends=previous,
            logging_dir=str(directory / phase.name),
        )
    previous.run()


def _run_on_ray(phases: Sequence[CurationPhase], workers: int, cluster: ClusterConfig, directory: Path) -> None:
    try:
        import ray
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError as error:
        raise UserError("executor is 'ray', but the package ray is not installed: pip install ray, or take 'local'") from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    for phase in phases:
        executor = RayPipelineExecutor(
            list(phase.pipeline),
            phase.num_tasks,
            workers or -1,
            logging_dir=str(directory / phase.name),
            cpus_per_task=cluster.cpus_per_task,
            mem_per_cpu_gb=cluster.memory_per_cpu_gb,
        )
        executor.run()
        if missing := executor.get_incomplete_ranks():
            raise UserError(f"tasks {missing[:5]} of phase {phase.name} failed, see {directory / phase.name / 'logs'}: the same command continues")
