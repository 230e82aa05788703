"""Logits and losses of whole rows on any mesh: the pipeline's forward, with another head."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from herd_jax.mesh import on_mesh, to_host
from herd_jax.models.cross_entropy import cross_entropy_sum
from herd_jax.models.llama import Llama
from herd_jax.models.log_probabilities import count_misses, log_probabilities
from herd_jax.models.params import Layout, map_declarations
from herd_jax.models.reward import rewards
from herd_jax.parallel import collectives
from herd_jax.parallel.context import zigzag_order
from herd_jax.parallel.relay import relay

RANK_TOKENS = 4096  # tokens that a dp rank scores at once, where rows are shorter: enough to keep its matmuls efficient
BATCH_SPEC = PartitionSpec(None, "dp", "cp")  # of [1, B, S], in zigzag order


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model on a mesh, each pipeline rank with one chunk of layers; computes in `dtype`."""

    model: Llama
    layout: Layout
    dtype: jnp.dtype

    def logits(self, params, ids_BS: np.ndarray) -> np.ndarray:
        """Returns the logits, FP32 [B, S, V], of ids, int [B, S]."""
        B, S = ids_BS.shape
        batch, order = self._batch(ids_BS, np.zeros((B, S), bool))
        logits = to_host(self._logits(params, batch))[0]
        return logits[:, np.argsort(order)][:B, :S, : self.model.config.vocab_size]

    def loss(self, params, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns, for each row of two ids or more, the sum, in nats, of the losses of its tokens after the first, each predicted from those
        before."""
        return self._sums(self._loss, params, rows, [1] * len(rows))

    def misses(self, params, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> np.ndarray:
        """Returns, for each row, how many of its ids from its `starts` on are not the likeliest after those before.

        This is 0 where greedy decoding, given the ids before, gives the others.
        """
        return self._sums(self._misses, params, rows, starts)

    def log_probabilities(self, params, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[np.ndarray]:
        """Returns, for each row, the log-probability in nats of each of its ids from its `starts` (1 or more) on, given those before."""
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
        for some, batch, order in self._batches_of(rows, starts):
            log_p_BS = to_host(self._log_p(params, batch))[:, np.argsort(order)]
            for at, i in enumerate(some):
                found[i] = log_p_BS[at, starts[i] - 1 : len(rows[i]) - 1]
        return found

    def rewards(self, params, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the reward that a reward model gives each row, read at its last id."""
        found = np.zeros(len(rows))
        for some, batch, order in self._batches_of([[*row, 0] for row in rows], [1] * len(rows)):
            reward_BS = to_host(self._rewards(params, batch))[:, np.argsort(order)]
            found[some] = [reward_BS[at, len(rows[i]) - 1] for at, i in enumerate(some)]
        return found

    def _sums(self, function, params, rows, starts) -> np.ndarray:
        sums = np.zeros(len(rows))
        for some, batch, _ in self._batches_of(rows, starts):
            sums[some] = to_host(function(params, batch))[: len(some)]
        return sums

    def _batches_of(self, rows, starts):
        """Yields (the numbers of some rows, their batch, the order of its tokens). Rows of similar length go together, so that every dp rank has
        work."""
        dp = self.layout.mesh.shape["dp"]
        size = lambda i: bucket(len(rows[i]) - 1)
        for num_targets, group in itertools.groupby(sorted(range(len(rows)), key=size), key=size):
            members, most = list(group), dp * max(1, RANK_TOKENS // num_targets)
            for some in (members[first : first + most] for first in range(0, len(members), most)):
                shape = (dp * bucket(-(-len(some) // dp), least=1), num_targets + 1)
                ids_BS, mask_BS = np.zeros(shape, np.int32), np.zeros(shape, bool)
                for row, i in enumerate(some):
                    ids_BS[row, : len(rows[i])], mask_BS[row, starts[i] : len(rows[i])] = rows[i], True
                yield some, *self._batch(ids_BS[:, :-1], mask_BS[:, 1:], ids_BS[:, 1:])

    @functools.cached_property
    def _logits(self):
        def objective(hidden_BTD, output_DV, _):
            logits_BTV = jnp.dot(hidden_BTD, output_DV, preferred_element_type=jnp.float32)
            return jnp.zeros(()), {"logits": logits_BTV}

        return self._jit(lambda params, batch: self._run(objective, params, batch)["logits"][None], PartitionSpec(None, "dp", "cp", "tp"))

    @functools.cached_property
    def _log_p(self):
        vocab_size = self.model.config.vocab_size

        def objective(hidden_BTD, output_DV, fields):
            return jnp.zeros(()), {"found": log_probabilities(hidden_BTD, output_DV, fields["targets"], vocab_size)}

        return self._jit(lambda params, batch: self._run(objective, params, batch)["found"], PartitionSpec("dp", "cp"))

    @functools.cached_property
    def _rewards(self):
        objective = lambda hidden_BTD, reward_D, _: (jnp.zeros(()), {"found": rewards(hidden_BTD, reward_D)})
        return self._jit(lambda params, batch: self._run(objective, params, batch)["found"], PartitionSpec("dp", "cp"))

    @functools.cached_property
    def _loss(self):
        return self._row_sums(cross_entropy_sum)

    @functools.cached_property
    def _misses(self):
        return self._row_sums(count_misses)

    def _row_sums(self, function):
        """Returns the jitted function that computes, for each row, `function` (such as `cross_entropy_sum`) of its targets."""

        def objective(hidden_BTD, output_DV, fields):
            def of_row(row):
                hidden_TD, target_T, mask_T = row
                return function(hidden_TD[None], output_DV, target_T[None], mask_T[None], self.model.config.vocab_size)

            return jnp.zeros(()), {"sum": jax.lax.map(of_row, (hidden_BTD, fields["targets"], fields["loss_mask"]))}

        whole_rows = lambda params, batch: collectives.all_reduce(self._run(objective, params, batch)["sum"], "cp")
        return self._jit(whole_rows, PartitionSpec("dp"))

    def _run(self, objective, params, batch):
        """Returns the sums of the objective, computed stage by stage: there is one micro-batch, so the other ranks wait."""
        weights, stages = self.layout.gather(params, self.model.declared, self.dtype), self.layout.layers_per_stage
        program = self.model.program(stages, objective)
        micro_batch = jax.tree.map(lambda a: a[0], self.model.micro_batches(batch))
        layer = lambda x_BTD, w, _: (program.layer(w, x_BTD, micro_batch), None)
        run = lambda x_BTD, stage: self.layout.scan(layer, x_BTD, weights["layers"], self.model.declared["layers"], stage)
        x_BTD, _ = relay(stages, run, program.embed(weights["ends"], micro_batch))
        return program.head(weights["ends"], x_BTD, micro_batch)[1]

    @functools.cached_property
    def _specs(self):
        return map_declarations(self.layout.spec, self.model.declared)

    def _jit(self, function, out_specs):
        return on_mesh(function, self.layout.mesh, (self._specs, BATCH_SPEC), out_specs, self.dtype)

    def _batch(self, ids_BS, mask_BS, targets_BS=None):
        """Returns the batch and the order of its tokens. Rows are padded at their end to one of a few sizes, divisible as the mesh needs."""
        shape, (B, S) = self.layout.mesh.shape, ids_BS.shape
        parts = shape["tp"] * shape["cp"] * (2 if shape["cp"] > 1 else 1)
        size = -(-bucket(S) // parts) * parts
        pad = lambda a: np.pad(a, ((0, -B % shape["dp"]), (0, size - S)))
        order = zigzag_order(size, shape["cp"])
        ids = pad(ids_BS).astype(np.int32)
        fields = {
            "tokens": ids,
            "targets": ids if targets_BS is None else pad(targets_BS).astype(np.int32),
            "loss_mask": pad(mask_BS),
            "segment_ids": np.ones_like(ids),
            "positions": np.broadcast_to(np.arange(size, dtype=np.int32), ids.shape),
        }
        sharding = NamedSharding(self.layout.mesh, BATCH_SPEC)
        return {name: jax.device_put(field[:, order][None], sharding) for name, field in fields.items()}, order


def bucket(size: int, least: int = 16) -> int:
    """Returns the smallest of 16, 24, 32, 48, 64, ... that holds `size`: powers of 2 and the middles between, so that few shapes are compiled."""
    power = 1 << (size - 1).bit_length()
    return max(least, power if 4 * size > 3 * power else 3 * power // 4)
