"""Runs the server until it is told to stop: then it takes no more requests, ends those it has, and goes."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys

import uvicorn

from herd_jax.errors import UserError
from herd_jax.serving.app import Server

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens. Raises UserError where that cannot be."""
    if not 0 <= port < 2**16:
        raise UserError(f"port is {port}: it must be from 0, which takes any that is free, to {2**16 - 1}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # who comes before the server is ready waits
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}): choose another with --host and --port") from error
    return bound


def run(server: Server, bound: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C; requests that are under way then have `drain_timeout` seconds to end."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("herd_jax.serving")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    config = uvicorn.Config(
        server.app, log_level="warning", access_log=False, backlog=BACKLOG, server_header=False, timeout_keep_alive=30, lifespan="off",
        timeout_graceful_shutdown=max(1, round(server.limits.drain_timeout)),
    )  # fmt: skip
    try:
        asyncio.run(_serve(server, _Uvicorn(config), bound))
    finally:
        server.stop()


class _Uvicorn(uvicorn.Server):
    """uvicorn that leaves the signals alone: it would raise them again when it has ended well."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


async def _serve(server: Server, program: uvicorn.Server, bound: socket.socket) -> None:
    def end() -> None:
        program.force_exit = program.should_exit  # told twice, it does not wait
        server.is_draining = program.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    await program.serve(sockets=[bound])
