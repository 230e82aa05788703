"""Draws a run of configs/long_context_small.py: needles found before and after the long stages, at all lengths, and the loss over the stages.

    python benchmarks/plot_long_context.py runs/long-context --output benchmarks/long_context.png
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import herd_jax
from herd_jax.evaluation.needles.haystack import read_haystack
from herd_jax.evaluation.needles.recall import needle_recall
from herd_jax.evaluation.needles.report import DEPTHS, draw, table
from herd_jax.page.figure import figure_file

LENGTHS = (256, 512, 1024, 2048)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir")
    parser.add_argument("--output", default="benchmarks/long_context.png")
    args = parser.parse_args()
    stages = sorted(Path(args.workdir, "stages").iterdir(), key=lambda stage: int(stage.name.split("-")[0]))
    with figure_file(args.output, 15, 4.5) as figure:
        before, after, losses = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
        for axes, stage, title in ((before, stages[0], "before the long stages"), (after, stages[-1], "after them")):
            result = find_needles(stage)
            print(f"{title}, {stage}:\n{table(result)}")
            draw(axes, result, f"needles found (%), {title}")
        draw_losses(losses, stages)


def find_needles(stage: Path):
    """At all lengths, also those that the stage was not trained at."""
    model = dataclasses.replace(herd_jax.load(stage), context_length=None)
    return needle_recall(model, LENGTHS, DEPTHS, 4, read_haystack((), model.tokenizer), seed=1, template="record")


def draw_losses(axes, stages: list[Path]) -> None:
    first_token = 0
    for stage, color in zip(stages, itertools.cycle(f"C{i}" for i in range(10))):
        lines = [json.loads(line) for line in (stage / "metrics.jsonl").open()]
        points = [(first_token + line["tokens"], line["val_loss"]) for line in lines if "val_loss" in line]
        axes.plot(*zip(*points), marker=".", color=color, label=f"{stage.name.split('-')[1]} tokens")
        first_token += lines[-1]["tokens"]
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("validation loss at each stage's own length and data")
    axes.grid(alpha=0.3)
    axes.legend()


if __name__ == "__main__":
    main()
