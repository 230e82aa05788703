"""AdamW with decay on matrices only; warmup, cosine to a floor, annealing to 0; clipping by the global norm over all mesh axes
(section 3.4.1 of the paper)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from herd_jax.errors import UserError
from herd_jax.mesh import AXES
from herd_jax.models.params import map_declarations
from herd_jax.parallel import collectives


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, clipping, and the learning rate by step: warmup, cosine to a floor, and annealing (section 3.4.3), in which the rate falls
    linearly from what it is there to 0."""

    peak_learning_rate: float = 3e-4  # at the end of the warmup
    final_learning_rate: float = 3e-6  # from decay_steps on
    warmup_steps: int = 100  # steps in which the rate rises linearly from 0
    decay_steps: int = 1000  # step at which the cosine has reached its floor, the warmup counted in
    anneal_from: int = 0  # step after which the rate falls linearly to 0
    anneal_steps: int = 0  # steps of that fall; 0: none
    weight_decay: float = 0.1  # of matrices; norms have none
    clip_norm: float = 1.0  # most that the gradient's global norm may be; inf: no clipping
    b1: float = 0.9  # decay of AdamW's first moment
    b2: float = 0.95  # decay of AdamW's second moment
    eps: float = 1e-8  # added to the root of the second moment

    def __post_init__(self):
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: it must be at least 0 and less than 1")
        for name in ("peak_learning_rate", "final_learning_rate", "weight_decay", "eps"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: it must be finite and 0 or more")
        if not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm is {self.clip_norm}: it must be positive (inf: no clipping)")
        if not 0 <= self.warmup_steps <= self.decay_steps:
            raise UserError(f"optimizer.warmup_steps {self.warmup_steps} must lie between 0 and optimizer.decay_steps {self.decay_steps}")
        if self.anneal_steps < 0:
            raise UserError(f"optimizer.anneal_steps is {self.anneal_steps}: it must be 1 or more, or 0 for no annealing")
        if self.anneal_steps and self.anneal_from < self.warmup_steps:
            raise UserError(
                f"optimizer.anneal_from {self.anneal_from} lies before the end of optimizer.warmup_steps {self.warmup_steps}: anneal later, "
                "or without warmup"
            )


def learning_rate(config: OptimizerConfig, np=jnp) -> optax.Schedule:
    """Returns the schedule: linear from 0 at step 0 to the peak at `warmup_steps`, cosine to the floor at `decay_steps`, then constant; annealed.

    `np` computes it: jax.numpy in a step, or numpy where a config is made, before jax may start.
    """

    def rate(step):
        step = np.asarray(step, np.float32 if np is jnp else np.float64)
        if config.anneal_steps:
            left = np.clip((config.anneal_from + config.anneal_steps - step) / config.anneal_steps, 0, 1)
            return left * scheduled(np.minimum(step, config.anneal_from))
        return scheduled(step)

    def scheduled(step):
        warm = config.peak_learning_rate * step / max(config.warmup_steps, 1)
        progress = (step - config.warmup_steps) / max(config.decay_steps - config.warmup_steps, 1)
        cosine = 0.5 * (1 + np.cos(np.pi * np.clip(progress, 0, 1)))
        decayed = config.final_learning_rate + (config.peak_learning_rate - config.final_learning_rate) * cosine
        return np.where(step < config.warmup_steps, warm, decayed)

    return rate


def make_optimizer(config: OptimizerConfig, declared) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW, whose `update` is given the `learning_rate` of the step and whether the step is `good`: else nothing changes.

    Optax's own schedule would count the updates; steps that are left out (`train.on_spike`) move the run's clock and not that count.
    Gradients are clipped before, by `clip`.
    """
    decays = map_declarations(lambda declaration: declaration.decays, declared)
    return optax.chain(
        _scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decays),
        _scale_by_learning_rate(),
    )


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Does what `optax.scale_by_adam` does, whose state it has, in the memory of the moments: behind the barrier the update is computed from the
    new ones. Else XLA's CPU backend computes them twice, and keeps copies of the old ones for the second time; on a GPU it makes one kernel of all,
    which reads and writes each array once."""

    def update(gradients, state, params=None, *, good=True, **others):
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        mu = keep(optax.tree.update_moment(gradients, state.mu, b1, 1), state.mu)
        nu = keep(optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2), state.nu)
        if jax.default_backend() == "cpu":
            mu, nu = jax.lax.optimization_barrier((mu, nu))
        count = keep(state.count + 1, state.count)
        corrected = (optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count))
        updates = jax.tree.map(lambda m, n: m / (jnp.sqrt(n) + eps), *corrected)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Its state, which nothing reads, is that of `optax.adamw` with a schedule: earlier checkpoints have it."""

    def update(updates, state, params=None, *, learning_rate, good=True, **others):
        scaled = jax.tree.map(lambda u: jnp.asarray(-learning_rate, u.dtype) * u, updates)
        return scaled, optax.ScaleByScheduleState(state.count + jnp.asarray(good, jnp.int32))

    return optax.GradientTransformationExtraArgs(lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)


def global_norm(gradients, specs, mesh: Mesh) -> jax.Array:
    """Returns the L2 norm of the gradient of the whole model from one device's shards: each value counted once, in FP32."""

    def sum_of_squares(gradient, spec):
        sharded = {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
        copies = math.prod(mesh.shape[axis] for axis in AXES if axis not in sharded)
        return jnp.sum(jnp.square(gradient)) / copies

    total = sum(jax.tree.leaves(jax.tree.map(sum_of_squares, gradients, specs)))
    return jnp.sqrt(collectives.all_reduce(total, AXES))


def clip(gradients, norm: jax.Array, clip_norm: float):
    """Scales gradients so that their global norm is at most `clip_norm`."""
    scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale, gradients)
