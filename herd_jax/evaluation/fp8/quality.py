"""Whether FP8 corrupts answers (section 6.2 of the paper): a model and FP8 variants of it answer the same prompts with the same seeds, one
function scores the answers, and the distributions of the scores are compared. Benchmarks alone look fine while some answers are broken.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.stats import ks_2samp

from herd_jax.errors import UserError
from herd_jax.inference.scoring.continuations import ContinuationScorer
from herd_jax.interop.operations.quantize import QuantizedSource
from herd_jax.interop.source import Source
from herd_jax.mesh import MeshConfig
from herd_jax.model import Model, load_source
from herd_jax.models.fp8 import Fp8Config
from herd_jax.text import chat

Score = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # (prompts, responses) -> a number for each, larger is better

VARIANTS = {
    "fp8": Fp8Config(),
    "no bound": Fp8Config(activation_bound=None),
    "all layers": Fp8Config(skip_ends=False),
    "all layers, no bound": Fp8Config(activation_bound=None, skip_ends=False),
}
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclasses.dataclass(frozen=True)
class Answers:
    """How prompts are answered: `samples` of each, in the model's chat format where `chats`."""

    max_new_tokens: int
    temperature: float
    samples: int
    seed: int
    chats: bool

    def __post_init__(self):
        if self.samples < 1 or self.max_new_tokens < 1 or not self.temperature >= 0:
            raise UserError(
                f"samples {self.samples} and max_new_tokens {self.max_new_tokens} must be 1 or more, temperature {self.temperature} 0 or more"
            )

    def of(self, model: Model, prompts: Sequence[str]) -> list[str]:
        """Returns the answers to the first prompt, to the second, ... Each draws the same from model to model."""
        rows = [prompt_ids(model, prompt, self.chats) for prompt in prompts for _ in range(self.samples)]
        return model.complete(rows, self.max_new_tokens, self.temperature, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is found of a model: its answers, their scores, and the loss of each text in nats per token."""

    answers: list[str]
    scores: np.ndarray
    losses: np.ndarray


def prompt_ids(model: Model, prompt: str, chats: bool) -> list[int]:
    tokenizer = model.text_tokenizer()
    if chats:
        return list(chat.render([{"role": "user", "content": prompt}], tokenizer, add_assistant_header=True).ids)
    return tokenizer.encode(prompt, bos=tokenizer.adds_bos)


def likelihood_under(model: Model, chats: bool) -> Score:
    """Returns a stand-in for a reward model: the mean log-probability of an answer's tokens after its prompt, in nats, under `model`. An empty
    answer is scored as the token that ends it."""

    def score(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        tokenizer = model.text_tokenizer()
        encode = lambda response: tokenizer.encode(response, bos=False) or list(tokenizer.stop_ids)[:1]
        requests = [(prompt_ids(model, prompt, chats), encode(response)) for prompt, response in zip(prompts, responses, strict=True)]
        found = np.zeros(len(requests))
        for i, of_answer in ContinuationScorer(model.llama, model.layout, model.dtype).score(model.params, requests):
            found[i] = of_answer.log_likelihood / len(requests[i][1])
        return found

    return score


def measure(
    source: Source, prompts: Sequence[str], texts: Sequence[str], answers: Answers, score: Score | None = None, *,
    mesh: MeshConfig | None = None, dtype: str | None = None,
) -> Iterator[tuple[str, Measured]]:  # fmt: skip
    """Yields ("plain", what is found of the model at `source` as it is), then that of each of VARIANTS by name. Memory holds the plain model and
    one variant.

    `score`: that of `likelihood_under` the plain model where there is none. Raises UserError for a model that is quantized already, and
    where the scorer gives what is not finite.
    """
    variants = {name: QuantizedSource.make(source, fp8) for name, fp8 in VARIANTS.items()}
    plain = load_source(source, mesh, dtype)
    score = score or likelihood_under(plain, answers.chats)
    repeated = [prompt for prompt in prompts for _ in range(answers.samples)]

    def measured(model: Model) -> Measured:
        found = answers.of(model, prompts)
        scores, losses = np.asarray(score(repeated, found), float), [loss.nats_per_token for loss in model.loss(texts)]
        if scores.shape != (len(found),) or not np.isfinite(scores).all():
            raise UserError("the scorer did not give one finite number for each answer: mend it, or give another --reward")
        return Measured(found, scores, np.array(losses))

    yield "plain", measured(plain)
    for name, variant in variants.items():
        yield name, measured(load_source(variant, mesh, dtype))


def compare(plain: Measured, variant: Measured) -> dict:
    """Returns the numbers of a variant against the plain model. `ks` is the largest distance of the two distribution functions of scores,
    `p_value` that of so much by chance; `drift` is the rise of the texts' mean loss in nats per token, `largest_drift` that of the text where
    it is largest."""
    test, change, drift = ks_2samp(plain.scores, variant.scores), variant.scores - plain.scores, variant.losses - plain.losses
    return {
        "mean": variant.scores.mean(), "quantiles": np.quantile(variant.scores, QUANTILES), "change": change.mean(),
        "worst_change": change.min(), "ks": test.statistic, "p_value": test.pvalue,
        "same_answers": np.mean([a == b for a, b in zip(plain.answers, variant.answers, strict=True)]),
        "drift": drift.mean(), "largest_drift": drift[np.argmax(np.abs(drift))],
    }  # fmt: skip


def worst_pairs(plain: Measured, variant: Measured, number: int) -> list[int]:
    """Returns the answers whose score fell most, worst first."""
    return np.argsort(variant.scores - plain.scores, kind="stable")[:number].tolist()
