"""Needle in a haystack (sections 3.4.2 and 5.2.7 of the paper): whether a model finds facts at any depth of texts of any length.

A needle is found where greedy decoding continues the prompt with its value. One forward over prompt and value tells that, so a long row is
shared out over cp (and tp, pp) as in training. The paper's multi-needle test, 4 needles of which 2 are asked for, generates the answer.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from herd_jax.errors import UserError
from herd_jax.evaluation.needles.haystack import TEMPLATES, Needle, PromptMaker, draw_needles
from herd_jax.evaluation.results import item_id
from herd_jax.model import Model

NUM_HIDDEN, NUM_ASKED = 4, 2  # of the paper's multi-needle test,
MULTI_LENGTHS = (2_000, 131_072, 10)  # its shortest and longest texts and how many lengths between them,
MULTI_NEW_TOKENS = 256  # and what an answer may take
BATCH_TOKENS = 16_384  # of prompts that are continued at once


@dataclasses.dataclass(frozen=True)
class NeedleResult:
    """`recall` is the share of needles found, [lengths, depths], or [lengths] of the multi-needle test, whose needles lie at any depth.
    `items`: a dict a prompt, with "id" and "score"."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    recall: np.ndarray
    items: list[dict]

    @property
    def worst(self) -> tuple[int, float, float]:
        """Returns length, depth and recall where the fewest needles are found (of the single-needle test)."""
        row, column = np.unravel_index(np.argmin(self.recall), self.recall.shape)
        return self.lengths[row], self.depths[column], float(self.recall[row, column])


def needle_recall(
    model: Model, lengths: Sequence[int], depths: Sequence[float], num_samples: int, haystack: np.ndarray, *, seed: int = 0,
    template: str = "sentence", in_dialog: bool = False,
) -> NeedleResult:  # fmt: skip
    """Measures the share of `num_samples` needles found at each length (tokens of prompt and answer together) and depth (in [0, 1]).

    `haystack`: token ids [M], see `read_haystack`. Every prompt has its own needle and piece of the haystack, drawn from `seed`, its length, depth and
    number alone. Raises UserError for lengths beyond the model's context or without room for the needle, depths outside [0, 1], and what is
    named twice.
    """
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"depths are {tuple(depths)}: give shares of the text from 0 to 1")
    _refuse_repeated("depths", depths)
    maker = _maker(model, lengths, num_samples, haystack, template, in_dialog)
    cells = [(length, depth, sample) for length in lengths for depth in depths for sample in range(num_samples)]
    prompts, answers, items = [], [], []
    for length, depth, sample in cells:
        rng = np.random.default_rng([seed, length, round(depth * 1e6), sample])
        (needle,) = draw_needles(maker.template, [depth], rng)
        answers.append(maker.answer_ids(needle))
        prompts.append(maker.prompt([needle], [needle], length - len(answers[-1]), int(rng.integers(len(haystack)))))
        items.append({"id": item_id(maker.tokenizer.decode(prompts[-1])), "length": length, "depth": depth, "sample": sample})
    found = model.continues_with(prompts, answers)
    recall = found.reshape(len(lengths), len(depths), num_samples).mean(-1)
    return NeedleResult(tuple(lengths), tuple(depths), recall, [item | {"score": float(score)} for item, score in zip(items, found, strict=True)])


def multi_needle_recall(
    model: Model, lengths: Sequence[int], num_samples: int, haystack: np.ndarray, *, seed: int = 0,
    template: str = "sentence", in_dialog: bool = False,
) -> NeedleResult:  # fmt: skip
    """Runs the paper's test (section 5.2.7): 4 needles at random depths, a question for 2 of them, no examples, at most 256 new tokens. Returns
    the mean share of asked values in the answer at each length (tokens of prompt and answer together).

    Where the mesh has cp, over which only a forward is shared out, and for templates that ask for one key at a time, each of the 2 is
    asked for on its own, and found as in `needle_recall`. Raises UserError as that.
    """
    maker = _maker(model, lengths, num_samples, haystack, template, in_dialog)
    together = model.layout.mesh.shape["cp"] == 1 and maker.template.question[1] is not None
    score_all = _score_together if together else _score_one_by_one
    recall, items = [], []
    for length in lengths:
        drawn = [_draw_multi(maker, np.random.default_rng([seed, length, sample]), len(haystack)) for sample in range(num_samples)]
        scores = score_all(model, maker, drawn, length)
        recall.append(np.mean(scores))
        for sample, ((needles, start), found) in enumerate(zip(drawn, scores, strict=True)):
            text = maker.tokenizer.decode(maker.prompt(needles, needles[:1], length, start))
            items.append({"id": item_id(text), "length": length, "sample": sample, "depths": [n.depth for n in needles], "score": float(found)})
    return NeedleResult(tuple(lengths), (), np.array(recall), items)


def multi_lengths(context_length: int | None) -> tuple[int, ...]:
    """Returns the paper's ten lengths, evenly spaced from 2,000 to 131,072, or to the model's context where that is shorter."""
    shortest, longest, number = MULTI_LENGTHS
    longest = min(longest, context_length or longest)
    return tuple(int(length) for length in np.linspace(min(shortest, longest // number), longest, number).round())


def _score_together(model: Model, maker: PromptMaker, drawn, length: int) -> list[float]:
    size = length - MULTI_NEW_TOKENS
    prompts = [maker.prompt(needles, needles[:NUM_ASKED], size, start) for needles, start in drawn]
    most = max(1, BATCH_TOKENS // length)
    answers = []
    for first in range(0, len(prompts), most):
        answers += model.complete(prompts[first : first + most], MULTI_NEW_TOKENS)
    return [share_found(answer, [needle.value for needle in needles[:NUM_ASKED]]) for (needles, _), answer in zip(drawn, answers, strict=True)]


def _score_one_by_one(model: Model, maker: PromptMaker, drawn, length: int) -> list[float]:
    asked = [(needles, needle, start) for needles, start in drawn for needle in needles[:NUM_ASKED]]
    answers = [maker.answer_ids(needle) for _, needle, _ in asked]
    prompts = [maker.prompt(needles, [needle], length - len(ids), start) for (needles, needle, start), ids in zip(asked, answers, strict=True)]
    return model.continues_with(prompts, answers).reshape(-1, NUM_ASKED).mean(-1).tolist()


def _draw_multi(maker: PromptMaker, rng: np.random.Generator, num_tokens: int) -> tuple[list[Needle], int]:
    """Returns the needles, of which the first are asked for, and where their text begins in the haystack."""
    return draw_needles(maker.template, rng.random(NUM_HIDDEN).tolist(), rng), int(rng.integers(num_tokens))


def _maker(model: Model, lengths: Sequence[int], num_samples: int, haystack: np.ndarray, template: str, in_dialog: bool) -> PromptMaker:
    if template not in TEMPLATES:
        raise UserError(f"the template '{template}' is not known: choose one of {', '.join(TEMPLATES)}")
    if not lengths or min(lengths) < 1 or num_samples < 1:
        raise UserError(f"lengths are {tuple(lengths)} and samples {num_samples}: give one or more, each 1 or more")
    _refuse_repeated("lengths", lengths)
    if model.context_length is not None and max(lengths) > model.context_length:
        raise UserError(f"a length of {max(lengths)} tokens is beyond the model's context of {model.context_length}: leave it out")
    return PromptMaker(TEMPLATES[template], model.text_tokenizer(), haystack, in_dialog)


def _refuse_repeated(name: str, values: Sequence[float]) -> None:
    if repeated := [value for value in values if values.count(value) > 1]:
        raise UserError(f"{name} has {repeated[0]:g} twice: name each once")


def share_found(answer: str, values: Sequence[str]) -> float:
    """Returns the share of `values` that the answer has in it, whatever else it says."""
    return sum(value.strip() in answer for value in values) / len(values)
