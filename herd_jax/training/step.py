"""The jitted steps: train and evaluate. Each is one `shard_map` over the whole mesh with every axis manual, so the code says what one
device does and names every communication.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from herd_jax.data.batches import TOKENS
from herd_jax.errors import UserError
from herd_jax.mesh import on_mesh
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout
from herd_jax.parallel import collectives, data, pipeline
from herd_jax.parallel.pipeline import Program
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.training.checkpoints.checksums import checksum
from herd_jax.training.optimizer import OptimizerConfig, clip, global_norm, learning_rate
from herd_jax.training.state import State, StatePlan
from herd_jax.training.task import Sums, Task


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of one model and task on one mesh. `gather`: parameters gathered once a `step` (the paper's choice) or per `layer`."""

    task: Task
    model: Llama
    layout: Layout
    plan: StatePlan
    optimizer: OptimizerConfig
    compute_dtype: jnp.dtype
    gather: str = "step"
    pipeline: PipelineConfig = PipelineConfig()

    def __post_init__(self):
        if self.gather not in data.GATHER:
            raise UserError(f"train.gather is '{self.gather}': it must be one of {', '.join(data.GATHER)}")

    @functools.cached_property
    def train(self):
        """Returns the function (state, batch) -> (state, metrics); the state is donated.

        A step whose loss or gradient is not finite changes nothing but the count.
        """
        return self._jit(self._train, (self.plan.specs, self._batch_specs), (self.plan.specs, PartitionSpec()), donate_argnums=0)

    @functools.cached_property
    def train_within(self):
        """Returns the function (state, batch, limits) -> (state, metrics): `train`, but a loss or a norm of the gradient above its limit (of
        float32 [2]) counts as not finite."""
        in_specs = (self.plan.specs, self._batch_specs, PartitionSpec())
        return self._jit(self._train, in_specs, (self.plan.specs, PartitionSpec()), donate_argnums=0)

    @functools.cached_property
    def evaluate(self):
        """Returns the function (params, batch) -> (the objective's sums over the batch, its counts)."""
        return self._jit(self._evaluate, (self.plan.specs.params, self._batch_specs), (PartitionSpec(), PartitionSpec()))

    @functools.cached_property
    def gradient(self):
        """Returns the function (params, batch) -> (mean loss, gradient sharded as the parameters), for tests."""
        return self._jit(self._gradient, (self.plan.specs.params, self._batch_specs), (PartitionSpec(), self.plan.specs.params))

    @functools.cached_property
    def fingerprint(self):
        """Returns the function (params, batch) -> uint32 [devices, leaves], the same on all devices.

        These are checksums of the loss and the gradient that each device (in the order of `mesh.devices`) has before they are summed over
        (dp, cp); with gather 'layer', the gradient is summed already.
        """

        def own(params, batch):
            sums, _, gradients = self._own_gradient(params, batch)
            checksums = jnp.stack([checksum(leaf) for leaf in jax.tree.leaves((sums, gradients))])
            return collectives.all_gather(checksums[None], self.layout.mesh.axis_names, 0)

        return self._jit(own, (self.plan.specs.params, self._batch_specs), PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        """Returns the sharding of a batch's tokens."""
        return NamedSharding(self.layout.mesh, TOKENS)

    @property
    def _batch_specs(self):
        return dict(self.task.fields)

    def _jit(self, function, in_specs, out_specs, **options):
        return on_mesh(function, self.layout.mesh, in_specs, out_specs, self.compute_dtype, **options)

    def _train(self, state: State, batch: dict, limits: jax.Array | float = jnp.inf) -> tuple[State, dict]:
        means, gradients = self._mean_gradient(state.params, batch)
        loss = means["loss"]
        norm = global_norm(gradients, self.plan.specs.params, self.layout.mesh)
        rate = learning_rate(self.optimizer)(state.step + 1)  # so the first step already has one above 0
        clipped = clip(gradients, norm, self.optimizer.clip_norm)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        good = finite & jnp.all(jnp.stack([loss, norm]) <= limits)
        updates, optimizer = self.plan.optimizer.update(clipped, state.optimizer, state.params, learning_rate=rate, good=good)
        params = jax.tree.map(lambda p, u: jnp.where(good, p + u, p), state.params, updates)
        metrics = means | {"grad_norm": norm, "learning_rate": rate, "finite": finite}
        return State(state.step + 1, params, optimizer), metrics

    def _gradient(self, params, batch: dict):
        means, gradients = self._mean_gradient(params, batch)
        return means["loss"], gradients

    def _mean_gradient(self, params, batch: dict):
        """Returns the means over the whole batch, and the gradient."""
        sums, counts, gradients = self._own_gradient(params, batch)
        if self.gather == "step":
            gradients = data.reduce_gradients(gradients, self.plan.specs.params)
        gradients["ends"] = collectives.all_reduce(gradients["ends"], "pp")
        return self.task.means(collectives.all_reduce(sums, ("dp", "cp")), counts), gradients

    def _own_gradient(self, params, batch: dict):
        """Returns this device's sums, the counts of all devices (at least 1), and this device's summand of the gradient."""
        counts = jax.tree.map(lambda count: jnp.maximum(count, 1), collectives.all_reduce(self.task.counts(batch), ("dp", "cp")))
        program = self._program(jax.tree.map(lambda count: 1 / count, counts))
        schedule = self.pipeline.build(self.layout.mesh.shape["pp"], len(batch["tokens"]))
        weights, exchange = self.weights(params)
        sums, d_ends, d_layers = pipeline.value_and_gradient(
            program, weights["ends"], weights["layers"], self.model.micro_batches(batch), schedule, exchange
        )
        return sums, counts, {"ends": d_ends, "layers": d_layers}

    def _evaluate(self, params, batch: dict):
        schedule = self.pipeline.build_evaluation(self.layout.mesh.shape["pp"], len(batch["tokens"]))
        weights, exchange = self.weights(params)
        batches = self.model.micro_batches(batch)
        counts = self.task.counts(batch)
        program = self._program(jax.tree.map(jnp.ones_like, counts))
        sums = pipeline.evaluate(program, weights["ends"], weights["layers"], batches, schedule, exchange)
        return collectives.all_reduce((sums, counts), ("dp", "cp"))

    def _program(self, weights: Sums) -> Program:
        return self.model.program(self.layout.layers_per_stage, self.task.objective(self.model.config.vocab_size, weights))

    def weights(self, params):
        """Returns the weights as the pipeline is given them, and what it does with them and their gradients."""
        specs = self.plan.specs.params
        if self.gather == "step":
            return data.gather_weights(params, specs, self.compute_dtype), pipeline.Exchange()
        layer_specs = {name: PartitionSpec(*spec[1:]) for name, spec in specs["layers"].items()}
        fetch = lambda specs, tree: data.gather_weights(tree, specs, self.compute_dtype)
        ends_specs = lambda ends: {key: specs["ends"][key] for key in ends}
        return params, pipeline.Exchange(
            fetch_ends=lambda ends: fetch(ends_specs(ends), ends),
            finish_ends=lambda gradient: data.reduce_gradients(gradient, ends_specs(gradient)),
            fetch_layer=lambda weights: fetch(layer_specs, weights),
            finish_layer=lambda gradient: data.reduce_gradients(gradient, layer_specs),
            ahead=self.layout.mesh.shape["dp"] * self.layout.mesh.shape["cp"] > 1,
        )
