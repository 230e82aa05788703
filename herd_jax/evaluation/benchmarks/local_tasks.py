"""Tasks of lm-evaluation-harness made of data on disk: nothing is downloaded. Settings are the paper's where it has any (section 5.1)."""

import functools
from pathlib import Path

import datasets
from lm_eval.api.task import ConfigurableTask

from herd_jax.errors import UserError
from herd_jax.evaluation.benchmarks.tasks import asdiv, choices, humaneval, ifeval

PRESETS = ("base", "instruct")
VERSION = 1  # of the prompts and the scoring: another one where they change
OTHERS = {"asdiv": asdiv.config, "humaneval": humaneval.config, "ifeval": ifeval.config}
NAMES = (*choices.PACKAGED, *OTHERS)


def local_task(name: str, preset: str, data_dir: str | Path | None = None, unsafe_execution: bool = False) -> ConfigurableTask | None:
    """Returns the task called `name`, None where it is not one of ours; any multiple choice for which `data_dir` holds `NAME.jsonl` is.

    Raises UserError where its data is missing or not as it must be.
    """
    others = OTHERS | {"humaneval": functools.partial(humaneval.config, unsafe_execution=unsafe_execution)}
    config = others.get(name) or (choices.config if choices.is_known(name, data_dir) else None)
    if config is None:
        return None
    made = config(name, preset, data_dir)
    dev, test, metrics = made.pop("dev"), made.pop("test"), [_metric(metric) for metric in made.pop("metrics")]
    if not test:
        raise UserError(f"task {name} has no items beyond its {len(dev)} examples: give more in its file")
    rows = {"dev": datasets.Dataset.from_list(dev or test[:1]), "test": datasets.Dataset.from_list(test)}
    examples = {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
    common = {"task": name, "custom_dataset": lambda **_: rows, "test_split": "test", "doc_to_text": "prompt", "metric_list": metrics}
    return ConfigurableTask(config=common | examples | {"metadata": {"version": VERSION}} | made)


def _metric(metric: str | tuple[str, dict]) -> dict:
    name, more = (metric, {}) if isinstance(metric, str) else metric
    return {"metric": name, "aggregation": "mean", "higher_is_better": True} | more
