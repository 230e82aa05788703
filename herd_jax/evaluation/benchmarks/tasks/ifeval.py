"""IFEval: instructions whose following a program can check, by lm-eval's own checkers; strict and loose, by prompt and by instruction.

Its data is no part of a package: `ifeval.jsonl` in --data, objects with "key", "prompt", "instruction_id_list" and "kwargs".
"""

import contextlib
import io
from pathlib import Path
from unittest import mock

from herd_jax.errors import UserError
from herd_jax.evaluation.benchmarks.task_data import find_data, read_records
from herd_jax.evaluation.benchmarks.tasks.written import written
from herd_jax.evaluation.results import item_id

FIELDS = {"key", "prompt", "instruction_id_list", "kwargs"}
COUNT_SENTENCES = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}  # with NLTK's model of English


def config(task: str, preset: str, data_dir: str | Path | None) -> dict:
    path = find_data(task, None, data_dir)
    rows = []
    for number, record in enumerate(read_records(path), start=1):
        if missing := sorted(FIELDS - set(record)):
            raise UserError(f"item {number} of {path} has no {', '.join(missing)}: give IFEval's own file, as it is published")
        rows.append({"id": item_id(record["prompt"]), **{field: record[field] for field in FIELDS}})
    checkers = _checkers({kind for row in rows for kind in row["instruction_id_list"]})
    by_instruction = {"aggregation": checkers.agg_inst_level_acc}
    of_kind = lambda kind: [f"prompt_level_{kind}_acc", (f"inst_level_{kind}_acc", by_instruction)]
    metrics = [*of_kind("strict"), *of_kind("loose")]
    return written(rows, 0, 1280) | {"doc_to_target": "key", "process_results": checkers.process_results, "metrics": metrics}


def _checkers(kinds: set[str]):
    """Returns lm-eval's module, imported without the download that it would start."""
    try:
        import nltk

        with mock.patch.object(nltk, "download", lambda *_, **__: False), contextlib.redirect_stdout(io.StringIO()):  # it says that it did
            from lm_eval.tasks.ifeval import instructions_registry, utils
    except ImportError as error:
        raise UserError(f"task ifeval needs the package {error.name}, which is not installed: pip install -e '.[eval]'") from error
    if unknown := sorted(kinds - set(instructions_registry.INSTRUCTION_DICT)):
        raise UserError(f"task ifeval has instructions of the kind {unknown[0]}, which lm-eval cannot check: leave those items out")
    if counting := sorted(kinds & COUNT_SENTENCES):
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError as error:
            raise UserError(
                f"task ifeval needs NLTK's model punkt_tab for {counting[0]}, and nothing is downloaded here: "
                "`python -m nltk.downloader punkt_tab` where there is a network, or leave those items out"
            ) from error
    return utils
