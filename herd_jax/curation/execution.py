"""Running phases of a datatrove pipeline: as processes of this machine, or through datatrove's executors for Slurm and Ray.

A phase is a pipeline that runs once a task; a task that has completed is marked in the workdir and not run again.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import Stats
from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from herd_jax.errors import UserError

EXECUTORS = ("local", "slurm", "ray")


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """A task's share of a cluster. Slurm alone has a partition, a limit of time, and a shell command before each task."""

    cpus_per_task: int = 1
    memory_per_cpu_gb: int = 4
    partition: str = ""
    time: str = "20:00:00"
    setup: str = ""  # such as 'source .venv/bin/activate'


@dataclasses.dataclass(frozen=True)
class Phase:
    name: str
    pipeline: Sequence[PipelineStep]
    num_tasks: int


def run_phases(phases: Sequence[Phase], executor: str, workers: int, cluster: ClusterConfig, directory: Path) -> None:
    """Runs the phases one after another, `workers` tasks at a time (0: as many as there are cores; on a cluster, as fit), with logs and marks
    of completion below `directory`. For Slurm all are submitted at once, each job waiting for the one before.

    Raises UserError where a task fails; what was completed stays.
    """
    logger.remove()  # datatrove's log stays in files
    match executor:
        case "local":
            columns = (TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn(), TextColumn("tasks"), TimeElapsedColumn())
            with Progress(*columns, console=Console(stderr=True)) as progress:
                for phase in phases:
                    LocalExecutor(phase, workers or os.cpu_count(), directory / phase.name).run(progress)
        case "slurm":
            _submit_to_slurm(phases, workers, cluster, directory)
        case "ray":
            _run_on_ray(phases, workers, cluster, directory)
        case _:
            raise UserError(f"executor is '{executor}': it must be one of {', '.join(EXECUTORS)}")


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's tasks in fresh processes that keep their models between tasks, are missed when they die, and end with this one."""

    def __init__(self, phase: Phase, workers: int, directory: Path):
        super().__init__(list(phase.pipeline), phase.num_tasks, workers, str(directory))
        self.phase_name, self.directory = phase.name, directory

    def run(self, progress: Progress) -> None:
        missing = self.get_incomplete_ranks()
        bar = progress.add_task(self.phase_name, total=self.tasks, completed=self.tasks - len(missing))
        # Fresh processes: a step may have run jax, whose threads do not survive a fork.
        pool = concurrent.futures.ProcessPoolExecutor(
            max(1, min(self.workers, len(missing))), multiprocessing.get_context("spawn"), _start_worker, (self, os.getpid())
        )
        try:
            ranks = {pool.submit(_run_in_worker, rank): rank for rank in missing}
            for future in concurrent.futures.as_completed(ranks):
                self._raise_error(future.exception(), ranks[future])
                progress.advance(bar)
        finally:
            pool.shutdown(cancel_futures=True)

    def run_task(self, rank: int) -> None:
        for step in self.pipeline:
            step.stats = Stats(str(step))  # its own, of this task
        with contextlib.redirect_stderr(io.StringIO()):
            self._run_for_rank(rank)

    def _raise_error(self, error: BaseException | None, rank: int) -> None:
        if error is None:
            return
        if isinstance(error, UserError):
            raise error
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                f"a process of phase {self.phase_name} was killed, most likely for want of memory: the same command with fewer "
                "--config.workers continues"
            ) from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        log = self.directory / "logs" / f"task_{rank:05d}.log"
        raise UserError(
            f"task {rank} of phase {self.phase_name} failed ({reason}), see {log}: when the cause is removed, the same command continues"
        ) from error


def _start_worker(executor: LocalExecutor, parent: int) -> None:
    global _executor
    _executor = executor
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_in_worker(rank: int) -> None:
    _executor.run_task(rank)


def _submit_to_slurm(phases: Sequence[Phase], workers: int, cluster: ClusterConfig, directory: Path) -> None:
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


def _run_on_ray(phases: Sequence[Phase], workers: int, cluster: ClusterConfig, directory: Path) -> None:
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
