"""Where a process stands among those of a run, by launcher; and the roll call: what it refuses, in whose words, and what it tells later."""

import dataclasses
import hashlib
import resource
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import herd_jax
from herd_jax.errors import PEER_LOST, USER_ERROR, UserError
from herd_jax.machines.place import FIRST_PORT, Place, code_hash, find_place
from herd_jax.machines.roll_call import Hello, _allow_open_files, absence, answer_roll, call_roll, clash, difference

SLURM = {"SLURM_JOB_ID": "3000", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "5"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "JOBSET_NAME": "herd", "REPLICATED_JOB_NAME": "host", "HERD_NUM_PROCESSES": "8"}
PLAIN = {"HERD_COORDINATOR": "10.0.0.1:1234", "HERD_NUM_PROCESSES": "2", "HERD_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "3000", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, None),  # a shell of an allocation
        (SLURM | {"SLURM_STEP_NODELIST": "gpu7"}, Place(f"gpu7:{FIRST_PORT + 2000}", 16, 5)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[007-015,20],big1"}, Place(f"gpu007:{FIRST_PORT + 2000}", 16, 5)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu-a3,gpu-a9"}, Place(f"gpu-a3:{FIRST_PORT + 2000}", 16, 5)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu7", "HERD_COORDINATOR": "ib7:99"}, Place("ib7:99", 16, 5)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu7", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.9.0.1,10.1.0.1:34911"}, Place(f"10.9.0.1:{FIRST_PORT + 3840}", 4, 3)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, Place(f"localhost:{FIRST_PORT}", 4, 3)),
        (KUBERNETES, Place(f"herd-host-0-0.herd:{FIRST_PORT}", 8, 2)),
        (PLAIN, Place("10.0.0.1:1234", 2, 1)),
        (PLAIN | {"HERD_COORDINATOR": "[::1]:1234"}, Place("[::1]:1234", 2, 1)),
        ({"HERD_NUM_PROCESSES": "1", "HERD_PROCESS_ID": "0"}, None),
    ],
)
def test_places(environment, place):
    assert find_place(environment) == place


@pytest.mark.parametrize(
    "environment, words",
    [
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "HERD_COORDINATOR cannot be found"),
        (KUBERNETES | {"HERD_NUM_PROCESSES": ""}, "HERD_NUM_PROCESSES cannot be found"),
        ({"HERD_COORDINATOR": "h:1"}, "HERD_NUM_PROCESSES and HERD_PROCESS_ID cannot be found"),
        (PLAIN | {"HERD_COORDINATOR": "10.0.0.1"}, "HERD_COORDINATOR is '10.0.0.1': give HOST:PORT"),
        (PLAIN | {"HERD_COORDINATOR": "host:65535"}, "a port from 1 to 65534"),
        (PLAIN | {"HERD_NUM_PROCESSES": "two"}, "HERD_NUM_PROCESSES is 'two': it must be a whole number"),
        (PLAIN | {"HERD_PROCESS_ID": "2"}, r"number 2 \(from 0\) of 2"),
    ],
)
def test_places_that_are_refused(environment, words):
    with pytest.raises(UserError, match=words):
        find_place(environment)


def hellos(number, **last):
    """Of all processes, each on a host of its own; the last one is different in `last`."""
    found = [Hello(i, number, f"host{i}", {"code": "abc", "jax": "1"}, {"seed": 0, "mesh": {"tp": 2}}) for i in range(number)]
    return [*found[:-1], dataclasses.replace(found[-1], **last)]


def test_those_that_agree():
    assert clash(hellos(3)) is None and difference(hellos(3)) is None


@pytest.mark.parametrize(
    "check, last, words",
    [
        (clash, {"num_processes": 4}, "process 2 on host2 was started as one of 4 processes and process 0 on host0 as one of 3"),
        (clash, {"process_id": 1}, "host1 and host2 both run process 1"),
        (difference, {"versions": {"code": "abd", "jax": "1"}}, "process 2 on host2 has another version than the others, in code"),
        (difference, {"config": {"seed": 1, "mesh": {"tp": 1}}}, "process 2 on host2 has another config than the others, in mesh.tp, seed"),
    ],
)
def test_those_that_do_not_agree(check, last, words):
    assert words in check(hellos(3, **last))


def test_of_two_that_differ_process_0_is_right_and_of_many_the_most():
    assert "process 1 on host1" in difference(hellos(2, config={"seed": 1}))
    first, *others = hellos(4)
    assert "process 0 on host0" in difference([dataclasses.replace(first, config={"seed": 1}), *others])


def test_the_missing_are_named():
    assert "2 of 4 processes did not come within 50 s, number 1, 3 (here are processes on host0, host2)" in absence(hellos(4)[::2], 50)
    assert absence(hellos(40)[:1], 50).count(",") < 25  # and not all of thousands


def free_port():
    """One whose next is free as well."""
    while True:
        with socket.create_server(("", 0)) as first:
            port = first.getsockname()[1]
            try:
                socket.create_server(("", port + 1)).close()
            except (OSError, OverflowError):
                continue
            return port


def errors_of(port, timeout, *hellos):
    """Calls and answers the roll, each in a thread; the error of each by its place."""
    errors = {}

    def take_part(i, hello):
        try:
            call_roll(hello, port, timeout) if hello.process_id == 0 else answer_roll(hello, "localhost", port, timeout)
        except UserError as error:
            errors[i] = str(error)

    threads = [threading.Thread(target=take_part, args=each) for each in enumerate(hellos)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return errors


def test_everyone_hears_what_is_wrong():
    first, second, third = hellos(3, config={"seed": 7})
    words = "process 2 on host2 has another config"
    errors = errors_of(free_port(), 30, third, second, first)
    assert set(errors) == {0, 1, 2} and all(words in error for error in errors.values())
    errors = errors_of(free_port(), 3, first, second)
    assert len(errors) == 2 and all("1 of 3 processes did not come within 3 s, number 2" in error for error in errors.values())


@pytest.mark.parametrize("limits, raised_to", [((1024, 524288), 33_268), ((65_536, 524_288), None), ((1024, -1), 33_268), ((-1, -1), None)])
def test_process_0_may_open_a_connection_to_each(limits, raised_to, monkeypatch):
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: raised.append(pair))
    _allow_open_files(33_268, Hello(0, 16_384, "node0", {}, {}))
    assert raised == ([(raised_to, limits[1])] if raised_to else [])


def test_a_limit_of_open_files_that_is_too_low_is_named(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    with pytest.raises(UserError, match="process 0 on node0 may open 4096 files, and 16384 processes .* take 33268: raise its hard limit"):
        call_roll(Hello(0, 16_384, "node0", {}, {}), 1, 1)


def test_no_coordinator_or_another_program_in_its_place():
    (first, second), port = hellos(2), free_port()
    (error,) = errors_of(port, 1, second).values()
    assert f"process 1 on host1 cannot reach the coordinator at localhost:{port} within 1 s (Connection refused)" in error
    for taken in (port, port + 1):
        with socket.create_server(("", taken)):
            (error,) = errors_of(port, 1, first).values()
            assert f"cannot take port {taken} of the coordinator (Address already in use" in error
    with socket.create_server(("", port)) as other:
        threading.Thread(target=lambda: other.accept()[0].sendall(b"SSH-2.0-OpenSSH\r\n")).start()
        (error,) = errors_of(port, 10, second).values()
        assert f"what answers at localhost:{port} is not process 0 of this run" in error


def test_strangers_at_the_port_do_not_disturb():
    (first, second), port = hellos(2), free_port()

    def stranger():
        for _ in range(100):
            try:
                with socket.create_connection(("localhost", port)) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return
            except ConnectionRefusedError:
                continue

    threading.Thread(target=stranger).start()
    assert errors_of(port, 30, first, second) == {}


PROCESS = """
    import os, sys, time
    from herd_jax.machines.roll_call import Hello, RollCall, answer_roll, call_roll
    RollCall.GRACE = 0.2
    process, port = int(sys.argv[1]), int(sys.argv[2])
    hello = Hello(process, 3, f"host{process}", {}, {})
    roll = answer_roll(hello, "localhost", port, 50) if process else call_roll(hello, port, 50)
    if process == 1:
        END
        os._exit(0)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "end, status, words",
    [
        ("os.kill(os.getpid(), 9)", PEER_LOST, "error: process 1 on host1 died without a word: see its own output"),
        ("roll.fail('the disk is full', 1)", USER_ERROR, "error: process 1 on host1 stopped: the disk is full"),
    ],
)
def test_the_end_of_one_is_the_end_of_all(end, status, words):
    program, port = textwrap.dedent(PROCESS).replace("END", end), free_port()
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(i), str(port)], stderr=subprocess.PIPE, text=True) for i in range(3)
    ]
    errors = [process.communicate(timeout=50)[1] for process in processes]
    for i in (0, 2):
        assert processes[i].returncode == status and errors[i].strip() == words


def test_a_good_end_of_one_is_no_alarm():
    program = textwrap.dedent(PROCESS).replace("END", "roll.leave()").replace("time.sleep(60)", "time.sleep(2); roll.leave()")
    port = free_port()
    processes = [subprocess.Popen([sys.executable, "-c", program, str(i), str(port)]) for i in range(3)]
    assert [process.wait(50) for process in processes] == [0, 0, 0]


def test_code_hash_is_of_every_file_of_the_package():
    root, digest = Path(herd_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    assert code_hash() == digest.hexdigest()[:12]
