"""Figures for Prometheus, under the names that vLLM gives them, so that its dashboards show them."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from herd_jax.inference.engine.engine import Engine
from herd_jax.inference.engine.requests import Answer, Piece

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """The figures of all models of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        label = {"labelnames": ["model_name"], "registry": self.registry}
        gauge = lambda name, text: Gauge(f"vllm:{name}", text, **label)
        counter = lambda name, text: Counter(f"vllm:{name}", text, **label)
        histogram = lambda name, text, buckets: Histogram(f"vllm:{name}", text, buckets=buckets, **label)
        self._running = gauge("num_requests_running", "Answers that are computed.")
        self._waiting = gauge("num_requests_waiting", "Answers that wait for a slot or for pages.")
        self._usage = gauge("kv_cache_usage_perc", "Share of the pages that are held. 1 is all of them.")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "Tokens of answers.")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts that were looked for in the pages.")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts that were found in the pages.")
        self._preempted = counter("num_preemptions", "Answers that were sent back for want of pages.")
        names = ["model_name", "finished_reason"]
        self._ended = Counter("vllm:request_success", "Answers that ended, by the reason.", labelnames=names, registry=self.registry)
        self._first = histogram("time_to_first_token_seconds", "From the request to its first token.", SECONDS)
        self._between = histogram("inter_token_latency_seconds", "From one token to the next.", SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From the request to its end.", SECONDS)
        self._lengths = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._models: list[tuple[str, Engine]] = []
        self._preempted_before: dict[int, int] = {}

    def add_model(self, name: str, engines: list[Engine]) -> Callable[[list[Piece | Answer]], None]:
        """Takes a model's engines under watch; returns the function that is to be told of each step's events."""
        self._models += [(name, engine) for engine in engines]
        begun: dict[tuple[int, int], float] = {}

        def observe(events: list[Piece | Answer]) -> None:
            now = time.perf_counter()
            for event in events:
                key = event.ticket, event.sample
                if isinstance(event, Piece) and event.ids:
                    if key in begun:
                        self._between.labels(name).observe((now - begun[key]) / len(event.ids))
                    begun[key] = now
                elif isinstance(event, Answer):
                    begun.pop(key, None)
                    self._ended.labels(name, event.finish_reason).inc()
                    self._generated.labels(name).inc(len(event.ids))
                    self._lengths.labels(name).observe(len(event.ids))
                    self._queries.labels(name).inc(len(event.request.prompt))
                    self._hits.labels(name).inc(event.num_found)

        return observe

    def asked(self, name: str, prompt_tokens: int) -> None:
        self._prompt.labels(name).inc(prompt_tokens)

    def answered(self, name: str, to_first: float | None, whole: float) -> None:
        """Notes the seconds from a request to its first token, and to its end."""
        if to_first is not None:
            self._first.labels(name).observe(to_first)
        self._whole.labels(name).observe(whole)

    def text(self) -> bytes:
        """Returns the figures as Prometheus reads them."""
        totals: dict[str, list[float]] = {}
        for name, engine in self._models:
            scheduler = engine.scheduler
            pool, sent_back = scheduler.pool, scheduler.num_sent_back
            self._preempted.labels(name).inc(sent_back - self._preempted_before.get(id(engine), 0))
            self._preempted_before[id(engine)] = sent_back
            figures = totals.setdefault(name, [0, 0, 0, 0])
            for i, value in enumerate((len(scheduler.admitted), len(scheduler.queue), pool.num_held, pool.num_pages - 1)):
                figures[i] += value
        for name, (running, waiting, held, pages) in totals.items():
            self._running.labels(name).set(running)
            self._waiting.labels(name).set(waiting)
            self._usage.labels(name).set(held / pages)
        return generate_latest(self.registry)
