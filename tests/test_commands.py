"""`python -m herd_jax` lists the commands."""

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import herd_jax
from herd_jax.__main__ import commands

ROOM = Path(herd_jax.__file__).parent
ENTRY_POINT = 'if __name__ == "__main__":'


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOM.parent)


def test_every_entry_point_is_listed_with_what_it_does():
    entry_points = {path.stem for path in ROOM.glob("[!_]*.py") if ENTRY_POINT in path.read_text()}
    listed = run("-m", "herd_jax")
    assert listed.returncode == 0 and not listed.stderr
    lines = [line.split(maxsplit=1) for line in listed.stdout.splitlines()[2:]]
    assert {name for name, _ in lines} == entry_points == commands(ROOM).keys()
    assert dict(lines)["train"] == "Trains a Llama, or continues an interrupted run."
    assert dict(lines)["plan"] == "What a run will need and how fast it will be, before it is started."


def test_the_list_imports_neither_jax_nor_a_command():
    program = "import runpy, sys; sys.argv = ['herd_jax']; runpy.run_module('herd_jax', run_name='__main__'); print(*sys.modules)"
    modules = run("-c", program).stdout.splitlines()[-1].split()
    assert "herd_jax.errors" in modules
    assert not {"jax", "numpy", *(f"herd_jax.{name}" for name in commands(ROOM))} & set(modules)


@pytest.mark.parametrize(
    ("argument", "remedy"), [("--all", "python -m herd_jax lists the commands"), ("train", "write python -m herd_jax.train")]
)
def test_an_unknown_argument_is_one_sentence_and_exit_2(argument, remedy):
    ran = run("-m", "herd_jax", argument)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: unknown argument '{argument}': {remedy}") and ran.stderr.count("\n") == 1


@pytest.mark.parametrize("name", commands(ROOM))
def test_every_command_has_help(name, monkeypatch, capsys):
    """In this process: most of the commands import jax, which takes seconds."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    try:
        runpy.run_module(f"herd_jax.{name}", run_name="__main__")
    except SystemExit as end:
        assert not end.code
    assert "--" in capsys.readouterr().out


def test_a_command_without_docstring_is_noticed(tmp_path):
    (tmp_path / "library.py").write_text("x = 1\n")
    (tmp_path / "good.py").write_text('"""`python -m herd_jax.good A: B`: does good.\n\nMore.\n"""\ndef main(): ...\n')
    assert commands(tmp_path) == {"good": "Does good."}
    (tmp_path / "bare.py").write_text("def main(): ...\n")
    with pytest.raises(AssertionError, match="bare.py is a command without a docstring"):
        commands(tmp_path)


def test_importing_the_list_runs_nothing(capsys):
    spec = importlib.util.find_spec("herd_jax.__main__")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert capsys.readouterr().out == ""
