"""Guesses by a draft model: a smaller one, of the same tokens, that goes ahead a few tokens, which the model then verifies in one forward.

A guess is drawn as the model will draw, with the same number for the same position, and counts where the model draws the same: so the text is that
without guesses, whatever the draft says. The draft keeps keys and values of its own in the pages of the same tables.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from herd_jax.errors import UserError
from herd_jax.inference.engine.layout import Pool
from herd_jax.inference.engine.programs import EVERYWHERE, Job, Programs, slots_specs
from herd_jax.inference.engine.slots import Slots, num_guessed


class Draft:
    """A draft model, on one pipeline rank, with its weights, that guesses `num_guesses` tokens at each step."""

    def __init__(self, programs: Programs, num_guesses: int) -> None:
        if programs.num_ranks > 1:
            raise UserError("a draft model goes ahead token by token, which a pipeline would only slow down: use pp 1, or guesses by look-up")
        self.programs, self.num_guesses, self.pools, self.weights = programs, num_guesses, programs.new_pools(), None

    def follow(self, slots: Slots, job: Job, num_tokens: int) -> None:
        """Computes the draft's keys and values of a chunk that the model computes."""
        self.pools = self._follow(num_tokens)(self.weights, self.pools, slots, job)

    def guess(self, slots: Slots, numbers: jax.Array) -> Slots:
        """Returns the slots with guesses behind their tokens."""
        self.pools, slots = self._guess(self.weights, self.pools, slots, numbers)
        return slots

    def copy_pages(self, sources: jax.Array, targets: jax.Array) -> None:
        self.pools = self.programs.copy_pages(self.pools, sources, targets)

    def _forward(self, weights, pools: list[Pool], slots: Slots, job: Job, num_tokens: int):
        return self.programs.layers(weights, pools, slots, job, self.programs.embed(weights, slots, job, num_tokens), num_tokens)

    @functools.cached_property
    def _follow(self):
        def make(num_tokens: int):
            run = lambda weights, pools, slots, job: self._forward(weights, pools, slots, job, num_tokens)[1]
            programs, job = self.programs, Job(*[EVERYWHERE] * 3)
            return programs.jit(run, (programs.weight_specs, programs.pool_specs, slots_specs(), job), programs.pool_specs, donate_argnums=1)

        return functools.cache(make)

    @functools.cached_property
    def _guess(self):
        programs = self.programs

        def step(weights, pools, slots: Slots, job: Job, num_tokens: int):
            """Draws the token behind those of the job, and writes it."""
            x_BTD, pools = self._forward(weights, pools, slots, job, num_tokens)
            logits_BV, position_B = programs.last(weights, slots, job, x_BTD, num_tokens), job.start_B + job.count_B
            ids_B, *_ = programs.draw(slots, job.slot_B, position_B, logits_BV, None)
            tokens = slots.tokens.at[job.slot_B, position_B].set(jnp.maximum(ids_B, 0), mode="drop")
            return pools, slots._replace(tokens=tokens)

        def run(weights, pools, slots: Slots, slot_B):
            length_B, quiet = slots.length[slot_B], slots._replace(log_probs=jnp.zeros_like(slots.log_probs))
            # The last two: of the token before the last one, a guess that was right, there may be no keys and values yet.
            start_B = jnp.maximum(length_B - 2, 0)
            pools, quiet = step(weights, pools, quiet, Job(slot_B, start_B, length_B - start_B), 2)
            one = lambda i, carry: step(weights, *carry, Job(slot_B, length_B + i, jnp.minimum(length_B, 1)), 1)
            pools, quiet = lax.fori_loop(0, self.num_guesses - 1, one, (pools, quiet))
            drafted = slots.drafted.at[slot_B].set(num_guessed(slots, slot_B, self.num_guesses))
            return pools, slots._replace(tokens=quiet.tokens, drafted=drafted)

        specs = programs.weight_specs, programs.pool_specs, slots_specs(), EVERYWHERE
        return programs.jit(run, specs, (programs.pool_specs, slots_specs()), donate_argnums=(1, 2))
