"""The judge: a chat model says of each document whether it meets a requirement, and classifiers learn from what it said (section 3.1.1).

Its answer is never parsed. The score of an answer is the probability of its first token among the first tokens of all the answers allowed.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from herd_jax.curation.classification.labelled import read_texts, text_id
from herd_jax.errors import UserError
from herd_jax.files import user_path
from herd_jax.text import chat
from herd_jax.text.tokenizer import Tokenizer

MAX_TOKENS = 384  # of a document that the judge reads, from its beginning
CHARACTERS_PER_TOKEN = 16
BATCH_SIZE = 4  # prompts at a time: their logits are BATCH_SIZE x about 500 x vocabulary FP32, 1 GB for Llama 3
LENGTH_STEP = 128  # prompts are padded to a multiple, so that few shapes compile

PROMPT = """Here is the beginning of a document.

<document>
{document}
</document>

{question} Answer with {form}."""


class Judge(Protocol):
    """What `herd_jax.load` returns, as far as it is needed here."""

    tokenizer: Tokenizer

    def logits(self, token_ids) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Requirement:
    """What a judge is asked: `answers` is label -> the word that it answers with; the words' first tokens must differ."""

    question: str
    answers: dict[str, str]

    def prompt(self, document: str) -> str:
        words = list(self.answers.values())
        return PROMPT.format(document=document, question=self.question, form=f"one word: {', '.join(words[:-1])} or {words[-1]}")


YES_OR_NO = {"yes": "Yes", "no": "No"}
TOPICS = (
    "Arts", "Biology", "Geography", "History", "Mathematics", "People", "Physics", "Religion", "Society", "Sports", "Technology", "Other",
)  # fmt: skip

REQUIREMENTS = {
    "encyclopedic": Requirement(
        "Is it well-written, factual prose of its own, such as an encyclopedia would cite, and not advertisement, menus, boilerplate, a "
        "list of keywords or garbled text?",
        YES_OR_NO,
    ),
    "code": Requirement("Does it show program code together with an explanation of it in natural language?", YES_OR_NO),
    "mathematics": Requirement("Does it deduce a mathematical result step by step?", YES_OR_NO),
    "reasoning": Requirement(
        "Does it reason about a question of science, technology, engineering or mathematics step by step, from premises to a conclusion?",
        YES_OR_NO,
    ),
    "topic": Requirement("Which field of knowledge is it about?", {topic.lower(): topic for topic in TOPICS}),
}


def find_requirement(name: str) -> Requirement:
    """Returns the requirement of that name. Raises UserError for an unknown name."""
    if name not in REQUIREMENTS:
        raise UserError(f"requirement '{name}' is not known: choose one of {', '.join(REQUIREMENTS)}")
    return REQUIREMENTS[name]


def label(model: "Judge", texts: Sequence[str], requirement: Requirement) -> list[dict[str, float]]:
    """Returns the probability of each label for each text, by the judge `model`.

    Raises UserError where it is no chat model or two answers begin alike.
    """
    return [scores for batch in _batches(texts) for scores in _label_batch(model, batch, requirement)]


def label_files(
    load: Callable[[str], "Judge"], model_path: str | Path, sources: Sequence[str], requirement_name: str, target: str | Path, text_field: str = "text"
) -> str:
    """Judges the documents of files that globs name, and writes a line of JSON for each different one into `target`: "id" (of its text),
    "requirement", "model", "scores", "text" (its beginning: a classifier can be trained from the file alone).

    `load` opens the model, once there is something to judge. Started again, it goes on behind what `target` holds. Returns a summary. Raises UserError where `target` was made with another judge or
    requirement.
    """
    requirement = find_requirement(requirement_name)
    about = {"requirement": requirement_name, "model": str(model_path)}
    done = _read_done(user_path(target), about)
    texts = {text_id(text): text for text in read_texts(sources, text_field)}
    missing = [text for key, text in texts.items() if key not in done]
    if missing:
        model = load(model_path)
        user_path(target).parent.mkdir(parents=True, exist_ok=True)
        with user_path(target).open("a") as file:
            for batch in _batches(missing):
                for text, scores in zip(batch, _label_batch(model, batch, requirement), strict=True):
                    line = {"id": text_id(text), **about, "scores": scores, "text": _beginning(text)}
                    file.write(json.dumps(line) + "\n")
                file.flush()
    return f"{len(missing):,} documents labelled, {len(texts) - len(missing):,} were in {target} already"


def _label_batch(model: "Judge", texts: Sequence[str], requirement: Requirement) -> list[dict[str, float]]:
    answers = _answer_ids(model, requirement)
    prompts = [_prompt_ids(model, text, requirement) for text in texts]
    length = -(-max(map(len, prompts)) // LENGTH_STEP) * LENGTH_STEP
    ids_BS = np.zeros((BATCH_SIZE, length), np.int32)  # what follows a prompt does not change what is predicted behind it
    for row, prompt in zip(ids_BS, prompts):
        row[: len(prompt)] = prompt
    logits_BSV = model.logits(ids_BS)
    last_BC = logits_BSV[np.arange(len(prompts)), [len(prompt) - 1 for prompt in prompts]][:, list(answers.values())].astype(np.float64)
    weights_BC = np.exp(last_BC - last_BC.max(axis=1, keepdims=True))
    return [dict(zip(answers, (row / row.sum()).round(6).tolist())) for row in weights_BC]


def _answer_ids(model: "Judge", requirement: Requirement) -> dict[str, int]:
    """Returns label -> first token of its answer."""
    if model.tokenizer is None:
        raise UserError("the judge has no tokenizer beside it: put the tokenizer's files into its directory")
    ids = {name: model.tokenizer.encode_continuation(word)[0] for name, word in requirement.answers.items()}
    if len(set(ids.values())) < len(ids):
        names = {token: name for name, token in ids.items()}
        same = next((name, names[token]) for name, token in ids.items() if names[token] != name)
        raise UserError(f"the answers for {' and '.join(same)} begin with the same token in the judge's tokenizer: take another judge")
    return ids


def _prompt_ids(model: "Judge", text: str, requirement: Requirement) -> list[int]:
    tokens = model.tokenizer.encode(_beginning(text))[:MAX_TOKENS]
    message = {"role": "user", "content": requirement.prompt(model.tokenizer.decode(tokens))}
    return list(chat.render([message], model.tokenizer, add_assistant_header=True).ids)


def _beginning(text: str) -> str:
    return text[: MAX_TOKENS * CHARACTERS_PER_TOKEN].encode(errors="replace").decode()


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE))


def _read_done(target: Path, about: dict[str, str]) -> set[str]:
    """Returns the ids of the documents that are in `target`. A line that was cut off while it was written is taken away."""
    if not target.is_file():
        return set()
    content = target.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        lines = [json.loads(line) for line in content[:whole].splitlines()]
        other = next((line for line in lines if any(line[key] != value for key, value in about.items())), None)
        ids = {line["id"] for line in lines}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{target} is not a file of labels: name another target") from error
    if other:
        raise UserError(f"{target} holds labels of {other['model']} for '{other['requirement']}': name another target")
    if whole < len(content):
        with target.open("rb+") as file:
            file.truncate(whole)
    return ids
