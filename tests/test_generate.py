"""The command that continues a prompt or chats: text comes as it is made, and a dialog ends quietly."""

import builtins
import contextlib
import dataclasses
import io
import os
import pty
import subprocess
import sys

import jax.numpy as jnp
import pytest
import tiny

import herd_jax
from herd_jax import generate
from herd_jax.errors import command_line
from herd_jax.model import Model
from herd_jax.models.llama import Llama
from herd_jax.text.protocol import TEMPLATE_FILE
from herd_jax.text.tokenizer import ByteTokenizer

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=261, init_std=0.4)
TEMPLATE = b"{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random model of bytes with a chat template."""
    steps, directory = tiny.make_steps(config=CONFIG), tmp_path_factory.mktemp("model") / "herd"
    tokenizer = ByteTokenizer({TEMPLATE_FILE: TEMPLATE})
    Model.of(Llama.make(CONFIG, "blockwise"), steps.layout, steps.plan.init(0).params, tokenizer, 256, jnp.float32).save(directory)
    return directory


def test_a_dialog_of_two_turns(saved):
    model = herd_jax.load(saved)
    first = model.chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}], max_new_tokens=6)
    turns = ("system", "be brief"), ("user", "hi"), ("assistant", first), ("user", "and you?")
    second = model.chat([{"role": role, "content": content} for role, content in turns], max_new_tokens=6)
    assert first and second and first != second
    command = [sys.executable, "-m", "herd_jax.generate", "--model", str(saved), "--chat", "--system", "be brief"]
    options = ["--max-new-tokens", "6", "--temperature", "0"]
    with subprocess.Popen([*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for question, answer in (("hi", first), ("and you?", second)):
            expected = f"> {answer}\n".encode()
            process.stdin.write(f"{question}\n".encode())
            process.stdin.flush()
            assert process.stdout.read(len(expected)) == expected  # which is there before the next question
        process.stdin.close()
        rest, errors = process.stdout.read(), process.stderr.read()  # communicate() would miss what the reader has taken already
    assert (process.returncode, rest) == (0, b"> \n")
    assert errors == b"note: cut off, since --max-new-tokens or the model's context has no more room\n" * 2


def test_a_full_context_drops_the_oldest_turns_and_keeps_the_system_message(saved, capsys):
    model = dataclasses.replace(herd_jax.load(saved), context_length=80)
    messages = [{"role": "system", "content": "be brief"}]
    for i in range(6):
        messages += [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]
    messages = messages[:-1]
    generate.make_room(model, messages, 1)
    assert messages[0]["content"] == "be brief" and messages[-1]["content"] == "question 5" and messages[1]["role"] == "user"
    assert len(model.chat_ids(messages)) < 80 < len(model.chat_ids([messages[0], {"role": "user", "content": "x" * 26}, *messages[1:]]))
    assert "the model's context of 80 tokens is full: the oldest" in capsys.readouterr().err


def run(saved, *arguments, **options):
    command = [sys.executable, "-m", "herd_jax.generate", "--model", str(saved), "--temperature", "0", *arguments]
    return subprocess.run(command, capture_output=True, **options)


def test_a_model_without_dialogs_says_so_before_the_first_question(saved, tmp_path):
    plain = dataclasses.replace(herd_jax.load(saved), tokenizer=ByteTokenizer({}))
    plain.save(tmp_path / "plain")
    finished = run(tmp_path / "plain", "--chat", stdin=subprocess.DEVNULL)
    assert finished.returncode == 1 and b"error: the tokenizer has no chat template" in finished.stderr and b">" not in finished.stdout


def test_bytes_that_are_no_text(saved):
    finished = run(saved, "--prompt", b"a\xff")
    assert finished.returncode == 1 and finished.stderr.startswith(b"error: the prompt has 'a") and b"no text in UTF-8" in finished.stderr


def test_a_closed_pipe_ends_quietly(saved):
    command = f"{sys.executable} -m herd_jax.generate --model {saved} --prompt abc --max-new-tokens 60 --temperature 0 | head -c 2"
    finished = subprocess.run(["bash", "-c", command], capture_output=True)
    assert (finished.stdout, finished.stderr) == (b"ab", b"")


def test_another_pipe_that_breaks_is_not_hidden(capfd):
    @command_line
    def main(argv):
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        main()


def test_pieces_are_shown_before_the_next_is_made(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="utf-8"))

    def pieces():
        for text in ("so", " it", " goes"):
            yield text
            assert terminal.getvalue().endswith(text.encode())

    assert generate.show("And ", pieces()) == "so it goes"


def test_a_terminal_says_what_it_waits_for(saved):
    """The status is on stderr, and gone when the text comes."""
    outer, inner = pty.openpty()
    command = [sys.executable, "-m", "herd_jax.generate", "--model", str(saved), "--prompt", "abc", "--max-new-tokens", "2", "--temperature", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=inner, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}) as process:
        os.close(inner)
        parts = []
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while part := os.read(outer, 4096):
                parts.append(part)
        text = process.stdout.read()
    os.close(outer)
    shown = b"".join(parts).decode()
    assert process.returncode == 0 and text.startswith(b"abc")
    assert "loading and compiling the model ..." in shown and shown.rpartition("compiling the model")[2].count("\x1b[2K") >= 1


def test_interrupts(monkeypatch, capsys):
    """In an answer it is cut short and stays in the dialog; at the question the dialog ends."""

    def interrupted(*_):
        yield "half an"
        raise KeyboardInterrupt

    class Interrupted:
        stream_chat, chat_ids, context_length = interrupted, lambda *_: [], None

    questions = iter(["hi"])

    def ask(prompt):
        for question in questions:
            return question
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", ask)
    generate.chat(Interrupted(), None, ())
    assert capsys.readouterr().out == "half an\n\n"
