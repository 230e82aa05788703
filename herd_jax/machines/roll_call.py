"""The roll call of a run: its processes meet before JAX starts, compare what they are, and later tell each other why one of them ends.

One TCP connection from each process to process 0, JSON lines. It stays open while the run lasts, so that a process that dies without a
word (its connection closes) is known everywhere at once.
"""

import collections
import contextlib
import dataclasses
import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable

from herd_jax.config import differences
from herd_jax.errors import PEER_LOST, UserError

_OTHER_FILES = 500  # checkpoints, token streams, libraries
AT_LOSS: list[Callable[[str], None]] = []  # called, with the sentence, before a process ends because another one did


@dataclasses.dataclass(frozen=True)
class Hello:
    """What a process says of itself: `versions` and `config` must be everywhere the same."""

    process_id: int
    num_processes: int
    host: str
    versions: dict[str, str]
    config: dict

    @classmethod
    def of_this_host(cls, process_id: int, num_processes: int, versions: dict[str, str], config: dict) -> "Hello":
        return cls(process_id, num_processes, socket.gethostname(), versions, config)

    def __str__(self) -> str:
        return f"process {self.process_id} on {self.host}"


def clash(hellos: list[Hello]) -> str | None:
    """Returns what is wrong with the numbers of those who came so far, process 0 first: a sentence that names them, or None."""
    first, seen = hellos[0], {}
    for hello in hellos:
        if hello.num_processes != first.num_processes:
            return (
                f"{hello} was started as one of {hello.num_processes} processes and {first} as one of {first.num_processes}: "
                "start all with the same number"
            )
        if hello.process_id in seen:
            other = seen[hello.process_id]
            return f"{other.host} and {hello.host} both run process {hello.process_id}: give each process a number of its own"
        seen[hello.process_id] = hello
    return None


def difference(hellos: list[Hello]) -> str | None:
    """Returns who has other code, other versions or another config than most (of equally many: than process 0): a sentence, or None."""
    usual = {}
    for name in ("versions", "config"):
        texts = [json.dumps(getattr(hello, name), sort_keys=True) for hello in hellos]
        usual[name] = json.loads(collections.Counter(texts).most_common(1)[0][0])  # of equals the first, which is process 0's
    for hello in hellos:
        for name, remedy in (("versions", "install the same everywhere"), ("config", "give every process the same command")):
            differing = differences(usual[name], getattr(hello, name))
            if differing:
                return f"{hello} has another {name.removesuffix('s')} than the others, in {', '.join(differing[:5])}: {remedy}"
    return None


def absence(hellos: list[Hello], timeout: float) -> str:
    """Returns the sentence that names who has not come."""
    expected = hellos[0].num_processes
    absent = sorted(set(range(expected)) - {hello.process_id for hello in hellos})
    hosts = sorted({hello.host for hello in hellos})
    return (
        f"{len(absent)} of {expected} processes did not come within {timeout:.0f} s, number {_few(absent)} "
        f"(here are processes on {_few(hosts)}): see why they did not start, or give them longer with HERD_START_TIMEOUT=SECONDS"
    )


def call_roll(hello: Hello, port: int, timeout: float) -> "RollCall":
    """Does process 0's part: waits for all, compares, tells all the verdict. Raises UserError where it is a bad one."""
    deadline = time.monotonic() + timeout
    _allow_open_files(2 * hello.num_processes + _OTHER_FILES, hello)  # our connection to each, and that of JAX's coordinator
    hellos, peers = [hello], {}
    with _listen(port) as listener:
        _listen(port + 1).close()  # JAX's coordinator will want it
        verdict = None
        while len(hellos) < hello.num_processes and not verdict:
            try:
                listener.settimeout(max(deadline - time.monotonic(), 0.01))
                connection = _Lines(listener.accept()[0])
                connection.socket.settimeout(5)
                other = Hello(**connection.receive())
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # whoever connected said nothing
                verdict = absence(hellos, timeout)
            except (OSError, ValueError, TypeError):
                continue  # not one of ours
            else:
                hellos.append(other)
                peers[connection] = str(other)
                verdict = clash(hellos)
        verdict = verdict or difference(hellos)
    for connection in peers:
        with contextlib.suppress(OSError):  # it is gone, which the run will find
            connection.send({"verdict": verdict})
    if verdict:
        raise UserError(verdict)
    return RollCall(str(hello), peers, is_first=True)


def answer_roll(hello: Hello, host: str, port: int, timeout: float) -> "RollCall":
    """Does another process's part: finds process 0, waits for its verdict. Raises UserError where it is a bad one or there is none."""
    deadline, reason = time.monotonic() + timeout, "no answer"
    while time.monotonic() < deadline:
        try:
            connection = _Lines(socket.create_connection((host, port), timeout=5))
            connection.send(dataclasses.asdict(hello))
            connection.socket.settimeout(timeout + 5)  # process 0 may have begun to wait just now
            verdict = connection.receive()["verdict"]
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
        except (ValueError, KeyError, TypeError):
            wrong = f"what answers at {host}:{port} is not process 0 of this run"
            raise UserError(f"{wrong}: choose another port in HERD_COORDINATOR") from None
        else:
            if verdict:
                raise UserError(verdict)
            return RollCall(str(hello), {connection: f"process 0 on {host}"}, is_first=False)
    raise UserError(
        f"{hello} cannot reach the coordinator at {host}:{port} within {timeout:.0f} s ({reason}): see whether process 0 runs there "
        "and the port is open, or set HERD_COORDINATOR"
    )


class RollCall:
    """The connections after a good verdict: `peers` are all others for process 0, and process 0 for all others."""

    GRACE = 3.0  # seconds in which a process may find by itself the error that another one reports

    def __init__(self, own_name: str, peers: dict["_Lines", str], is_first: bool) -> None:
        self._own_name, self._peers, self._is_first = own_name, peers, is_first
        self._is_leaving = False
        self._telling, self._following = threading.Lock(), threading.Lock()
        for peer in peers:
            threading.Thread(target=self._listen_to, args=(peer,), daemon=True).start()

    def fail(self, reason: str, status: int) -> None:
        """Tells the others that this process ends with exit status `status`, and why."""
        self._is_leaving = True
        self._tell({"failed": f"{self._own_name} stopped: {reason}", "status": status})
        if self._is_first:
            time.sleep(self.GRACE + 2)  # to be the last one: JAX aborts where its coordinator is gone

    def leave(self) -> None:
        """Tells the others that the end of this process, from now on, is a good one."""
        self._is_leaving = True
        self._tell({"done": True})

    def _listen_to(self, peer: "_Lines") -> None:
        peer.socket.settimeout(None)
        try:
            message = peer.receive()
        except (OSError, ValueError):
            self._follow(f"{self._peers[peer]} died without a word: see its own output", PEER_LOST, grace=0)
        else:
            if "failed" in message:
                self._follow(message["failed"], message["status"], self.GRACE)

    def _follow(self, sentence: str, status: int, grace: float) -> None:
        """Ends this process, which may hang where it waits for the one that ended; process 0 passes it on first."""
        with self._following:  # the first report counts: what others report is its echo
            if self._is_leaving:
                return
            if self._is_first:
                self._tell({"failed": sentence, "status": status})
            time.sleep(grace)
            if not self._is_leaving:
                print(f"error: {sentence}", file=sys.stderr, flush=True)
                for call in AT_LOSS:
                    call(sentence)
                os._exit(status)

    def _tell(self, message: dict) -> None:
        with self._telling:
            for peer in self._peers:
                with contextlib.suppress(OSError):  # it is gone, which is known or will be
                    peer.send(message)


class _Lines:
    """A connection that carries JSON lines."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self._file = connection, connection.makefile("rb")

    def send(self, message: dict) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict:
        """Waits for a line of JSON. Raises OSError where the other side hangs up, ValueError where it does not speak JSON."""
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("it hung up without an answer")
        return json.loads(line)


def _allow_open_files(number: int, hello: Hello) -> None:
    """Raises this process's limit of open files, where it is lower and may be. Raises UserError where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        raise UserError(
            f"{hello} may open {hard} files, and {hello.num_processes} processes that connect to it take {number}: "
            "raise its hard limit (ulimit -Hn, or LimitNOFILE of the service that starts it)"
        )
    if soft != resource.RLIM_INFINITY and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=4096, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"process 0 on {socket.gethostname()} cannot take port {port} of the coordinator ({error.strerror}): "
            "choose another one (and the one after it) in HERD_COORDINATOR=HOST:PORT"
        ) from error


def _few(values: list) -> str:
    shown = ", ".join(map(str, values[:16]))
    return shown if len(values) <= 16 else f"{shown} and {len(values) - 16} more"
