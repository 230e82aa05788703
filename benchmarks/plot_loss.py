"""Draws training and validation loss of a run, from its metrics.jsonl: the picture in README.md.

    python -m pip install matplotlib
    python benchmarks/plot_loss.py runs/quickstart benchmarks/quickstart.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    lines = [json.loads(line) for line in (args.workdir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "val_loss" in line]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([line["tokens"] / 1e3 for line in lines], [line["loss"] for line in lines], label="training", color="#8fb3d9")
    axes.plot([line["tokens"] / 1e3 for line in evaluated], [line["val_loss"] for line in evaluated], "o-", label="validation", color="#c0504d")
    newest = evaluated[-1]
    note = f"{newest['val_loss']:.2f} nats per token\n{newest['val_bits_per_byte']:.2f} bits per byte"
    axes.annotate(note, (newest["tokens"] / 1e3, newest["val_loss"]), xytext=(0, 14), textcoords="offset points", ha="right")
    axes.set(xlabel="thousands of tokens", ylabel="loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
