"""Measures the engine on this machine against its peers in one run: tokens a second at 1, 8 and 32 at the same time, samples of one prompt, guesses,
latencies, and two micro-batches of a pipeline.

    python benchmarks/inference.py --model SmolLM2-135M-Instruct.Q4_1.gguf --peer-python PYTHON_WITH_TORCH_AND_LLAMA_CPP

All sides read the same FP32 weights: the model is written as a Hugging Face directory, which transformers reads, and as a GGUF file of F32 for
llama.cpp. They take turns, one process each, with the same prompts and greedy decoding. The last line is one JSON document. `--only` names some of the sections.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from inference_sides import PROMPT, seconds_of

SECTIONS = ("peers", "samples", "guesses", "latency", "pipeline", "sampling", "gpu")
STORY = (
    "Maria had worked at the harbour for nine years when the new crane arrived. It was taller than the old one, painted yellow, and it made a sound like a "
    "train that would not stop. The foreman told everybody to keep away from it until the engineer had come from the city. The engineer came on a Thursday, "
    "looked at the crane for an hour, wrote four lines into a book, and left. On Friday the crane dropped a container of oranges into the water. "
)
CODE = '''class Account:
    def __init__(self, owner, balance):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance = self.balance + amount

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance = self.balance - amount
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--peer-python", help="a Python with torch, transformers and llama-cpp-python; without it there are no peers")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        args.directory = str(Path(directory) / "model")
        convert = ("-m", "herd_jax.convert", "--source", args.model, "--target", args.directory, "--to", "huggingface", "--dtype", "float32")
        subprocess.run([sys.executable, *convert], check=True)
        for name in args.only:
            found |= {name: globals()[f"measure_{name}"](args)}
    print(json.dumps(found))


def load(args):
    import herd_jax

    return herd_jax.load(args.directory, dtype="float32")


# --- against the peers


def measure_peers(args) -> dict:
    """Tokens a second of each side, the best of several turns, and the share of the memory's bandwidth at 1."""
    sides = ["ours", *(["transformers", "llama_cpp"] if args.peer_python else [])]
    rest = ["--model", args.directory, "--new-tokens", str(args.new_tokens), "--concurrent", *map(str, args.concurrent)]
    python = lambda side: sys.executable if side == "ours" else args.peer_python
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    start = lambda side: subprocess.Popen([python(side), str(Path(__file__).with_name("inference_sides.py")), side, *rest], stdin=-1, stdout=-1, text=True, env=environment)
    found = {side: {} for side in sides}
    about, ids = {}, {}
    processes = {}
    for side in sides:
        processes[side] = start(side)
        about[side] = json.loads(processes[side].stdout.readline())
    for _ in range(args.turns):
        for side, process in processes.items():
            for number in args.concurrent:
                print(number, file=process.stdin, flush=True)
                run = json.loads(process.stdout.readline())
                found[side][number] = max(found[side].get(number, 0), number * args.new_tokens / run["seconds"])
                ids[side, number] = run["ids"]
    for process in processes.values():
        process.stdin.close()
        process.wait()
    print(f"{args.new_tokens} new tokens after {about['ours']['prompt']} of prompt, FP32: {', '.join(a['what'] for a in about.values())}")
    share = found["ours"][1] * about["ours"]["bytes"] / about["ours"]["bandwidth"] if 1 in args.concurrent else None
    for number in args.concurrent:
        ratios = ", ".join(
            f"{side} {found[side][number]:.1f} ({found['ours'][number] / found[side][number]:.2f} x, "
            f"{'the same tokens' if ids[side, number] == ids['ours', number] else 'OTHER TOKENS'})"
            for side in sides[1:]
        )
        print(f"{number} at the same time: {found['ours'][number]:.1f} tokens/s; {ratios}")
    if share:
        print(f"at 1 the weights are read at {share:.0%} of {about['ours']['bandwidth'] / 1e9:.1f} GB/s, what a matrix-vector product reaches")
    return {"tokens_per_second": found, "bandwidth_share": share, "what": about}


# --- what the engine does for itself


def measure_samples(args) -> dict:
    """16 samples of a prompt of 512 tokens, from one prefill and from 16."""
    from herd_jax.inference.engine.requests import Request
    from herd_jax.inference.sampling import Sampling

    model = load(args)
    engine = model.engine(max_sequences=16, max_length=1024, max_tokens_in_cache=16 * 640)
    ids = (model.text_tokenizer().encode(STORY * 6))[:512]
    sampling = Sampling(32, temperature=0.8, seed=1, ignore_eos=True)
    salt = lambda: str(time.perf_counter_ns())
    shared = lambda: [Request(ids, sampling, num_samples=16, salt=salt())]
    apart = lambda: [Request(ids, sampling, first_sample=i, salt=salt()) for i in range(16)]
    texts = {name: sorted(a.text for a in engine.generate(make())) for name, make in (("shared", shared), ("apart", apart))}  # and compiles
    seconds = {name: min(seconds_of(lambda: list(engine.generate(make()))) for _ in range(args.turns)) for name, make in (("shared", shared), ("apart", apart))}
    ratio = seconds["apart"] / seconds["shared"]
    same = "the same texts" if texts["shared"] == texts["apart"] else "OTHER TEXTS"
    print(f"16 samples of 32 tokens after 512: {seconds['shared']:.2f} s from one prefill, {seconds['apart']:.2f} s from 16: {ratio:.2f} x, {same}")
    return {"seconds": seconds, "ratio": ratio}


def measure_guesses(args) -> dict:
    """Greedy answers to a summary and to a change of code, with guesses by look-up and without."""
    from herd_jax.inference.engine.requests import Request
    from herd_jax.inference.sampling import Sampling

    model, found = load(args), {}
    asked = {"summary": f"Summarize this text, and quote its most important sentence:\n\n{STORY}", "code": f"Add a method `transfer` to this class:\n\n{CODE}"}
    for name, text in asked.items():
        request = Request(model.chat_ids([{"role": "user", "content": text}]), Sampling(128))
        rates, texts = {}, {}
        for guesses in (0, 4):
            engine = model.engine(max_sequences=1, max_length=1024, guesses=guesses)
            (answer_,) = engine.generate([request])
            rates[guesses] = len(answer_.ids) / min(seconds_of(lambda: list(engine.generate([request]))) for _ in range(args.turns))
            texts[guesses] = answer_.text
        same = "the same text" if texts[0] == texts[4] else "OTHER TEXT"
        print(f"{name}: {rates[0]:.1f} tokens/s, {rates[4]:.1f} with guesses: {rates[4] / rates[0]:.2f} x, {same}")
        found[name] = {"tokens_per_second": rates, "ratio": rates[4] / rates[0]}
    return found


def measure_latency(args) -> dict:
    """Times to the first token and between tokens, of requests that arrive at random: 2 a second for 30 s, prompts of 64 tokens, 32 new ones."""
    import random

    from herd_jax.inference.engine.requests import Piece, Request
    from herd_jax.inference.sampling import Sampling

    model, rng = load(args), random.Random(0)
    engine = model.engine(max_sequences=16, max_length=256)
    engine.warm_up()
    ids = model.text_tokenizer().encode(STORY)[:64]
    arrivals, at = [], 0.0
    while at < 30:
        at += rng.expovariate(2.0)
        arrivals.append(at)
    first, between, asked, last = [], [], {}, {}
    begun = time.perf_counter()
    while arrivals or engine.has_work:
        now = time.perf_counter() - begun
        while arrivals and arrivals[0] <= now:
            ticket = engine.submit(Request(ids, Sampling(32, ignore_eos=True), salt=str(now)))
            asked[ticket] = begun + arrivals.pop(0)
        if not engine.has_work:
            time.sleep(max(0.0, arrivals[0] - now))
            continue
        for event in engine.step():
            if isinstance(event, Piece) and event.ids:
                now = time.perf_counter()
                (between if event.ticket in last else first).append(now - last.get(event.ticket, asked[event.ticket]))
                last[event.ticket] = now
    quantile = lambda values, share: sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3
    found = {name: {"p50": quantile(v, 0.5), "p99": quantile(v, 0.99)} for name, v in (("first", first), ("between", between))}
    print(
        f"2 requests a second, {len(first)} in all: first token after {found['first']['p50']:.0f} ms (p99 {found['first']['p99']:.0f}), "
        f"then one each {found['between']['p50']:.0f} ms (p99 {found['between']['p99']:.0f})"
    )
    return found


def measure_pipeline(args) -> dict:
    """Two micro-batches against one on pp 2, in a process of two fake devices."""
    program = f"""
import json, time, jax
import herd_jax
from herd_jax.inference.engine.requests import Piece, Request
from herd_jax.inference.sampling import Sampling
from herd_jax.mesh import MeshConfig
model = herd_jax.load({args.directory!r}, MeshConfig(pp=2, dp=1), "float32")
ids, found = model.text_tokenizer().encode({PROMPT!r}), {{}}
for number in (1, 2):
    engine = model.engine(max_sequences=16, max_length=256, max_tokens_in_cache=16 * 128, micro_batches=number)
    ask = lambda: [Request(ids, Sampling(32, ignore_eos=True), salt=str(time.perf_counter_ns())) for _ in range(16)]
    list(engine.generate(ask()))
    best = 1e9
    for _ in range({args.turns}):
        start = time.perf_counter()
        list(engine.generate(ask()))
        best = min(best, time.perf_counter() - start)
    list(engine.generate(ask()[:1]))
    start = time.perf_counter()
    list(engine.generate(ask()[:1]))
    found[number] = {{"tokens_per_second": 16 * 32 / best, "ms_per_token_alone": (time.perf_counter() - start) / 32 * 1e3}}
print(json.dumps(found))
"""
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    found = json.loads(out.splitlines()[-1])
    one, two = found["1"], found["2"]
    print(
        f"pp 2, 16 answers: {two['tokens_per_second']:.1f} tokens/s with two micro-batches, {one['tokens_per_second']:.1f} with one: "
        f"{two['tokens_per_second'] / one['tokens_per_second']:.2f} x; an answer alone {two['ms_per_token_alone']:.0f} and {one['ms_per_token_alone']:.0f} ms a token"
    )
    return found


def measure_sampling(args) -> dict:
    """The choice of a token from logits [B, 49,152], in ms."""
    import jax
    import jax.numpy as jnp

    from herd_jax.inference.draw import draw
    from herd_jax.inference.sampling import Sampling

    found = {}
    for number in (1, 8, 32):
        logits = jax.random.normal(jax.random.key(0), (number, 49152)) * 3
        for name, options in (("greedy", {}), ("plain", {"temperature": 0.8}), ("top_p", {"temperature": 0.8, "top_p": 0.9})):
            some, position = jax.device_put(Sampling(1, **options).options(number)), jnp.arange(number)
            draw(logits, some, position).block_until_ready()
            found[f"{name} {number}"] = min(seconds_of(lambda: draw(logits, some, position).block_until_ready()) for _ in range(10)) * 1e3
    print("ms to choose: " + ", ".join(f"{name} {ms:.2f}" for name, ms in found.items()))
    return found


def measure_gpu(args) -> dict | None:
    """Decode at 1 to 256 answers, and prefill in BF16 and FP8: the parts of gpu.py."""
    import jax

    if jax.default_backend() != "gpu":
        print("there is no GPU here, so its section is left out: the same command measures it where one is")
        return None
    out = subprocess.run([sys.executable, str(Path(__file__).with_name("gpu.py")), "decode", "prefill"], check=True, capture_output=True, text=True).stdout
    print(out, end="")
    return json.loads(out.splitlines()[-1])


if __name__ == "__main__":
    main()
