"""The command that continues a prompt or chats: text comes as it is made, and a dialog ends quietly."""

import builtins
import dataclasses
import io
import subprocess
import sys

import jax.numpy as jnp
import pytest
import tiny

import herd_jax
from herd_jax import generate
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
    Model(Llama.make(CONFIG, "blockwise"), steps.layout, steps.plan.init(0).params, tokenizer, 256, jnp.float32).save(directory)
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
    assert (process.returncode, rest, errors) == (0, b"> \n", b"")


def test_pieces_are_shown_before_the_next_is_made(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="utf-8"))

    def pieces():
        for text in ("so", " it", " goes"):
            yield text
            assert terminal.getvalue().endswith(text.encode())

    assert generate.show("And ", pieces()) == "so it goes"


def test_interrupts(monkeypatch, capsys):
    """In an answer it is cut short and stays in the dialog; at the question the dialog ends."""

    def interrupted(*_):
        yield "half an"
        raise KeyboardInterrupt

    class Interrupted:
        stream_chat = interrupted

    questions = iter(["hi"])

    def ask(prompt):
        for question in questions:
            return question
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", ask)
    generate.chat(Interrupted(), None, ())
    assert capsys.readouterr().out == "half an\n\n"
