"""Multiple choice: MMLU, CommonsenseQA, PIQA, OpenBookQA, BoolQ, and a user's own items."""

import re
from pathlib import Path

from herd_jax.evaluation.benchmarks.multiple_choice import LETTERS, PACKAGED, Item, load_items, prompt
from herd_jax.evaluation.benchmarks.tasks.written import written
from herd_jax.files import user_path

# Tasks whose base models are asked for the text of the choice: how the question is put. All others choose among letters (section 5.1; its
# published settings: "choose by NLL over option letters").
CLOZE = {"piqa": "Question: {question}\nAnswer:", "openbookqa": "{question}", "boolq": "{question}\nAnswer:"}
SHOTS = {"mmlu": 5, "commonsense_qa": 7}  # of the paper; 0 for the others
ANSWER_TOKENS = 10  # that an instruct model may write


def is_known(task: str, data_dir: str | Path | None) -> bool:
    return task in PACKAGED or (data_dir is not None and (user_path(data_dir) / f"{task}.jsonl").is_file())


def config(task: str, preset: str, data_dir: str | Path | None) -> dict:
    """Returns lm-eval's configuration of the task: log-likelihoods of the choices for "base", a written answer for "instruct".

    Examples are the first items of the file, which are then not asked.
    """
    items, num_shots = load_items(task, data_dir), SHOTS.get(task, 0)
    row = _written if preset == "instruct" else _cloze if task in CLOZE else _letters
    rows = [{"id": item.id, "subject": item.subject} | row(item, task) for item in items]
    if preset == "instruct":
        scored = {"doc_to_target": "answer", "process_results": score_written, "metrics": ["acc"]}
        return written(rows, num_shots, ANSWER_TOKENS, ["\n"]) | scored
    metrics = ["acc", "acc_norm"] if row is _cloze and task != "boolq" else ["acc"]
    return {"dev": rows[:num_shots], "test": rows[num_shots:], "num_fewshot": num_shots, "output_type": "multiple_choice",
            "doc_to_target": "answer", "doc_to_choice": "choices", "metrics": metrics}  # fmt: skip


def score_written(doc: dict, answers: list[str]) -> dict:
    """Right is an answer whose first label, standing alone, is the item's."""
    labels = "|".join(map(re.escape, doc["choices"]))
    flags = re.IGNORECASE if doc["choices"] == ["no", "yes"] else 0
    found = re.search(rf"(?<!\w)({labels})(?!\w)", answers[0], flags)
    return {"acc": float(found is not None and found[1].lower() == doc["answer"].lower())}


def _letters(item: Item, task: str) -> dict:
    return {"prompt": prompt(item), "choices": list(LETTERS[: len(item.choices)]), "answer": item.answer}


def _cloze(item: Item, task: str) -> dict:
    return {"prompt": CLOZE[task].format(question=item.question), "choices": list(item.choices), "answer": item.answer}


def _written(item: Item, task: str) -> dict:
    if task == "boolq":
        return {"prompt": f"{item.question}\nAnswer with yes or no.", "choices": ["no", "yes"], "answer": item.choices[item.answer]}
    labels = list(LETTERS[: len(item.choices)])
    return {"prompt": prompt(item, cue="Answer with the letter only."), "choices": labels, "answer": labels[item.answer]}
