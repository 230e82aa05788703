"""Sampling by running the whole window again for each token: exact and short, for a look at a model in training. There is no cache here."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from herd_jax.config import parse
from herd_jax.errors import UserError
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.parallel import pipeline
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.text.tokenizer import load_tokenizer
from herd_jax.training import objectives
from herd_jax.training.checkpoint import Checkpointer
from herd_jax.training.run import RunConfig, build_steps
from herd_jax.training.step import Steps


def sample(workdir: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """The continuation of `prompt` by the newest checkpoint of a training run, on one device. Temperature 0 takes the likeliest token."""
    if max_new_tokens < 1 or temperature < 0:
        raise UserError(f"--max-new-tokens {max_new_tokens} must be 1 or more and --temperature {temperature} 0 or more")
    if not (Path(workdir) / "checkpoints").is_dir():
        raise UserError(f"{workdir} is not the workdir of a training run: it has no checkpoints; make some with python -m herd_jax.train")
    checkpointer = Checkpointer(Path(workdir) / "checkpoints", keep=1)
    saved = checkpointer.config()
    if saved is None:
        raise UserError(f"{workdir} has no checkpoint yet: train longer, or wait for the first one")
    here = {"mesh": {"tp": 1, "cp": 1, "pp": 1, "dp": 1}, "pipeline": {}, "train": {**saved["train"], "attention": "auto"}}  # not where it was trained
    steps = build_steps(parse(RunConfig, {**saved, **here}), make_mesh(MeshConfig(dp=1), jax.devices()[:1]))
    params = steps.plan.from_canonical(checkpointer.restore(steps.plan.abstract_canonical()).state).params
    tokenizer = load_tokenizer(str(Path(workdir) / "tokenizer"))
    ids = tokenizer.encode(prompt, bos=True)
    if not ids:
        raise UserError("--prompt is empty and the tokenizer has no token to begin with: give a prompt of at least one character")
    new = sample_ids(steps, params, ids, max_new_tokens, temperature, seed, tokenizer.stop_ids)
    return tokenizer.decode(new)


def sample_ids(steps: Steps, params, ids: list[int], max_new_tokens: int, temperature: float, seed: int, stop_ids) -> list[int]:
    """Up to `max_new_tokens` ids that follow `ids`, without the stop id that ended them."""
    window = np.zeros(len(ids) + max_new_tokens, np.int32)
    window[: len(ids)] = ids
    next_logits = logits_function(steps, len(window))
    for i in range(len(ids), len(window)):
        logits = next_logits(params, jnp.asarray(window)[None], i - 1)[0]
        if temperature == 0:
            choice = int(jnp.argmax(logits))
        else:
            choice = int(jax.random.categorical(jax.random.fold_in(jax.random.key(seed), i), logits / temperature))
        if choice in stop_ids:
            return window[len(ids) : i].tolist()
        window[i] = choice
    return window[len(ids) :].tolist()


def logits_function(steps: Steps, num_tokens: int):
    """(params, ids [1, num_tokens], index) -> FP32 logits [1, V] of the token after `index`; on a mesh of one device."""
    vocab_size = steps.model.config.vocab_size

    def logits(params, ids_BT, index):
        ones = jnp.ones_like(ids_BT)
        batch = {"tokens": ids_BT, "targets": ids_BT, "loss_mask": ones, "segment_ids": ones, "positions": jnp.arange(num_tokens)[None]}
        micro_batches = steps.model.micro_batches(**{field: array[None] for field, array in batch.items()})
        program = steps.model.program(steps.layout.layers_per_stage, objectives.logits_at(index))
        weights, exchange = steps.weights(params)
        sums = pipeline.evaluate(program, weights["ends"], weights["layers"], micro_batches, PipelineConfig().build_evaluation(1, 1), exchange)
        return sums["logits"][:, :vocab_size]

    specs = (steps.plan.specs.params, PartitionSpec(), PartitionSpec())
    return jax.jit(jax.shard_map(logits, mesh=steps.layout.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))
