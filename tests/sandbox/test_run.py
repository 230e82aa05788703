"""The sandbox: what a hostile program can reach, and what is said of the limit that ended it. CI runs this as root, whom the kernel's own limits do not bind."""

import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from herd_jax.errors import UserError
from herd_jax.sandbox import run as sandbox
from herd_jax.sandbox.run import Limits, run, run_python
from herd_jax.sandbox.seccomp import ARCHITECTURES
from herd_jax.sandbox.usage import usage

SMALL = Limits(seconds=20, memory=2**28, processes=16, output=2**16, disk=2**22, open_files=32)

HOSTILE = {
    "a fork bomb": ("import os\nwhile True: os.fork()", "processes"),
    "forks that wait": ("import os, time\nwhile True:\n    if os.fork() == 0: time.sleep(60)", "processes"),
    "forks that leave their session": ("import os, time\nwhile True:\n    if os.fork() == 0: os.setsid(); time.sleep(60)", "processes"),
    "threads": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()", "processes"),
    "memory bit by bit": ("kept = []\nwhile True: kept.append(bytearray(b'x') * 10**6)", "memory"),
    "memory at once": ("kept = bytearray(10**11)", "memory"),
    "memory of many processes": ("import os, time\nfor _ in range(8):\n    if os.fork() == 0: kept = bytearray(b'x') * 10**8; time.sleep(60)\ntime.sleep(60)", "memory"),
    "a gigabyte of output": ("print('x' * 10**6)\nwhile True: print('x' * 10**6)", "output"),
    "a gigabyte of errors": ("import sys\nwhile True: sys.stderr.write('x' * 10**6)", "output"),
    "a large file": ("file = open('f', 'wb')\nwhile True: file.write(bytes(10**6))", "disk"),
    "many files": ("n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').write(bytes(10**6))", "disk"),
    "files elsewhere": ("n = 0\nwhile True:\n    n += 1\n    open(f'/tmp/{n}', 'wb').write(bytes(10**6))", "disk"),
    "a flood of descriptors": ("kept = []\nwhile True: kept.append(open('/dev/null'))", "open_files"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_limit_holds_and_is_named(name):
    program, limit = HOSTILE[name]
    outcome = run_python(program, SMALL)
    assert (outcome.limit, outcome.passed) == (limit, False), outcome
    assert len(outcome.stdout) <= SMALL.output and len(outcome.stderr) <= SMALL.output


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "import os, sys, time; os.close(1); os.close(2); time.sleep(60)"])
def test_an_endless_program_ends(program):
    outcome = run_python(f"print('begun', flush=True)\n{program}", Limits(seconds=1))
    assert (outcome.limit, outcome.stdout) == ("seconds", "begun\n")


FORBIDDEN = {
    "to read a file of the machine": "print(open('/etc/passwd').read())",
    "to read this repository": f"print(open({__file__!r}).read())",
    "to write outside": "open('/usr/lib/written', 'w')",
    "to write to the root": "open('/written', 'w')",
    "to write to Python": f"open({os.path.join(sys.prefix, 'written')!r}, 'w')",
    "to write to shared memory": "open('/dev/shm/written', 'w').write('x' * 10**6)",
    "to leave its directory by a link": "import os; os.symlink('/etc/passwd', 'link'); open('link').read()",
    "to connect": "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
    "to signal": "import os; os.kill({parent}, 15)",
    "to make memory without a process": "import os; os.memfd_create('x')",
    "to make a namespace": "import ctypes, os; os._exit(ctypes.CDLL(None).unshare(0x10000000) != 0)",
    "to make a namespace with clone": "import ctypes, os; os._exit(ctypes.CDLL(None).syscall({clone}, 0x10000011, 0, 0, 0, 0) < 0)",
    "to trace": "import ctypes, os; os._exit(ctypes.CDLL(None).ptrace(0, 0, 0, 0) != 0)",
    "to become root": "import os; os.setuid(0); os.setgroups([0]); open('/dev/mem')",
}


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_forbidden_fails(name, listener):
    outcome = run_python(FORBIDDEN[name].format(port=listener, parent=os.getpid(), clone=ARCHITECTURES[platform.machine()][1]))
    assert outcome.returncode == 1 and outcome.limit is None, outcome


def test_no_datagram_comes_out():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(0.5)
        send = f"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {receiver.getsockname()[1]}))"
        run_python(send)
        with pytest.raises(TimeoutError):
            receiver.recv(1)
        exec(send)  # the same from outside does
        assert receiver.recv(1) == b"x"


def test_nothing_outlives_the_program_and_nobody_else_is_ended():
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    before = usage(os.getpid()).threads
    program = "import os, signal, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)\nprint(len(os.listdir('/proc')) < 100)\n"
    kills = "for process in range(1, 40_000):\n    try:\n        if process != os.getpid(): os.kill(process, signal.SIGKILL)\n    except OSError: pass\n"
    outcome = run_python(program + kills + "print('done')")
    assert outcome.stdout == "True\ndone\n" and outcome.passed
    assert other.poll() is None
    deadline = time.monotonic() + 5
    while usage(os.getpid()).threads > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert usage(os.getpid()).threads <= before
    other.kill()
    other.wait()


def test_an_ordinary_program_runs_as_it_would():
    files = {"main.py": "import sys, helper.words\nprint(helper.words.greet(sys.stdin.read()), sys.argv[1])\nprint('aside', file=sys.stderr)\nsys.exit(3)",
             "helper/words.py": "def greet(name):\n    open('/tmp/kept', 'w').write(name)\n    return 'hello ' + open('/tmp/kept').read()"}  # fmt: skip
    outcome = run(["python", "main.py", "again"], files, stdin="wörld\ud800")
    assert outcome == sandbox.Outcome("hello wörld? again\n", "aside\n", 3, None)
    many = "x" * 300_000  # more than a pipe holds
    assert run(["wc", "-c"], stdin=many).stdout.strip() == "300000"
    assert run_python("import os; print(os.listdir('.'))").stdout == "['program.py']\n"  # of the last program nothing is left
    killed = run_python("import os; os.kill(os.getpid(), 9)")
    assert (killed.returncode, killed.limit) == (137, None)
    assert "no-such-program" in run(["no-such-program"]).stderr


def test_a_file_outside_the_directory_is_refused():
    for name in ("/etc/x", "../x", "a/../../x", ""):
        with pytest.raises(UserError, match="outside its directory"):
            run(["true"], {name: ""})
    with pytest.raises(UserError, match="limit memory of a sandbox is 0"):
        Limits(memory=0)


def test_a_processor_whose_calls_are_not_known_is_no_means(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    sandbox.bubblewrap_program.cache_clear()
    with pytest.raises(UserError, match="system calls of riscv64 are not known"):
        run_python("print(1)")
    sandbox.bubblewrap_program.cache_clear()


def test_without_means_code_is_refused_unless_the_danger_is_accepted(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "bubblewrap_program", lambda: None)
    with pytest.raises(UserError, match="cannot be contained on this machine .* or accept the danger with --unsafe-execution"):
        run_python("print(1)")
    outcome = run_python("import os; print(1); open('here', 'w')", unsafe=True)
    assert (outcome.stdout, outcome.passed) == ("1\n", True)
    assert not Path("here").exists()
    assert run_python("while True: pass", Limits(seconds=1), unsafe=True).limit == "seconds"
