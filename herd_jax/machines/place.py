"""Where this process stands among those of a run, found from its launcher, and the link that makes all of them start and fail together.

JAX has one process a host. Before JAX starts, process 0 calls the roll (`herd_jax.machines.roll_call`) on the coordinator's port: who is missing,
who was told another number of processes, who has other code or another config. JAX's own coordinator then takes the next port.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from herd_jax.errors import PEER_LOST, USER_ERROR, StartAgain, UserError
from herd_jax.machines.roll_call import Hello, RollCall, answer_roll, call_roll

FIRST_PORT, NUM_PORTS = 61_440, 4_000  # above the ports that Linux hands out by itself
PLAIN = ("HERD_COORDINATOR", "HERD_NUM_PROCESSES", "HERD_PROCESS_ID")
TIMEOUT = "HERD_START_TIMEOUT"  # seconds that the start of a run waits for its processes
DEFAULT_TIMEOUT = 50
SHUTDOWN_TIMEOUT = 60  # seconds from the first process that ends well to the last


@dataclasses.dataclass(frozen=True)
class Place:
    """`coordinator` is the address of process 0, "HOST:PORT", of which the next port is used too."""

    coordinator: str
    num_processes: int
    process_id: int


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Finds the place of this process among those of the run, from the variables of whoever launched it; None for a run of one process.

    In this order: HERD_COORDINATOR, HERD_NUM_PROCESSES and HERD_PROCESS_ID; a Slurm step (srun); Open MPI (mpirun); an indexed Kubernetes
    job of a JobSet. HERD_COORDINATOR and HERD_NUM_PROCESSES, where set, replace what a launcher says. Raises UserError where these
    variables do not say it all.
    """
    for find in (_find_slurm, _find_open_mpi, _find_kubernetes, _find_plain):
        found = find(environment)
        if found:
            break
    else:
        return None
    coordinator, num_processes, process_id = (environment.get(name) or value for name, value in zip(PLAIN, found, strict=True))
    if str(num_processes) == "1" and str(process_id) == "0":
        return None
    absent = [name for name, value in zip(PLAIN, (coordinator, num_processes, process_id), strict=True) if value in (None, "")]
    if absent:
        missing = " and ".join(absent)
        raise UserError(f"a run of several processes needs {', '.join(PLAIN)}, and {missing} cannot be found: set it in every process")
    place = Place(coordinator, _number(PLAIN[1], num_processes), _number(PLAIN[2], process_id))
    if not re.fullmatch(r".+:\d+", coordinator) or not 0 < int(coordinator.rpartition(":")[2]) < 65_535:
        raise UserError(f"HERD_COORDINATOR is '{coordinator}': give HOST:PORT of process 0, with a port from 1 to 65534")
    if not place.process_id < place.num_processes:
        numbers = f"number the processes from 0 to {place.num_processes - 1}"
        raise UserError(f"this process is number {process_id} (from 0) of {num_processes}: {numbers}")
    return place


@contextlib.contextmanager
def joined(config: dict) -> Iterator[int]:
    """Makes this process one of a run's and initializes `jax.distributed`; yields the number of processes. Enter before jax is used.

    `config` (json-able) is the run's, which must be the same everywhere. The start takes at most HERD_START_TIMEOUT seconds (default 50).
    While inside, a process that fails or dies makes all others exit with status 1, and each of them prints which one it was and why.
    Raises UserError, on every process, where the run cannot start. A run of one process does nothing here.
    """
    place = find_place(os.environ)
    if place is None:
        yield 1
        return
    timeout = _number(TIMEOUT, os.environ.get(TIMEOUT, DEFAULT_TIMEOUT))
    host, port = re.fullmatch(r"\[?(.*?)]?:(\d+)", place.coordinator).groups()
    hello = Hello.of_this_host(place.process_id, place.num_processes, {"code": code_hash(), "jax": jax.__version__}, config)
    if place.process_id == 0:
        roll = call_roll(hello, int(port), timeout)
    else:
        roll = answer_roll(hello, host, int(port), timeout)
    with _leaving_together(roll):
        _initialize(place, host, int(port) + 1, timeout)
        yield place.num_processes


def code_hash() -> str:
    """Returns the hash of all files of herd_jax, by path and content."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _initialize(place: Place, host: str, port: int, timeout: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        jax.distributed.initialize(
            address, place.num_processes, place.process_id,
            cluster_detection_method="deactivate", initialization_timeout=timeout, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"JAX's coordinator at {address} cannot be used ({reason}): choose another port in HERD_COORDINATOR") from error


@contextlib.contextmanager
def _leaving_together(roll: RollCall) -> Iterator[None]:
    """Tells the other processes why this one ends; one that fails exits here, because JAX would have it wait for them first."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        roll.fail(str(error), error.status)
        os._exit(error.status)
    except StartAgain:  # as all others do
        raise
    except Exception as error:
        time.sleep(2 * roll.GRACE)  # it may be the echo of another process's end, which is told meanwhile, and ends this one
        traceback.print_exc()
        roll.fail(f"{type(error).__name__}: {error}".splitlines()[0], PEER_LOST)
        os._exit(USER_ERROR)
    finally:
        roll.leave()


def _find_slurm(environment: Mapping[str, str]) -> tuple | None:
    """Finds the place that Slurm gives. SLURM_STEP_* are set by srun alone: an interactive shell of an allocation is a run of one process."""
    if "SLURM_STEP_NODELIST" not in environment:
        return None
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", environment["SLURM_STEP_NODELIST"])  # of "node7", "node7,other", "node[007-015,20],other"
    address = f"{first[1]}{first[2] or ''}:{_port(int(environment['SLURM_JOB_ID']))}"
    return address, environment["SLURM_STEP_NUM_TASKS"], environment["SLURM_PROCID"]


def _find_open_mpi(environment: Mapping[str, str]) -> tuple | None:
    """Finds the place that Open MPI gives. The address is that of mpirun where it says it (Open MPI 4), and this host's where all processes
    are on it."""
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    size, launcher = environment["OMPI_COMM_WORLD_SIZE"], environment.get("OMPI_MCA_orte_hnp_uri", "")
    told = re.match(r"(\d+)\.\d+;tcp://([^,:]+)", launcher)
    if told:
        address = f"{told[2]}:{_port(int(told[1]) >> 12)}"  # the low 12 bits number the steps of a job
    else:
        address = f"localhost:{FIRST_PORT}" if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == size else None
    return address, size, environment["OMPI_COMM_WORLD_RANK"]


def _find_kubernetes(environment: Mapping[str, str]) -> tuple | None:
    """Finds the place that Kubernetes gives. JOB_COMPLETION_INDEX is Kubernetes' own; launch/kubernetes.yaml passes the two names and
    HERD_NUM_PROCESSES."""
    names = [environment.get(name) for name in ("JOBSET_NAME", "REPLICATED_JOB_NAME")]
    if "JOB_COMPLETION_INDEX" not in environment or not all(names):
        return None
    jobset, job = names
    return f"{jobset}-{job}-0-0.{jobset}:{FIRST_PORT}", None, environment["JOB_COMPLETION_INDEX"]


def _find_plain(environment: Mapping[str, str]) -> tuple | None:
    return (None, None, None) if any(environment.get(name) for name in PLAIN) else None


def _port(job: int) -> int:
    """Returns an even port, so that two jobs on one host do not meet in each other's second port."""
    return FIRST_PORT + 2 * job % NUM_PORTS


def _number(name: str, value: str | int) -> int:
    if not str(value).isdecimal():
        raise UserError(f"{name} is '{value}': it must be a whole number")
    return int(value)
