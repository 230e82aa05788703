"""Serves models over HTTP, for clients of OpenAI's API; a page to chat in a browser is at /.

    python -m herd_jax.serve --model PATH
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"messages": [{"role": "user", "content": "Hello"}]}'

PATH is the workdir of a training run, a Hugging Face, Meta or herd directory, or a GGUF file; NAME=PATH gives it a name. Several models share a
process where the memory allows.
"""

import argparse
import os
import sys

from herd_jax.config import number
from herd_jax.errors import UserError, command_line
from herd_jax.mesh import MeshConfig, request_cpu_devices
from herd_jax.model import DTYPES, load
from herd_jax.text.protocol import import_extra


@command_line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m herd_jax.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, action="append", metavar="[NAME=]PATH", help="may be repeated")
    parser.add_argument("--host", default="127.0.0.1", help="this machine alone, unless told otherwise; 0.0.0.0: everybody who reaches it")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--api-key", action="append", default=[], help="clients must send one of these; also HERD_API_KEYS, with commas between")
    parser.add_argument("--draft", metavar="PATH", help="a smaller model of the same tokens, whose guesses make the first model faster")
    parser.add_argument("--guesses", type=int, help="tokens guessed at each step; default: 4 with a draft, else 0; without a draft they are looked up")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on accelerators, float32 on CPU")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1, help="replicas")
    engine = parser.add_argument_group("the engine")
    engine.add_argument("--max-tokens-in-cache", type=int, help="whose keys and values are held; default: a share of the free memory")
    engine.add_argument("--max-sequences", type=int, help="answers that are computed at the same time")
    engine.add_argument("--max-length", type=int, help="tokens of a prompt with its answer; default: the model's context")
    engine.add_argument("--strict", action="store_true", help="the bits of an answer never depend on what else is computed")
    engine.add_argument("--no-warm-up", dest="warm_up", action="store_false", help="compile when a request needs it, not before the first one")
    engine.add_argument("--grow", action="store_true", help="admit requests before there is room for their greatest length")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-requests", type=int, default=512, help="answers of a model that are computed or wait; more get 429")
    limits.add_argument("--max-tokens", type=int, default=1_000_000, help="of their prompts and answers together")
    limits.add_argument("--max-body", type=int, default=8 * 2**20, help="bytes")
    limits.add_argument("--timeout", type=number, default=600.0, help="seconds of a request")
    limits.add_argument("--drain-timeout", type=number, default=60.0, help="seconds that requests have to end after SIGTERM")
    args = parser.parse_args(argv)
    for module in ("starlette", "uvicorn", "jsonschema", "prometheus_client"):
        import_extra(module, "the server", "serve")
    serve(args)


def serve(args: argparse.Namespace) -> None:
    from herd_jax.inference.engine.build import check_weights
    from herd_jax.serving.app import Server
    from herd_jax.serving.limits import Keys, Limits
    from herd_jax.serving.metrics import Metrics
    from herd_jax.serving.run import listen, run
    from herd_jax.serving.served import Served

    limits = Limits(args.max_requests, args.max_tokens, args.max_body, args.timeout, args.drain_timeout)
    from_environment = [key for key in os.environ.get("HERD_API_KEYS", "").split(",") if key]
    keys, bound, metrics = Keys([*args.api_key, *from_environment]), listen(args.host, args.port), Metrics()
    mesh = MeshConfig(tp=args.tp, cp=args.cp, pp=args.pp, dp=args.dp)
    request_cpu_devices(mesh)
    load_on_mesh = lambda path: load(path, mesh if mesh != MeshConfig(dp=1) else None, args.dtype)
    settings = {
        "max_tokens_in_cache": args.max_tokens_in_cache, "max_sequences": args.max_sequences, "max_length": args.max_length, "strict": args.strict,
        "reserve": not args.grow,
    }  # fmt: skip
    named = [_name(given) for given in args.model]
    if len({name for name, _ in named}) < len(named):
        raise UserError("two models have the same name: give each its own, as --model NAME=PATH")
    models = []
    for i, (name, path) in enumerate(named):
        print(f"loading {name}{' and compiling its steps' if args.warm_up else ''} ...", file=sys.stderr, flush=True)
        model = load_on_mesh(path)
        check_weights(model.llama, model.layout, model.dtype)
        draft = load_on_mesh(args.draft) if args.draft and i == 0 else None
        guesses = args.guesses if args.guesses is not None else 4 if draft else 0
        models.append(Served.start(name, model, limits, metrics, draft, args.warm_up, guesses=guesses, **settings))
    host, port = bound.getsockname()[:2]
    print(f"serving {', '.join(name for name, _ in named)} at http://{host}:{port}", file=sys.stderr, flush=True)
    run(Server(models, metrics, limits, keys), bound)


def _name(given: str) -> tuple[str, str]:
    """Returns the name and the path of a model; the name of a path is its last part."""
    name, found, path = given.partition("=")
    if found and name and "/" not in name and not os.path.exists(given):
        return name, path
    return os.path.basename(os.path.normpath(given)), given


if __name__ == "__main__":
    main()
