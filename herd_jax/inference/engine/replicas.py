"""Engines of the same model side by side, one for each dp rank; a request goes to the one that has most of its prompt, or least to do."""

import functools
import itertools
import threading
from collections.abc import Iterable, Iterator

import jax
from jax.sharding import Mesh, NamedSharding

from herd_jax.inference.engine.engine import Engine, answers
from herd_jax.inference.engine.requests import Answer, Piece, Request
from herd_jax.inference.weights import apart_specs
from herd_jax.mesh import AXES
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout

MOST_AHEAD = 2  # requests that a replica may have beyond the least loaded one, to get one whose prompt it has


class Replicas:
    """Does what `Engine` does, with several."""

    def __init__(self, engines: list[Engine], split, split_draft=None) -> None:
        self.engines, self._split, self._split_draft = engines, split, split_draft
        self._tickets, self._lock = itertools.count(), threading.Lock()  # a ticket is known here before its first event comes
        self._where: dict[int, tuple[Engine, int]] = {}
        self._names: dict[tuple[int, int], int] = {}

    def hold(self, weights, of_draft=None) -> None:
        """Takes the weights of the whole mesh to compute with, and those of the draft, or lets go of them."""
        own = self._split(weights) if weights is not None else itertools.repeat(None)
        drafts = self._split_draft(of_draft) if of_draft is not None else itertools.repeat(None)
        for engine, *of_engine in zip(self.engines, own, drafts):
            engine.hold(*of_engine)

    def warm_up(self) -> None:
        for engine in self.engines:
            engine.warm_up()

    def submit(self, request: Request) -> int:
        engine = self._choose(request)
        with self._lock:
            ticket, own = next(self._tickets), engine.submit(request)
            self._where[ticket], self._names[id(engine), own] = (engine, own), ticket
        return ticket

    @property
    def load(self) -> int:
        return sum(engine.load for engine in self.engines)

    def knows(self, ticket: int) -> bool:
        return ticket in self._where

    def check(self, request: Request) -> None:
        self.engines[0].check(request)

    def abort(self, ticket: int) -> None:
        if ticket in self._where:
            engine, own = self._where[ticket]
            engine.abort(own)

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines)

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        return answers(self, requests)

    def step(self) -> list[Piece | Answer]:
        """Goes on by one step in each engine; the devices of all work at the same time."""
        events = []
        for engine in self.engines:
            new = engine.step() if engine.has_work else []
            with self._lock:
                for event in new:
                    ticket = self._names[id(engine), event.ticket]
                    events.append(event._replace(ticket=ticket) if isinstance(event, Piece) else event.of(ticket))
        with self._lock:
            for ticket in [ticket for ticket, (engine, own) in self._where.items() if not engine.knows(own)]:
                engine, own = self._where.pop(ticket)
                del self._names[id(engine), own]
        return events

    def _choose(self, request: Request) -> Engine:
        found = lambda engine: len(engine.scheduler.pool.find(request.prompt[:-1], request.salt))
        least = min(engine.load for engine in self.engines)
        near = [engine for engine in self.engines if engine.load <= least + MOST_AHEAD]
        return max(near, key=lambda engine: (found(engine), -engine.load))


def layouts_of(layout: Layout) -> list[Layout]:
    """Returns the layout of each dp rank on its own."""
    meshes = [Mesh(layout.mesh.devices[..., rank : rank + 1], AXES, axis_types=layout.mesh.axis_types) for rank in range(layout.mesh.shape["dp"])]
    return [Layout(mesh, layout.num_chunks, layout.stages) for mesh in meshes]


def split_weights(model: Llama, layout: Layout, weights) -> list:
    """Returns the weights of each dp rank: the arrays that lie on its devices already."""

    def own(mesh: Mesh, array, spec):
        shards = [shard.data for shard in array.addressable_shards if shard.device in set(mesh.devices.flat)]
        return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(mesh, spec), shards)

    specs = apart_specs(model, layout)
    return [jax.tree.map(functools.partial(own, part.mesh), weights, specs) for part in layouts_of(layout)]
