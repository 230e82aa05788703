"""Continues a prompt, or chats, with a model from any checkpoint; the text comes as it is made.

    python -m herd_jax.generate --model PATH --prompt TEXT
    python -m herd_jax.generate --model PATH --chat

PATH is the workdir of a training run, a Hugging Face, Meta or herd directory, or a GGUF file.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console

from herd_jax.config import number
from herd_jax.errors import UserError, command_line
from herd_jax.mesh import MeshConfig, request_cpu_devices
from herd_jax.model import DTYPES, load


@command_line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m herd_jax.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="PATH")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT")
    what.add_argument("--chat", action="store_true", help="a dialog; Ctrl-C cuts an answer short, an empty line or Ctrl-D ends it")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=number, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=number, default=1.0, help="draws from the likeliest tokens that together have this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on accelerators, float32 on CPU")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    args = parser.parse_args(argv)
    mesh = MeshConfig(tp=args.tp, pp=args.pp, dp=1)
    request_cpu_devices(mesh)
    model = load(args.model, mesh if args.tp * args.pp > 1 else None, args.dtype)
    options = (args.max_new_tokens, args.temperature, args.top_p, args.seed, args.stop)
    if args.chat:
        chat(model, args.system, options)
    else:
        show(args.prompt, model.stream(args.prompt, *options))


def chat(model, system: str | None, options) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    model.chat_ids([*messages, {"role": "user", "content": "hi"}])  # a model without dialogs says so before the first question
    first = len(messages)
    while text := ask():
        messages.append({"role": "user", "content": text})
        make_room(model, messages, first)
        messages.append({"role": "assistant", "content": show("", model.stream_chat(messages, *options))})


def make_room(model, messages: list[dict], first: int) -> None:
    """Drops the oldest turns, from number `first` on, until the dialog leaves room for an answer."""
    dropped = 0
    while model.context_length is not None and len(messages) > first + 2 and len(model.chat_ids(messages)) >= model.context_length:
        del messages[first : first + 2]
        dropped += 1
    if dropped:
        print(f"note: the model's context of {model.context_length} tokens is full: the oldest {dropped} of your turns are left out", file=sys.stderr)


def ask() -> str:
    try:
        return input("> ").strip()
    except UnicodeDecodeError as error:
        raise UserError("the question is not in UTF-8: set the terminal to it") from error
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def show(text: str, pieces: Iterator[str]) -> str:
    """Prints the pieces as they come, until Ctrl-C; returns them together. Says when they were cut off."""
    print(text, end="", flush=True)
    parts, was_cut = [], False
    with contextlib.suppress(KeyboardInterrupt):
        with Console(stderr=True).status("loading and compiling the model ..."):  # on a terminal; the first piece comes when that is done
            first = next(pieces, "")
        parts.append(first)
        print(first, end="", flush=True)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                was_cut = bool(end.value)
                break
            parts.append(piece)
            print(piece, end="", flush=True)
    print()
    if was_cut:
        print("note: cut off, since --max-new-tokens or the model's context has no more room", file=sys.stderr)
    return "".join(parts)


if __name__ == "__main__":
    main()
