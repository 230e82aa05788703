"""Direct preference optimization with the paper's two changes: tokens that end a turn do not count in the preference, and the chosen response is
learned as it stands too (section 4.1.4)."""

import functools

import numpy as np

from herd_jax.data.batches import TOKENS
from herd_jax.data.dialogs import Problem, Refused, make_examples
from herd_jax.data.packing import Example
from herd_jax.data.preferences import Preference, preference_example, read_preference
from herd_jax.post_training.config import DpoConfig, PreferenceLoss
from herd_jax.post_training.packed_data import PackedData
from herd_jax.post_training.reference import Reference
from herd_jax.post_training.reward import MODEL_FIELDS, places
from herd_jax.text.tokenizer import Tokenizer
from herd_jax.training.objectives import count_preferences, preference, preference_means
from herd_jax.training.step import Steps
from herd_jax.training.task import Task


def open_pairs(config: DpoConfig, steps: Steps) -> PackedData:
    """Returns the pairs of a run, with the reference's log-probabilities. Raises UserError as `PackedData` does."""
    reference = Reference(config.reference or config.init_from, config.reference_cache, steps.layout.mesh, config.directory)

    def read(path: str, tokenizer: Tokenizer, seq_len: int) -> tuple[list[Example], list[Problem]]:
        pairs: list[Preference] = []

        def make(record) -> list[Example]:
            found = read_preference(record, tokenizer)
            if found is None:
                return []
            unscored = tokenizer.stop_ids if config.dpo.masks_format else ()
            example = preference_example(found.pair, places(found.pair, config.seed), config.examples.share_prompt, unscored)
            if len(set(example["response_ids"][example["scored"]].tolist())) < 2:
                raise Refused("a response has no token that counts in the preference")
            if len(example["tokens"]) <= seq_len:  # else it is refused
                pairs.append(found.pair)
            return [example]

        examples, problems = make_examples(path, make, seq_len)
        for example, pair, log_p in zip(examples, pairs, reference.log_probabilities(pairs), strict=True):
            example["reference"] = placed(example, pair, log_p)
        return examples, problems

    return PackedData(config, steps, read, {"response_ids": config.examples.most_responses})


def placed(example: Example, pair: Preference, log_p: list[np.ndarray]) -> np.ndarray:
    """Returns the log-probabilities of a pair's responses where the example has their tokens as targets."""
    found = np.zeros(len(example["tokens"]), np.float32)
    for number, response in enumerate(pair.responses, 1):
        last = np.flatnonzero(example["response_ids"] == number)[-1]  # the response's last token, which predicts nothing
        found[last - len(response.ids) : last] = log_p[number - 1]
    return found


@functools.cache
def dpo_task(loss: PreferenceLoss, most_responses: int) -> Task:
    """Returns the task of DPO with this loss, whose rows have up to so many responses."""
    return Task(
        "DPO",
        {name: TOKENS for name in (*MODEL_FIELDS, "targets", "loss_mask", "scored", "response_ids", "reference")},
        preference(loss.beta, loss.label_smoothing, loss.kind, loss.by_length, loss.nll, most_responses),
        functools.partial(count_preferences, most_responses=most_responses),
        preference_means(loss.nll),
        open_pairs,
    )
