"""Logits and losses of whole rows on any mesh: the pipeline's forward, with another head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from herd_jax.mesh import on_mesh
from herd_jax.models.cross_entropy import cross_entropy_sum
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout, map_declarations
from herd_jax.parallel import collectives, data, pipeline
from herd_jax.parallel.context import zigzag_order
from herd_jax.parallel.schedule import PipelineConfig

BATCH_SPEC = PartitionSpec(None, "dp", "cp")  # of [1, B, S], in zigzag order


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model on a mesh, layers in one chunk a pipeline rank; computes in `dtype`."""

    model: Llama
    layout: Layout
    dtype: jnp.dtype

    def logits(self, params, ids_BS: np.ndarray) -> np.ndarray:
        """FP32 [B, S, V] of int [B, S]."""
        B, S = ids_BS.shape
        batch, order = self._batch(ids_BS, np.zeros((B, S), bool))
        logits = np.asarray(self._logits(params, batch))[0]
        return logits[:, np.argsort(order)][:B, :S, : self.model.config.vocab_size]

    def loss(self, params, ids_BS: np.ndarray, mask_BS: np.ndarray) -> float:
        """Sum of the losses in nats of the tokens that are `mask`ed, each predicted from those before it in its row."""
        batch, _ = self._batch(ids_BS[:, :-1], mask_BS[:, 1:], ids_BS[:, 1:])
        return float(self._loss(params, batch))

    @functools.cached_property
    def _logits(self):
        def objective(hidden_BTD, output_DV, batch):
            logits_BTV = jnp.dot(hidden_BTD, output_DV, preferred_element_type=jnp.float32)
            return jnp.zeros(()), {"logits": logits_BTV}

        return self._jit(lambda params, batch: self._run(objective, params, batch)["logits"][None], PartitionSpec(None, "dp", "cp", "tp"))

    @functools.cached_property
    def _loss(self):
        def objective(hidden_BTD, output_DV, batch):
            loss = cross_entropy_sum(hidden_BTD, output_DV, batch.targets_BT, batch.loss_mask_BT, self.model.config.vocab_size)
            return loss, {"loss": loss}

        return self._jit(lambda params, batch: collectives.all_reduce(self._run(objective, params, batch)["loss"], ("dp", "cp")), PartitionSpec())

    def _run(self, objective, params, batch):
        weights = data.gather_weights(params, self._specs, self.dtype)
        program = self.model.program(self.layout.layers_per_stage, objective)
        schedule = PipelineConfig().build_evaluation(self.layout.mesh.shape["pp"], 1)
        micro_batches = self.model.micro_batches(**batch)
        return pipeline.evaluate(program, weights["ends"], weights["layers"], micro_batches, schedule, pipeline.Exchange())

    @functools.cached_property
    def _specs(self):
        return map_declarations(self.layout.spec, self.model.declared)

    def _jit(self, function, out_specs):
        return on_mesh(function, self.layout.mesh, (self._specs, BATCH_SPEC), out_specs, self.dtype)

    def _batch(self, ids_BS, mask_BS, targets_BS=None):
        """The batch, rows padded at their end to a size that the mesh divides and that few others share, and the order of its tokens."""
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
    """The next power of 2, so that few shapes are compiled."""
    return max(least, 1 << (size - 1).bit_length())
