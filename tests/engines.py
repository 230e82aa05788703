"""Engines of the tiny model on any mesh, and what they should answer by the plain forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from herd_jax.inference.draw import Penalties, draw, penalised
from herd_jax.inference.engine.build import EngineConfig, Parts, make_engine
from herd_jax.inference.engine.requests import Request
from herd_jax.inference.sampling import MAX_BIASES, Sampling
from herd_jax.inference.weights import Weights

LENGTH = 64
_made = {}


def parts(mesh=(1, 1, 1, 1), config=tiny.CONFIG, seed=0) -> Parts:
    steps = tiny.make_steps(*mesh, config=config)
    weights = Weights.of(steps.plan.init(seed).params, steps.model, steps.layout, jnp.float32).apart()
    return Parts(steps.model, steps.layout, jnp.float32, weights, None, LENGTH)


def engine(mesh=(1, 1, 1, 1), config=tiny.CONFIG, draft=None, **settings):
    """Returns an engine without a tokenizer, the same for the same settings, so that what one test compiled serves the others."""
    settings = {"max_sequences": 6, "page_size": 8, "chunk_tokens": 32, "max_tokens_in_cache": 400} | settings
    key = (mesh, config, draft, *sorted(settings.items()))
    if key not in _made:
        _made[key] = make_engine(parts(mesh, config), EngineConfig(**settings), draft and parts(mesh, *draft))
    return _made[key]


@functools.cache
def _forward(config):
    params = jax.tree.map(jnp.asarray, tiny.canonical_params(tiny.make_steps(config=config)))
    rows = lambda ids: {"tokens": ids, "segment_ids": np.ones((1, LENGTH), np.int32), "positions": np.arange(LENGTH)[None]}
    return jax.jit(lambda ids: tiny.plain_logits(params, rows(ids), config)[0])


def logits(ids, config=tiny.CONFIG) -> np.ndarray:
    """Logits [S, V] of the next token after each."""
    return np.asarray(_forward(config)(np.array([[*ids, *[0] * (LENGTH - len(ids))]])))[: len(ids)]


def expected(request: Request, sample: int = 0, config=tiny.CONFIG) -> list[int]:
    """The answer's ids: the plain forward of the whole sequence at each step, and the draw for its position."""
    s, ids = request.sampling, list(request.prompt)
    while len(ids) < min(LENGTH, len(request.prompt) + s.max_new_tokens):
        row, answer = logits(ids, config)[-1:], ids[len(request.prompt) :]
        V = row.shape[-1]
        count = np.bincount(answer, minlength=V)[None]
        seen = np.bincount(ids, minlength=V)[None] > 0
        bias = np.zeros((2, 1, MAX_BIASES))
        bias[0] = V
        bias[0, 0, : len(s.logit_bias)], bias[1, 0, : len(s.logit_bias)] = list(s.logit_bias), list(s.logit_bias.values())
        values = (np.array([value], np.float32) for value in (s.repetition_penalty, s.presence_penalty, s.frequency_penalty))
        changed = penalised(jnp.asarray(row), seen, count, Penalties(*values, bias[0].astype(int), bias[1].astype(np.float32)))
        ids.append(int(draw(changed, s.options(1, sample), np.array([len(ids)]))[0]))
        if ids[-1] in s.stop_ids:
            break
    return ids[len(request.prompt) :]


def ids(rng, length) -> list[int]:
    return rng.integers(0, 61, length).tolist()


def mixed_requests(number=8, seed=0) -> list[Request]:
    """Requests of all kinds: prompts of 1 to 45 tokens, some with the same beginning, with all the ways to choose a token."""
    rng = np.random.default_rng(seed)
    shared, requests = ids(rng, 20), []
    for i in range(number):
        options = [
            {}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.7, "seed": i}, {"temperature": 1.2, "top_k": 5, "log_probs": 3},
            {"repetition_penalty": 1.5, "presence_penalty": 0.4, "frequency_penalty": 0.3}, {"logit_bias": {3: 5.0, 7: -100.0}, "log_probs": 0},
            {"temperature": 1.0, "min_p": 0.1, "seed": 2**40 + i},
        ][i % 7]  # fmt: skip
        prompt = shared + ids(rng, 1 + i) if i % 3 == 0 else ids(rng, int(rng.integers(1, 45)))
        requests.append(Request(prompt, Sampling(int(rng.integers(3, 14)), **options)))
    return requests


def run(some_engine, requests) -> list[list]:
    """The answers to each request, in order of the samples."""
    found = [[] for _ in requests]
    for answer in some_engine.generate(requests):
        found[answer.ticket].append(answer)
    return [sorted(answers, key=lambda answer: answer.sample) for answers in found]


def is_empty(some_engine) -> bool:
    """Whether nobody holds a page or a slot, once the steps that are under way have ended."""
    while some_engine.has_work:
        some_engine.step()
    some_engine.step()
    scheduler = some_engine.scheduler
    return scheduler.pool.num_held == 0 and len(scheduler._free_slots) + len(scheduler._left) == scheduler.num_slots and not scheduler.admitted
