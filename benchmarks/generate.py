"""Claim: greedy decoding with a KV cache is at least twice as fast as transformers' `generate` on this CPU in FP32, and gives the same tokens.

    python benchmarks/generate.py --model SmolLM2-135M-Instruct.Q4_1.gguf --peer-python PYTHON_WITH_TORCH

Both sides read the same weights: the model is converted to a Hugging Face directory first. They take turns, one process each, on the same prompts.
Beside the rates stands the limit of the memory: every weight but the embedding's table is read once a step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "The history of the city begins with a small settlement on the bank of the river, where"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve((ours if args.side == "ours" else peer)(args), args)
        return
    with tempfile.TemporaryDirectory() as directory:
        model = str(Path(directory) / "model")
        convert = ("-m", "herd_jax.convert", "--source", args.model, "--target", model, "--to", "huggingface", "--dtype", "float32")
        subprocess.run([sys.executable, *convert], check=True)
        rest = ["--model", model, "--new-tokens", str(args.new_tokens), "--batches", *map(str, args.batches)]
        pythons = {"ours": sys.executable, "peer": args.peer_python}
        start = lambda side: subprocess.Popen([pythons[side], __file__, "--side", side, *rest], stdin=-1, stdout=-1, text=True)
        sides = {side: start(side) for side in pythons}
        about = {side: json.loads(process.stdout.readline()) for side, process in sides.items()}
        found = {side: {batch: [] for batch in args.batches} for side in sides}
        for _ in range(args.turns):
            for side, process in sides.items():
                for batch in args.batches:
                    print(batch, file=process.stdin, flush=True)
                    found[side][batch].append(json.loads(process.stdout.readline()))
        for process in sides.values():
            process.stdin.close()
            process.wait()
    print(f"{args.new_tokens} new tokens after {about['ours']['prompt']} of prompt, FP32; {about['ours']['what']} and {about['peer']['what']}")
    print(f"the memory gives {about['ours']['bandwidth'] / 1e9:.1f} GB/s to a matrix-vector product, weights are {about['ours']['bytes'] / 1e9:.2f} GB")
    for batch in args.batches:
        rate = {side: max(batch * args.new_tokens / run["seconds"] for run in found[side][batch]) for side in found}
        limit = batch * about["ours"]["bandwidth"] / about["ours"]["bytes"]
        same = found["ours"][batch][0]["ids"] == found["peer"][batch][0]["ids"]
        print(
            f"batch {batch}: {rate['ours']:.1f} tokens/s, peer {rate['peer']:.1f}, ratio {rate['ours'] / rate['peer']:.2f}; "
            f"limit {limit:.1f} tokens/s; {'the same tokens' if same else 'OTHER TOKENS'}"
        )


def serve(sides, args):
    """Answers each batch size on stdin with the seconds of a run and the first row's ids."""
    about, run = sides
    for batch in args.batches:
        run(batch)
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        ids = run(int(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "ids": ids}), flush=True)


def ours(args):
    import jax
    import jax.numpy as jnp

    import herd_jax
    from herd_jax.inference.sampling import Sampling

    model = herd_jax.load(args.model, dtype="float32")
    ids = model._prompt_ids(PROMPT)
    weights = model.weights.apart()
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) - weights["ends"]["embed"]["table"].nbytes
    v, w = jnp.ones((1, 4096)), jnp.ones((4096, 16384))
    product = jax.jit(jnp.matmul).lower(v, w).compile()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        product(v, w).block_until_ready()
        seconds.append(time.perf_counter() - start)

    def run(batch):
        steps = model._steps([ids] * batch, args.new_tokens, Sampling(args.new_tokens))
        return [int(new[0]) for new in steps]

    return {"what": f"jax {jax.__version__}", "prompt": len(ids), "bytes": num_bytes, "bandwidth": w.nbytes / min(seconds)}, run


def peer(args):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def run(batch):
        with torch.inference_mode():
            options = {"do_sample": False, "max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "use_cache": True}
            out = model.generate(ids.repeat(batch, 1), attention_mask=torch.ones_like(ids.repeat(batch, 1)), **options)
        return out[0, ids.shape[1] :].tolist()

    return {"what": f"transformers {transformers.__version__}, torch {torch.__version__}"}, run


if __name__ == "__main__":
    main()
