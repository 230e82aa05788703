"""What the device runs: a forward over pages, the choice of tokens, and the changes of its state; each is compiled once for each shape.

Over pp a forward is one tick: each rank takes its layers of another job, gets the activations from the rank before it, and hands its own on. A job
is a number of rows that go through the stages together; one enters at each tick, and one leaves.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from herd_jax.inference.draw import among, choose, kept, penalised, scaled
from herd_jax.inference.engine.layout import POOL_SPEC, PageLayout, Places, Pool
from herd_jax.inference.engine.slots import Slots, counts, empty, look_up
from herd_jax.inference.sampling import MAX_LOG_PROBS
from herd_jax.inference.weights import apart_specs
from herd_jax.mesh import on_mesh
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout
from herd_jax.parallel import collectives, tensor

PyTree = Any
EVERYWHERE = PartitionSpec()
LEAST_SPLIT = 16  # tokens of a chunk on a cp rank, below which each rank computes all of them


class Job(NamedTuple):
    """The rows of one forward: their slots, the positions of their first tokens, and how many tokens each has."""

    slot_B: jax.Array
    start_B: jax.Array
    count_B: jax.Array


class Carry(NamedTuple):
    """What goes from a pipeline rank to the next: the activations [PP, B, T, D] and their job, [PP, B] each."""

    x: jax.Array
    job: Job


class Drawn(NamedTuple):
    """What was drawn for B rows: `ids` int32 [B, T + 2]: the tokens, how many of them count, and how many guesses follow.

    `log_p` FP32 [B, T, 2 + 2 n]: of the token, raw and processed, then of the likeliest tokens, whose ids are `likeliest` int32 [B, T, n]. Raw is
    the model's own; processed is after penalties, bias, mask, temperature and filters: what the token was drawn from. Both are 0 where nobody asks.
    """

    ids: jax.Array
    log_p: jax.Array
    likeliest: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The programs of a model on a mesh, each pipeline rank with one chunk of layers. `num_ids`: tokens from it on are never drawn. `num_guesses`:
    how many tokens are guessed by looking up what followed the last ones before."""

    model: Llama
    layout: Layout
    dtype: jnp.dtype
    pages: PageLayout
    num_ids: int | None
    num_guesses: int = 0

    @property
    def num_ranks(self) -> int:
        return self.layout.mesh.shape["pp"]

    @functools.cached_property
    def num_layer_slots(self) -> int:
        """Returns the number of layer slots of a pipeline rank."""
        return max(1, *self.layout.layers_per_stage)

    # --- state

    def new_pools(self) -> list[Pool]:
        """Returns pools of zeros."""
        config, sharding = self.model.config, NamedSharding(self.layout.mesh, POOL_SPEC)
        shapes = self.pages.shapes(self.num_ranks, config.num_kv_heads, config.head_dim)
        zeros = jax.jit(lambda: Pool(*(jnp.zeros(shape, self.dtype) for shape in shapes)), out_shardings=Pool(sharding, sharding))
        return [zeros() for _ in range(self.num_layer_slots)]

    def new_carry(self, num_rows: int, num_tokens: int) -> Carry | None:
        """Returns what no rank has handed on: none without a pipeline."""
        if self.num_ranks == 1:
            return None
        sharding, rows = NamedSharding(self.layout.mesh, PartitionSpec("pp")), (self.num_ranks, num_rows)
        x = jnp.zeros((*rows, self._share(num_tokens), self.model.config.dim), self.dtype)
        return jax.device_put(Carry(x, Job(*(np.zeros(rows, np.int32) for _ in Job._fields))), sharding)

    def put(self, tree: PyTree) -> PyTree:
        """Returns numpy arrays as arrays that all devices hold; a program compiles again for arrays that lie elsewhere."""
        return jax.device_put(tree, NamedSharding(self.layout.mesh, EVERYWHERE))

    # --- forward

    @functools.cached_property
    def forward(self):
        """Returns, for (rows B, tokens T, what), the function (weights, pools, slots, carry, slots' numbers [B]) -> (pools, slots, carry, job, found).

        It takes up to T tokens of each slot that are known and not computed, guesses among them, and computes their keys and values. Pools, slots
        and carry are donated. With `what` "last", `found` are the logits [B, V] after the last token of each row of the job that leaves; "all":
        after each token [B, T, V]; "prompt": those of "last", and a `Drawn` of the tokens that follow each in the sequence.
        """
        return functools.cache(self._forward)

    def _forward(self, num_rows: int, num_tokens: int, what: str):
        def run(weights, pools, slots, carry, entering_B):
            job, slots = self._enter(slots, entering_B, num_tokens)
            x_BTD = self.embed(weights, slots, job, num_tokens)
            if carry is not None:
                carry, first = jax.tree.map(lambda a: a[0], carry), lax.axis_index("pp") == 0
                x_BTD, job = jax.tree.map(lambda new, old: jnp.where(first, new, old), (x_BTD, job), tuple(carry))
            x_BTD, pools = self.layers(weights, pools, slots, job, x_BTD, num_tokens)
            if carry is not None:
                carry = jax.tree.map(lambda a: collectives.shift(a, "pp", 1)[None], Carry(x_BTD, job))
                job = self._from_last(job)
            return pools, slots, carry, job, getattr(self, what)(weights, slots, job, x_BTD, num_tokens)

        found = (EVERYWHERE, Drawn(*[EVERYWHERE] * 3)) if what == "prompt" else EVERYWHERE
        carry = Carry(PartitionSpec("pp"), Job(*[PartitionSpec("pp")] * 3)) if self.num_ranks > 1 else None
        pools, slots, job = self.pool_specs, slots_specs(), Job(*[EVERYWHERE] * 3)
        specs = (self.weight_specs, pools, slots, carry, EVERYWHERE), (pools, slots, carry, job, found)
        return self.jit(run, *specs, donate_argnums=(1, 2, 3))

    def _enter(self, slots: Slots, slot_B, num_tokens: int) -> tuple[Job, Slots]:
        """Returns the job of what is known and not computed, and the slots with it as computed."""
        start_B = slots.computed[slot_B]
        count_B = jnp.clip(slots.length[slot_B] + slots.drafted[slot_B] - start_B, 0, num_tokens)
        return Job(slot_B, start_B, count_B), slots._replace(computed=slots.computed.at[slot_B].add(count_B))

    def embed(self, weights, slots: Slots, job: Job, num_tokens: int):
        """Returns the embedded tokens of a job, those of this cp rank."""
        index_BT = jnp.minimum(job.start_B[:, None] + jnp.arange(num_tokens), slots.tokens.shape[1] - 1)
        return self.model.embedding(weights["ends"])(self._own(slots.tokens[job.slot_B[:, None], index_BT]), tensor.WHOLE_SEQUENCE)

    def layers(self, weights, pools: list[Pool], slots: Slots, job: Job, x_BTD, num_tokens: int):
        """Runs the layers of this rank's stage; they read and write the pools."""
        places = Places(slots.table[job.slot_B], job.start_B, job.count_B)
        split, stage = self._share(num_tokens) < num_tokens, lax.axis_index("pp")
        offset = lax.axis_index("cp") * self._share(num_tokens) if split else 0
        position_BT = job.start_B[:, None] + offset + jnp.arange(self._share(num_tokens))
        rotation, declared = self.model.rotation(position_BT), self.model.declared["layers"]
        stages = [self.layout.slots_of_stage(declared, i) for i in range(self.num_ranks)]
        pools = list(pools)
        for number in range(self.num_layer_slots):
            # The stages' layers in this slot: alike as to attention, but some may be FP8, and a stage may have no layer here.
            layers = [slots_of[number] if number < len(slots_of) else None for slots_of in stages]
            kinds = [layer for i, layer in enumerate(layers) if layer not in layers[:i]]
            modules = [layer and self.model.layer({name: weights["layers"][name][at][0] for name, at in layer.items()}) for layer in kinds]

            def attend(q_BTNH, k_BTKH, v_BTKH, number=number):
                gather = (lambda a: collectives.all_gather(a, "cp", 1)) if split else (lambda a: a)
                pool = self.pages.write(pools[number], gather(k_BTKH), gather(v_BTKH), places)
                return self.pages.read(q_BTNH, pool, places, offset), pool

            new_BTD, pools[number] = next(filter(None, modules)).attention_block(x_BTD, rotation, attend, tensor.WHOLE_SEQUENCE)
            runs = [(lambda x_BTD, m=module: m.feed_forward_block(x_BTD, tensor.WHOLE_SEQUENCE)) if module else (lambda _, x=x_BTD: x) for module in modules]
            kind_of_stage = jnp.array([kinds.index(layer) for layer in layers])
            x_BTD = runs[0](new_BTD) if len(runs) == 1 else lax.switch(kind_of_stage[stage], runs, new_BTD)
        return x_BTD, pools

    def last(self, weights, slots, job: Job, x_BTD, num_tokens: int):
        """Returns the logits after the last token of each row, FP32 [B, V]."""
        index_B = jnp.clip(job.count_B - 1, 0, num_tokens - 1)
        if self._share(num_tokens) < num_tokens:
            index_B = index_B - lax.axis_index("cp") * x_BTD.shape[1]
            mine_B = (index_B >= 0) & (index_B < x_BTD.shape[1])
            x_BD = jnp.take_along_axis(x_BTD, jnp.clip(index_B, 0, x_BTD.shape[1] - 1)[:, None, None], 1)[:, 0]
            x_BD = collectives.all_reduce(jnp.where(mine_B[:, None], x_BD, 0), "cp")
        else:
            x_BD = jnp.take_along_axis(x_BTD, index_B[:, None, None], 1)[:, 0]
        return self.logits(weights, self._from_last(x_BD)[:, None])[:, 0]

    def all(self, weights, slots, job: Job, x_BTD, num_tokens: int):
        """Returns the logits after each token, FP32 [B, T, V]."""
        return self.logits(weights, self._from_last(self._whole(x_BTD, num_tokens)))

    def prompt(self, weights, slots: Slots, job: Job, x_BTD, num_tokens: int) -> tuple[jax.Array, Drawn]:
        """Returns what `last` does, and the log-probabilities of the tokens that follow, with a few tokens' logits at a time."""
        logits_BV = self.last(weights, slots, job, x_BTD, num_tokens)
        x_BTD = self._from_last(self._whole(x_BTD, num_tokens))
        next_BT = jnp.minimum(job.start_B[:, None] + 1 + jnp.arange(num_tokens), slots.tokens.shape[1] - 1)
        target_BT = slots.tokens[job.slot_B[:, None], next_BT]

        def one(piece):
            x_BD, target_B = piece
            logits_BV = self.logits(weights, x_BD[:, None])[:, 0]
            return _log_p(logits_BV, logits_BV, target_B)

        log_p, likeliest = lax.map(one, (x_BTD.swapaxes(0, 1), target_BT.T), batch_size=max(1, 16 // len(target_BT)))
        return logits_BV, Drawn(target_BT, log_p.swapaxes(0, 1), likeliest.swapaxes(0, 1))

    def logits(self, weights, x_BTD: jax.Array) -> jax.Array:
        """Returns the logits, FP32 [B, T, V]."""
        head, output_DV = self.model.head(weights["ends"])
        hidden_BTD = head.hidden(x_BTD, tensor.WHOLE_SEQUENCE)
        logits_BTV = jnp.dot(hidden_BTD, weights.get("output", output_DV), preferred_element_type=jnp.float32)
        return collectives.all_gather(logits_BTV, "tp", dim=2)[..., : self.model.config.vocab_size]

    def _from_last(self, tree: PyTree) -> PyTree:
        """Returns what the last pipeline rank has, on all."""
        last = lax.axis_index("pp") == self.num_ranks - 1
        return collectives.all_reduce(jax.tree.map(lambda a: jnp.where(last, a, 0), tree), "pp") if self.num_ranks > 1 else tree

    def _share(self, num_tokens: int) -> int:
        """Returns how many of a step's tokens a cp rank computes."""
        cp = self.layout.mesh.shape["cp"]
        return num_tokens // cp if num_tokens % cp == 0 and num_tokens // cp >= LEAST_SPLIT else num_tokens

    def _own(self, a_BT):
        size = self._share(a_BT.shape[1])
        return a_BT if size == a_BT.shape[1] else lax.dynamic_slice_in_dim(a_BT, lax.axis_index("cp") * size, size, 1)

    def _whole(self, x_BTD, num_tokens: int):
        return x_BTD if x_BTD.shape[1] == num_tokens else collectives.all_gather(x_BTD, "cp", 1)

    # --- the choice of tokens

    @functools.cached_property
    def sample(self):
        """Returns the function (slots, job, logits, rows [A], slots' numbers [A], mask) -> (slots, Drawn) that draws what follows in slots.

        `rows` names the row of job and logits of each; the number of the last slot stands for a row that is not to be drawn. Logits [B, V] follow
        the last token of a row, [B, T, V] each of its tokens, which are guesses but the first: as many are taken as are what would have been
        drawn, and one more. `mask`: bits of the ids that may come, uint32 [A, V / 32], or None. The slots are donated.
        """

        def run(slots: Slots, job: Job, logits, rows_A, slot_A, mask_AW):
            start_A, count_A = job.start_B[rows_A], job.count_B[rows_A]
            logits_ATV = logits[rows_A] if logits.ndim == 3 else logits[rows_A][:, None]
            A, T, V = logits_ATV.shape
            index_T = jnp.arange(T)
            position_AT = start_A[:, None] + 1 + index_T if logits.ndim == 3 else (start_A + count_A)[:, None]
            count_A = count_A if logits.ndim == 3 else jnp.minimum(count_A, 1)
            known_A = slots.length[slot_A]
            known_drawn_AT = slots.tokens.at[slot_A[:, None], position_AT].get(mode="fill", fill_value=0)

            flat_Q = jnp.repeat(slot_A, T)
            mask_QW = None if mask_AW is None else jnp.repeat(mask_AW, T, 0)  # with guesses, of which a masked row has none
            drawn = self.draw(slots, flat_Q, position_AT.reshape(-1), logits_ATV.reshape(-1, V), mask_QW)
            ids_AT, log_p, likeliest = (a.reshape(A, T, *a.shape[1:]) for a in drawn)
            right_AT = (ids_AT == known_drawn_AT) & (index_T < count_A[:, None] - 1)
            number_A = 1 + jnp.cumprod(right_AT, 1).sum(1)
            # Nothing is drawn of a prompt that goes on after this job.
            drawn_A = (count_A > 0) & (position_AT[:, 0] == known_A) & (slot_A < len(slots.length) - 1)
            number_A = jnp.where(drawn_A, number_A, 0)
            slots = self._append(slots, slot_A, position_AT, ids_AT, number_A)
            slots, drafted_A = look_up(slots, slot_A, self.num_guesses)
            return slots, Drawn(jnp.concatenate([ids_AT, number_A[:, None], drafted_A[:, None]], 1), log_p, likeliest)

        slots, job = slots_specs(), Job(*[EVERYWHERE] * 3)
        make = lambda mask: self.jit(run, (slots, job, *[EVERYWHERE] * 3, mask), (slots, Drawn(*[EVERYWHERE] * 3)), donate_argnums=0)
        free, masked = make(None), make(EVERYWHERE)
        return lambda *args: (free if args[-1] is None else masked)(*args)

    def draw(self, slots: Slots, slot_Q, position_Q, logits_QV, mask_QW):
        """Returns ids [Q] for the positions of slots, their log-probabilities, and the likeliest ids."""
        pick = lambda tree: jax.tree.map(lambda a: a[slot_Q], tree)
        V = logits_QV.shape[-1]

        def adjust(logits_QV):
            of_row = lambda slot, prompt, position: counts(slots.tokens[slot], prompt, position, V)
            return penalised(logits_QV, *jax.vmap(of_row)(slot_Q, slots.num_prompt[slot_Q], position_Q), pick(slots.penalties))

        changed_QV = among(lax.cond(slots.adjusts[slot_Q].any(), adjust, lambda logits_QV: logits_QV, logits_QV), self.num_ids)
        if mask_QW is not None:
            bits_QV = jnp.repeat(mask_QW, 32, 1)[:, :V] >> (jnp.arange(V, dtype=jnp.uint32) % 32)
            changed_QV = jnp.where(bits_QV & 1 == 1, changed_QV, -jnp.inf)
        options = pick(slots.options)
        ids_Q = choose(changed_QV, options, position_Q)

        def find():
            z_QV = scaled(changed_QV, options)
            return _log_p(logits_QV, jnp.where(kept(z_QV, options), z_QV, -jnp.inf), ids_Q)

        nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(find))
        return ids_Q, *lax.cond(slots.log_probs[slot_Q].any(), find, nothing)

    def _append(self, slots: Slots, slot_A, position_AT, ids_AT, number_A) -> Slots:
        """Returns the slots with `number_A` of the ids of each behind its tokens; 0 leaves a slot as it is."""
        T = ids_AT.shape[1]
        column_AT = jnp.where(jnp.arange(T) < number_A[:, None], position_AT, slots.tokens.shape[1])
        tokens = slots.tokens.at[slot_A[:, None], column_AT].set(jnp.maximum(ids_AT, 0), mode="drop")
        change_A = jnp.where(number_A > 0, slot_A, len(slots.length))
        length_A = position_AT[:, 0] + number_A
        set_to = lambda a, value: a.at[change_A].set(value, mode="drop")
        return slots._replace(tokens=tokens, length=set_to(slots.length, length_A), computed=set_to(slots.computed, length_A - 1))

    # --- changes of the state

    @functools.cached_property
    def prepare(self):
        """Returns the function (slots, numbers [A], rows) -> slots that puts rows into slots; a number beyond the last puts nothing."""

        def run(slots, slot_A, rows):
            return jax.tree.map(lambda a, new: a.at[slot_A].set(new, mode="drop"), slots, rows)

        return self.jit(run, (slots_specs(), EVERYWHERE, slots_specs()), slots_specs(), donate_argnums=0)

    @functools.cached_property
    def set_tables(self):
        """Returns the function (slots, numbers [A], tables [A, N]) -> slots that gives slots their pages."""
        run = lambda slots, slot_A, table_AN: slots._replace(table=slots.table.at[slot_A].set(table_AN, mode="drop"))
        return self.jit(run, (slots_specs(), EVERYWHERE, EVERYWHERE), slots_specs(), donate_argnums=0)

    @functools.cached_property
    def copy_pages(self):
        """Returns the function (pools, sources [A], targets [A]) -> pools that copies pages."""

        def run(pools, source_A, target_A):
            return [self.pages.copy(pool, source_A, target_A) for pool in pools]

        return self.jit(run, (self.pool_specs, EVERYWHERE, EVERYWHERE), self.pool_specs, donate_argnums=0)

    @functools.cached_property
    def weight_specs(self):
        return apart_specs(self.model, self.layout)

    @property
    def pool_specs(self):
        return [Pool(POOL_SPEC, POOL_SPEC)] * self.num_layer_slots

    def jit(self, function, in_specs, out_specs, **options):
        return on_mesh(function, self.layout.mesh, in_specs, out_specs, self.dtype, **options)


def slots_specs() -> Slots:
    return jax.tree.map(lambda _: EVERYWHERE, empty(1, 1, 1))


def _log_p(logits_QV, processed_QV, ids_Q) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities [Q, 2 + 2 n] as `Drawn` has them, and the likeliest ids [Q, n]."""
    raw_QV, processed_QV = jax.nn.log_softmax(logits_QV, -1), jax.nn.log_softmax(processed_QV, -1)
    top_Qn, likeliest_Qn = lax.top_k(raw_QV, min(MAX_LOG_PROBS, raw_QV.shape[-1]))
    take = lambda a_QV, index_Qn: jnp.take_along_axis(a_QV, index_Qn, -1)
    ids_Q1 = jnp.maximum(ids_Q, 0)[:, None]
    return jnp.concatenate([take(raw_QV, ids_Q1), take(processed_QV, ids_Q1), top_Qn, take(processed_QV, likeliest_Qn)], -1), likeliest_Qn
