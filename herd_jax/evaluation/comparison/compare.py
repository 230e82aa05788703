"""Two models side by side on the same items, with paired significance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from herd_jax.errors import UserError
from herd_jax.evaluation.comparison.statistics import holm, paired
from herd_jax.evaluation.results import item_tasks, read_items, short_names, write_results
from herd_jax.files import user_path

SIGNIFICANT = 0.05


def compare(first: str, second: str, output: str | None = None) -> str:
    """Compares the items of two evaluated models, joined by id, on each task that both have; writes `compare.json`, returns the table.

    A task whose items have several metrics (acc and acc_norm, say) has a line, and a test, for each: "TASK METRIC".
    Raises UserError where they have no task in common, where the items of one differ, and for items without a score.
    """
    names = short_names((first, second))
    tasks, other = item_tasks(first), item_tasks(second)
    common = sorted({*tasks} & {*other})
    if not common:
        has = " and ".join(f"{directory} has {', '.join(found) or 'none'}" for directory, found in ((first, tasks), (second, other)))
        raise UserError(f"no task has items in both directories, {has}: evaluate both models on the same tasks")
    results = {
        f"{task} {metric}" if len(scores) > 1 else task: {"task": task, "metric": metric} | paired(*pair)
        for task in common
        for scores in [_scores(task, first, second)]
        for metric, pair in scores.items()
    }
    for found, p in zip(results.values(), holm([found["p"] for found in results.values()])):
        found |= {"p_holm": p, "is_significant": p < SIGNIFICANT}
    only = {name: sorted({*has} - {*common}) for name, has in zip(names, (tasks, other))}
    settings = {"first": str(first), "second": str(second), "names": names, "only": only}
    directory = user_path(output) if output else Path("evaluation") / "-vs-".join(Path(name).name for name in names)
    path = write_results(directory, "compare", " and ".join(names), settings, results)
    left_out = [f"only of {name}: {', '.join(found)}" for name, found in only.items() if found]
    return "\n".join([table(results, names), *left_out, f"written: {path}"])


def table(results: dict, names: Sequence[str]) -> str:
    """Returns a line for each test, scores in percent."""
    width = max(len("task"), *map(len, results))
    columns = [max(len(name), 7) for name in names]
    shown = [f"{name:>{column}}" for name, column in zip(names, columns)]
    lines = ["  ".join([f"{'task':<{width}}", " items", *shown, " difference   95 %", "        p", "   Holm"])]
    for name, found in results.items():
        scores = [f"{100 * score:>{column}.1f}" for score, column in zip(found["scores"], columns)]
        difference = f"{100 * found['difference']:>+11.1f} \u00b1{100 * found['half_interval']:>6.1f}"
        tests = [f"{found['p']:>9.2g}", f"{found['p_holm']:>7.2g}{' *' if found['is_significant'] else ''}"]
        lines.append("  ".join([f"{name:<{width}}", f"{found['num_items']:>6,}", *scores, difference, *tests]))
    about = f"difference: {names[1]} less {names[0]}; *: p below {SIGNIFICANT} when corrected for the number of tests, {len(results)}"
    return "\n".join([*lines, about])


def _scores(task: str, first: str, second: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns, by metric, the scores of both models on the same items: of each metric that is a number in all of them, or of "score" alone."""
    items, other = read_items(first, task), read_items(second, task)
    missing = [len(items.keys() - other.keys()), len(other.keys() - items.keys())]
    if any(missing):
        raise UserError(
            f"the items of {task} differ, {missing[0]} of {len(items)} in {first} are not in {second} and {missing[1]} of {len(other)} "
            "the other way: evaluate both models on the same data with the same --limit"
        )
    if not items:
        raise UserError(f"task {task} of {first} has no items: evaluate the model again")
    for directory, rows in ((first, items), (second, other)):
        without = sum(not _is_number(row.get("score")) for row in rows.values())
        if without:
            raise UserError(f"{without} of {len(rows)} items of {task} in {directory} have no score: evaluate the model again")
    both = [*items.values(), *other.values()]
    metrics = [name for name in both[0].get("metrics", ()) if all(_is_number(row.get("metrics", {}).get(name)) for row in both)]
    value = lambda row, name: float(row["metrics"][name] if metrics else row["score"])
    of_both = lambda name: tuple(np.array([value(rows[each], name) for each in items]) for rows in (items, other))
    return {name: of_both(name) for name in metrics or ["score"]}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
