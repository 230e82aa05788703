"""An engine in a thread of its own, for programs that wait for answers with asyncio."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

from herd_jax.inference.engine.engine import Engine
from herd_jax.inference.engine.replicas import Replicas
from herd_jax.inference.engine.requests import Answer, Piece, Request

IDLE_SECONDS = 0.5  # after which a thread with nothing to do looks whether it is to end


class EngineStopped(RuntimeError):
    """The engine's thread has ended, by a fault or because it was told to."""


class Runner:
    """Runs the steps of an engine in a thread. `observe(events)` is called there after each step, and must be quick."""

    def __init__(self, engine: Engine | Replicas, observe: Callable[[list[Piece | Answer]], None] = lambda events: None) -> None:
        self.engine, self._observe = engine, observe
        self.fault: BaseException | None = None
        self._wanted, self._stopping = threading.Event(), False
        self._lock = threading.Lock()  # a ticket is known here before its first event comes
        self._listeners: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> "Runner":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread after the step that it is at; who still waits for an answer gets EngineStopped."""
        self._stopping = True
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and self.fault is None

    async def stream(self, request: Request) -> AsyncIterator[Piece | Answer]:
        """Yields the pieces and the answers to a request as they come. When the caller stops listening, the request is aborted.

        Raises UserError for a request that can never be answered, and EngineStopped where the engine is at its end.
        """
        queue, loop = asyncio.Queue(), asyncio.get_running_loop()
        await loop.run_in_executor(None, self.engine.check, request)  # a grammar takes its time
        with self._lock:
            if not self.is_running or self._stopping:
                raise EngineStopped("the engine has stopped")
            ticket = self.engine.submit(request)
            self._listeners[ticket] = loop, queue
        self._wanted.set()
        missing = request.num_samples
        try:
            while missing:
                for event in await queue.get():
                    if isinstance(event, BaseException):
                        raise EngineStopped("the engine has stopped") from event
                    missing -= isinstance(event, Answer)
                    yield event
        finally:
            self._listeners.pop(ticket, None)
            if missing:
                self.engine.abort(ticket)
                self._wanted.set()

    async def answers(self, request: Request) -> list[Answer]:
        """Returns the answers to a request, in order of the samples."""
        found = [event async for event in self.stream(request) if isinstance(event, Answer)]
        return sorted(found, key=lambda answer: answer.sample)

    def _run(self) -> None:
        try:
            while not self._stopping:
                if not self.engine.has_work:
                    self._wanted.wait(IDLE_SECONDS)
                    self._wanted.clear()
                    continue
                events = self.engine.step()
                self._observe(events)
                self._deliver(events)
        except BaseException as error:  # whatever it is, nobody must wait for ever
            self.fault = error
            raise
        finally:
            with self._lock:
                self._stopping = True
                waiting = list(self._listeners)
            reason = self.fault or EngineStopped("the engine was told to stop")
            self._send({ticket: [reason] for ticket in waiting})

    def _deliver(self, events: list[Piece | Answer]) -> None:
        by_ticket: dict[int, list[Any]] = defaultdict(list)
        with self._lock:  # `stream` may be between `submit` and its entry
            for event in events:
                by_ticket[event.ticket].append(event)
        self._send(by_ticket)

    def _send(self, by_ticket: dict[int, list[Any]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue, list]]] = defaultdict(list)
        for ticket, events in by_ticket.items():
            if ticket in self._listeners:
                loop, queue = self._listeners[ticket]
                by_loop[loop].append((queue, events))
        for loop, items in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, items)


def _put(items: list[tuple[asyncio.Queue, list]]) -> None:
    for queue, events in items:
        queue.put_nowait(events)
