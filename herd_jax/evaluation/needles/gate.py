"""The gate after each stage of a run: short-context skill is back, and needles are found everywhere (section 3.4.2 of the paper).

Short-context skill is the validation loss on rows of the first stage's length and sources, computed by the longer model, so with its RoPE.
The haystack is the held-out text of the first of that stage's sources.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from herd_jax.data.ramp import Phase, Ramp
from herd_jax.data.rows import load_data_tokenizer, open_streams
from herd_jax.errors import UserError
from herd_jax.evaluation.needles.haystack import TEMPLATES, Needle, PromptMaker, text_ids
from herd_jax.evaluation.needles.recall import needle_recall
from herd_jax.interop.load import load_params, open_source
from herd_jax.mesh import make_mesh
from herd_jax.model import Model
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.text.tokenizer import Tokenizer
from herd_jax.training.config import RunConfig, build_steps, check_batches
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.stages.config import GateConfig
from herd_jax.training.stages.decisions import Verdict
from herd_jax.training.validation import Validation


class StageGate:
    """Judges a stage by its short-context loss and its needles, as `herd_jax.training.stages.stages.Gate` asks."""

    def check(self, stages: Sequence[RunConfig]) -> None:
        first = stages[0]
        tokenizer = load_data_tokenizer(first.data, open_streams(first.data, "validation"))
        for number, stage in enumerate(stages, start=1):
            try:
                short_rows(first, make_mesh(stage.mesh))
                if stage.train.gate.needle_recall:
                    check_needles(stage.train.gate.template, tokenizer, first.train.seq_len)
            except UserError as error:
                raise UserError(f"the gate after stage {number} of train.stages cannot ask what train.gate says: {error}") from error

    def __call__(self, stages: Sequence[RunConfig], number: int, short_loss_before: float | None) -> Verdict:
        first, stage = stages[0], stages[number - 1]
        steps = build_steps(dataclasses.replace(stage, pipeline=PipelineConfig()), make_mesh(stage.mesh), NEXT_TOKEN)
        params = load_params(open_source(stage.directory), steps.layout, steps.model.declared, jnp.float32)
        streams = open_streams(first.data, "validation")
        tokenizer = load_data_tokenizer(first.data, streams)
        validation = Validation(dataclasses.replace(stage, data=first.data), steps, streams, tokenizer)
        short_loss, recall = validation.metrics(params, short_rows(first, steps.layout.mesh))["val_loss"], {}
        if stage.train.gate.needle_recall:
            model = Model.of(steps.model, steps.layout, params, tokenizer, stage.train.seq_len, steps.compute_dtype)
            haystack = text_ids(streams[0], tokenizer)  # others may hold needles themselves
            recall = find_needles(model, first.train.seq_len, stage.train.gate, haystack)
        return judge(stage.train.gate, short_loss, short_loss_before, recall)


def short_rows(first: RunConfig, mesh: Mesh) -> Phase:
    """Batches of the first stage's rows on the mesh of another, one row at a time on each dp rank. Raises UserError where that cannot be."""
    batch, dp = first.train.ramp.phases[-1].global_batch_size, mesh.shape["dp"]
    phase = Phase(0, batch, first.train.seq_len, max(batch // dp, 1))
    check_batches(Ramp((phase,)), mesh)
    return phase


def check_needles(template: str, tokenizer: Tokenizer, length: int) -> None:
    """Raises UserError for an unknown template, or a `length` in tokens that has no room for its longest needle."""
    if template not in TEMPLATES:
        raise UserError(f"train.gate.template '{template}' is not known: choose one of {', '.join(TEMPLATES)}")
    size = lambda text: len(tokenizer.encode_continuation(text))
    words = TEMPLATES[template]
    longest = Needle(0.0, max(words.keys, key=size), "".join(max(values, key=size) for values in words.values))
    maker = PromptMaker(words, tokenizer, np.zeros(1, np.int32))
    maker.prompt([longest], [longest], length - len(maker.answer_ids(longest)), start=0)


def find_needles(model: Model, shortest: int, gate: GateConfig, haystack: np.ndarray) -> dict[int, dict[float, float]]:
    """Returns length -> depth -> share of needles found, at lengths (in tokens) from `shortest`, doubled up to the model's own."""
    lengths = [shortest]
    while lengths[-1] < model.context_length:
        lengths.append(min(2 * lengths[-1], model.context_length))
    depths = tuple(float(depth) for depth in np.linspace(0, 1, gate.num_depths).round(3))
    result = needle_recall(model, tuple(lengths), depths, gate.num_samples, haystack, seed=0, template=gate.template)
    return {length: dict(zip(depths, row, strict=True)) for length, row in zip(lengths, result.recall.tolist(), strict=True)}


def judge(gate: GateConfig, short_loss: float, before: float | None, recall: dict[int, dict[float, float]]) -> Verdict:
    """Decides whether a stage may be followed by the next one. `before`: the short-context loss before the long stages; None: this is the
    first."""
    passed, said = True, f"short-context loss {short_loss:.4f}"
    if before is not None:
        passed = short_loss <= before + gate.short_margin
        said += f", {'within' if passed else 'not within'} {gate.short_margin:g} of {before:.4f} before"
    if recall:
        worst, length, depth = min((found, length, depth) for length, row in recall.items() for depth, found in row.items())
        enough = worst >= gate.needle_recall
        where = f"at every length and depth up to {max(recall)} tokens" if enough else f"at {length} tokens, depth {depth:g}"
        said += f"; needles: {worst:.0%} found {where}" + ("" if enough else f", and {gate.needle_recall:.0%} are asked for")
        passed = passed and enough
    return Verdict(passed, said, short_loss, recall)
