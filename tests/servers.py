"""A server of a tiny random model of bytes, in a thread of the test's process."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

import jax.numpy as jnp
import tiny
import uvicorn

from herd_jax.model import Model
from herd_jax.models.llama import Llama
from herd_jax.serving.app import Server
from herd_jax.serving.limits import Keys, Limits
from herd_jax.serving.metrics import Metrics
from herd_jax.serving.run import _Uvicorn, listen
from herd_jax.serving.served import Served
from herd_jax.text.protocol import TEMPLATE_FILE
from herd_jax.text.tokenizer import ByteTokenizer

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=259, init_std=0.4)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
LENGTH = 1024


def tiny_model() -> Model:
    steps = tiny.make_steps(config=CONFIG)
    tokenizer = ByteTokenizer({TEMPLATE_FILE: TEMPLATE.encode()})
    return Model.of(Llama.make(CONFIG, "blockwise"), steps.layout, steps.plan.init(0).params, tokenizer, LENGTH, jnp.float32)


@contextlib.contextmanager
def running(limits: Limits = Limits(), keys=(), model: Model | None = None, **settings) -> Iterator[tuple[str, Server]]:
    """Gives the server's address and itself."""
    metrics = Metrics()
    settings = {"max_sequences": 8, "page_size": 16, "chunk_tokens": 32, "max_tokens_in_cache": 4096, "strict": True} | settings
    served = Served.start("tiny", model or tiny_model(), limits, metrics, **settings)
    server = Server([served], metrics, limits, Keys(keys))
    bound = listen("127.0.0.1", 0)
    program = _Uvicorn(uvicorn.Config(server.app, log_level="error", access_log=False, lifespan="off", timeout_graceful_shutdown=5, backlog=512))
    thread = threading.Thread(target=lambda: asyncio.run(program.serve(sockets=[bound])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", server
    finally:
        program.should_exit = True
        thread.join()
        server.stop()


def engine_of(server: Server):
    return server.models["tiny"].runner.engine


def wait_until(holds, seconds: float = 20.0) -> None:
    """Waits for what comes soon, and fails where it does not."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def is_idle(server: Server) -> bool:
    """Whether nobody holds a page, a slot or a place in the queue."""
    scheduler = engine_of(server).scheduler
    gate = server.models["tiny"].gate
    return not scheduler.admitted and not scheduler.queue and not scheduler.pool.num_held and not gate.num_requests and not gate.num_tokens
