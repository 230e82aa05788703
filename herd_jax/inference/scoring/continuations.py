"""Log-likelihoods of continuations: a context is computed once for all its continuations, and a beginning that many contexts share once for
all of them.

Contexts are packed into rows of tokens, each followed by its continuations. A token of a context sees the shared beginning and its context
up to itself; one of a continuation sees the shared beginning, all of its context, and its continuation up to itself.
"""

import collections
import dataclasses
import functools
import math
import os.path
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from herd_jax.errors import UserError
from herd_jax.inference.scoring.packing import Pack, Unit, make_units, pack_units
from herd_jax.inference.scoring.whole_rows import RANK_TOKENS, bucket
from herd_jax.mesh import FSDP_AXES, fsdp_size, on_mesh, to_host
from herd_jax.models.attention.blockwise import blockwise_attention
from herd_jax.models.llama import Llama
from herd_jax.models.log_probabilities import predict
from herd_jax.models.params import Layout, map_declarations
from herd_jax.parallel import tensor
from herd_jax.parallel.relay import relay

FAMILY_SIZE = 16  # at least so many contexts with the same beginning are a family, whose beginning is computed on its own,
FAMILY_TOKENS = 64  # where it has at least so many tokens
TARGET_CHUNK = 256  # targets whose logits exist at once

ROWS = PartitionSpec(FSDP_AXES)  # of [R, N]: a row for each device of dp and cp, the same on those of tp and pp
KEYS = PartitionSpec("pp", FSDP_AXES, None, "tp")  # of [PP x slots, R, S, K, H]


class PackedContexts(NamedTuple):
    """Rows of N tokens [R, N], and for each row which of its hidden states predict which targets [R, M], of which `num_targets` are valid."""

    tokens: jax.Array
    positions: jax.Array
    context_start: jax.Array  # a token sees the keys start .. end - 1 of its row in two ranges: of its context,
    context_end: jax.Array
    own_start: jax.Array  # and of its own continuation
    own_end: jax.Array
    target_index: jax.Array
    targets: jax.Array
    num_targets: jax.Array  # [R]


class Beginning(NamedTuple):
    """Keys and values of tokens that contexts share, the same for each row; `length` of them are valid."""

    k: jax.Array
    v: jax.Array
    length: jax.Array  # [R]


class Score(NamedTuple):
    """The score of a continuation: the sum of its tokens' log-probabilities in nats, and whether each was the likeliest at its place."""

    log_likelihood: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class ContinuationScorer:
    """A model on a mesh, each pipeline rank with one chunk of layers; computes in `dtype`."""

    model: Llama
    layout: Layout
    dtype: jnp.dtype

    def score(self, params, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, Score]]:
        """Yields (index of the request, its score) as they are found, for requests (context, continuation) of one id or more each.

        Raises UserError where a score is not finite, and for a request that lacks one of the two: nothing would predict its first token.
        """
        for i, (context, continuation) in enumerate(requests):
            if not context or not continuation:
                lacks = "context" if not context else "continuation"
                raise UserError(f"request {i} has no {lacks}: give one of a token or more, such as the begin token for a context")
        num_rows = fsdp_size(self.layout.mesh)
        for beginning, members in families([tuple(context) for context, _ in requests]):
            prefix = self._beginning(params, beginning) if beginning else None
            contexts = collections.defaultdict(list)
            for i in members:
                contexts[tuple(requests[i][0][len(beginning) :])].append((i, requests[i][1]))
            units = [unit for context, of_context in contexts.items() for unit in make_units(context, of_context, RANK_TOKENS)]
            packs = pack_units(units, RANK_TOKENS)
            for some in (packs[first : first + num_rows] for first in range(0, len(packs), num_rows)):
                # All full batches have one shape, so that they need only one program.
                size = bucket(max(RANK_TOKENS if len(packs) > num_rows else 0, *(pack.size for pack in some)))
                batch = self._batch(some, num_rows, size, len(beginning))
                log_p_RM, best_RM = (to_host(of) for of in self._score(prefix is not None)(params, batch, prefix))
                for row, pack in enumerate(some):
                    for i, targets in pack.slices():
                        log_likelihood = float(log_p_RM[row, targets].sum())
                        if not math.isfinite(log_likelihood):
                            raise UserError("the model's log-likelihoods are not finite: its weights are damaged; give another checkpoint")
                        yield i, Score(log_likelihood, bool(best_RM[row, targets].all()))

    def _beginning(self, params, tokens: tuple[int, ...]) -> Beginning:
        num_rows = fsdp_size(self.layout.mesh)
        pack = Pack([Unit(tokens, [])])
        batch = self._batch([pack] * num_rows, num_rows, bucket(pack.size), 0)
        return Beginning(*self._keys(params, batch), self._rows(np.full(num_rows, len(tokens), np.int32)))

    @functools.cached_property
    def _keys(self):
        return self._jit(lambda params, batch: self._hidden(params, batch, None)[2], (self._specs, ROWS), (KEYS, KEYS))

    @functools.cached_property
    def _score(self):
        """Returns a function of whether there is a shared beginning, which returns the function (params, batch, beginning or None) ->
        log-probabilities [R, M] of the targets, and whether each is the likeliest."""

        def run(params, batch, beginning):
            x_BTD, weights, _ = self._hidden(params, batch, beginning)
            head, output_DV = self.model.head(weights["ends"])
            hidden_TD = head.hidden(x_BTD, tensor.WHOLE_SEQUENCE)[0]
            return self._of_targets(hidden_TD, output_DV, jax.tree.map(lambda a: a[0], batch))

        @functools.cache
        def with_beginning(has_one: bool):
            return self._jit(run, (self._specs, ROWS, Beginning(KEYS, KEYS, ROWS) if has_one else None), (ROWS, ROWS))

        return with_beginning

    def _hidden(self, params, batch: PackedContexts, beginning: Beginning | None):
        """Returns the activations [1, N, D] of this device's row, the weights, and the row's keys and values [slots, 1, N, K, H]."""
        weights, num_slots = self.layout.gather(params, self.model.declared, self.dtype), max(1, *self.layout.layers_per_stage)
        rotation = self.model.rotation(batch.positions)

        def layer(x_BTD, w, slot):
            def attend(q_BTNH, k_BTKH, v_BTKH):
                ranges = [(k_BTKH, v_BTKH, batch.context_start, batch.context_end), (k_BTKH, v_BTKH, batch.own_start, batch.own_end)]
                if beginning is not None:
                    nothing = jnp.zeros_like(batch.tokens)
                    ranges.append((beginning.k[slot], beginning.v[slot], nothing, nothing + beginning.length[:, None]))
                return blockwise_attention(q_BTNH, ranges), (k_BTKH, v_BTKH)

            return self.model.layer(w)(x_BTD, rotation, attend, tensor.WHOLE_SEQUENCE)

        def run(x_BTD, stage):
            x_BTD, kept = self.layout.scan(layer, x_BTD, weights["layers"], self.model.declared["layers"], stage)
            return x_BTD, jax.tree.map(lambda a: jnp.pad(a, [(0, num_slots - a.shape[0])] + [(0, 0)] * (a.ndim - 1)), kept)

        x_BTD, kept = relay(self.layout.layers_per_stage, run, self.model.embedding(weights["ends"])(batch.tokens, tensor.WHOLE_SEQUENCE))
        return x_BTD, weights, kept

    def _of_targets(self, hidden_TD, output_DV, batch: PackedContexts):
        """Returns log-probabilities [1, M] of a row's targets and whether each is the likeliest; computes only the chunks that hold targets."""

        def chunk(i, found):
            cut = lambda a: lax.dynamic_slice_in_dim(a, i * TARGET_CHUNK, TARGET_CHUNK)
            said = predict(hidden_TD[cut(batch.target_index)], output_DV, cut(batch.targets), self.model.config.vocab_size)
            new = said.log_p_C, said.hit_C >= said.peak_C
            return tuple(lax.dynamic_update_slice_in_dim(of, part, i * TARGET_CHUNK, 0) for of, part in zip(found, new))

        nothing = jnp.zeros(batch.targets.shape), jnp.zeros(batch.targets.shape, bool)
        found = lax.fori_loop(0, -(-batch.num_targets // TARGET_CHUNK), chunk, nothing)
        return tuple(of[None] for of in found)

    def _batch(self, packs: Sequence[Pack], num_rows: int, size: int, first_position: int) -> PackedContexts:
        most = -(-size // TARGET_CHUNK) * TARGET_CHUNK
        rows = [pack.arrays(size, most, first_position) for pack in packs]
        rows += [Pack([]).arrays(size, most, first_position)] * (num_rows - len(rows))
        return PackedContexts(*(self._rows(np.stack([row[name] for row in rows])) for name in PackedContexts._fields))

    def _rows(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, NamedSharding(self.layout.mesh, ROWS))

    @functools.cached_property
    def _specs(self):
        return map_declarations(self.layout.spec, self.model.declared)

    def _jit(self, function, in_specs, out_specs):
        return on_mesh(function, self.layout.mesh, in_specs, out_specs, self.dtype)


def families(contexts: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Returns (shared beginning, indices of its contexts) for each family; contexts of no family share the beginning ().

    A beginning is shorter than each of its contexts, so that there is a token to predict from.
    """
    alike = collections.defaultdict(list)
    for i, context in enumerate(contexts):
        alike[context[:FAMILY_TOKENS]].append(i)
    found, single = [], []
    for members in alike.values():
        distinct = {contexts[i] for i in members}
        beginning = tuple(os.path.commonprefix(list(distinct))[: min(map(len, distinct)) - 1])
        if len(distinct) >= FAMILY_SIZE and len(beginning) >= FAMILY_TOKENS:
            found.append((beginning, members))
        else:
            single += members
    return found + ([((), single)] if single else [])
