"""Claim: a run that is broken on purpose goes on by itself and ends with the losses of one that was left alone.

    python benchmarks/chaos.py                                       # two processes, three seeds with one fault of each kind
    python benchmarks/chaos.py --processes 4 --seeds 5 6 --faults 10 --workdir runs/chaos
    python benchmarks/chaos.py --seeds 7 --kinds slow clock          # of these kinds alone

Each seed is one supervised run of processes of fake devices, to which the faults of KINDS are done in a random order at random steps.
A scheduler is played too: it starts the job again when a signal ended it, and says how many hosts there are. Odd seeds save locally as
well as durably. Two batches of all runs, and of the undisturbed one, are noise that `train.on_spike=skip` has to leave out (no token
stream gives a loss that is not finite; the tests have those).

Losses, norms, validation losses and skipped steps of all steps must be those of the undisturbed run: exactly, but from the step on
at which a run came back with fewer processes within a relative 1e-6. The table has by the clock of this script: "detected", from the
fault until the run or its supervisor says so ("none": it had nothing to say); "lost steps", taken again; "downtime", from then until the
first step is done. What the runs stand on (disk, network, memory, clock) is made by `chaos_world.py`; it takes root, and kinds of faults whose
piece of it cannot be made are left out, with the reason.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from chaos_faults import KINDS, SAVE_EVERY, SPACING, Job, Stuck, draw, environment, inject
from chaos_world import ROOT, World

FIRST, JITTER, TAIL = 25, 10, 30  # steps
NOISE_STEPS = (22, 41)
CONFIG = """
def get_config():
    return {{
        "data": {{"sources": {{{text!r}: 1.0}}, "phases": {phases}}},
        "model": {{"name": "llama-tiny", "dim": 64, "ffn_dim": 128, "num_layers": 2, "vocab_size": 259}},
        "mesh": {{"dp": {processes}}},
        "train": {{
            "num_steps": {num_steps}, "global_batch_size": 16, "seq_len": 128, "on_spike": "skip", "spike_factor": 5.0, "spike_window": 20,
            "verify_every_steps": 5,
            "watchdog": {{"min_seconds": 10.0, "other_seconds": 45.0}},
        }},
        "optimizer": {{"peak_learning_rate": 1e-2, "warmup_steps": 5, "decay_steps": {num_steps}}},
        "checkpoint": {{"every_steps": {save_every}, "keep": 3, "local_every_steps": 5}},
        "eval": {{"every_steps": 20, "num_batches": 2}},
        "log": {{"every_steps": 1}},
    }}
"""
RESULTS = ("loss", "grad_norm", "learning_rate", "tokens", "val_loss", "val_bits_per_byte", "skipped_steps")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--faults", type=int, default=len(KINDS), help="for each seed (default: one of each kind)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--processes", type=int, choices=(2, 4), default=2)
    parser.add_argument("--workdir", type=Path, help="kept; default: a temporary directory that is removed")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unmounts, too
    root = Path(tempfile.mkdtemp(prefix="herd-chaos-")) if args.workdir is None else args.workdir.absolute()
    num_steps = FIRST + SPACING * args.faults + TAIL
    try:
        root.mkdir(parents=True, exist_ok=True)
        config = prepare(root, args.processes, num_steps)
        undisturbed = run_undisturbed(root, config, args.processes)
        skipped = [step for step, line in undisturbed.items() if line["skipped_steps"]]
        print(f"undisturbed: {num_steps} steps, loss {undisturbed[num_steps]['loss']:.4f}, left out {skipped}", flush=True)
        runs = [run_seed(root / f"seed-{seed}", config, args, seed, undisturbed) for seed in args.seeds]
    finally:
        if args.workdir is None:
            shutil.rmtree(root)
    faults = [fault for run in runs for fault in run["faults"]]
    matched = all(run["failure"] is None for run in runs)
    print(f"{len(faults)} faults in {len(runs)} runs: " + ("every run matched" if matched else "NOT EVERY RUN MATCHED"))
    print(json.dumps({"processes": args.processes, "num_faults": len(faults), "matched": matched, "skipped": skipped, "runs": runs}))
    sys.exit(not matched)


def prepare(root: Path, processes: int, num_steps: int) -> Path:
    """Makes the token streams, of text and of noise, and the config."""
    source = random.Random(0)
    texts = {"text": lambda: " ".join(source.choices("the cat sat on a mat and then it ran after two dogs".split(), k=400)),
             "noise": lambda: "".join(map(chr, source.choices(range(33, 127), k=2000)))}  # fmt: skip
    for name, make in texts.items():
        (root / name).mkdir(exist_ok=True)
        for i in range(30):
            (root / name / f"{i}.txt").write_text(make())
        arguments = ["--source", str(root / name), "--tokenizer", "bytes", "--target", str(root / f"{name}-tokens"), "--processes", "1",
                     "--validation-fraction", "0.1", "--overwrite"]  # fmt: skip
        subprocess.run([sys.executable, "-m", "herd_jax.tokenize", *arguments], env=environment(), check=True, stdout=subprocess.DEVNULL)
    text, noise = (str(root / f"{name}-tokens") for name in texts)
    phases = [{"from_tokens": (step + done - 1) * 16 * 128, "sources": {path: 1.0}}
              for step in NOISE_STEPS for done, path in enumerate((noise, text))]  # fmt: skip
    config = root / "config.py"
    config.write_text(CONFIG.format(text=text, phases=phases, processes=processes, num_steps=num_steps, save_every=SAVE_EVERY))
    return config


def run_undisturbed(root: Path, config: Path, processes: int) -> dict[int, dict]:
    workdir = root / "undisturbed"
    shutil.rmtree(workdir, ignore_errors=True)
    launcher = str(ROOT / "launch" / "local_multiprocess.sh")
    command = ["bash", launcher, str(processes), "--config", str(config), f"--config.workdir={workdir}"]
    with (root / "undisturbed.txt").open("w") as log:
        subprocess.run(command, env=environment(), check=True, stdout=log, stderr=subprocess.STDOUT)
    return read_results(workdir)


def run_seed(directory: Path, config: Path, args: argparse.Namespace, seed: int, undisturbed: dict[int, dict]) -> dict:
    """Runs, disturbs, compares, prints the table."""
    shutil.rmtree(directory, ignore_errors=True)
    world, processes = World(directory, args.processes), args.processes
    left_out = {name: world.missing[KINDS[name].needs] for name in args.kinds if KINDS[name].needs in world.missing}
    chance = random.Random(seed)
    plan = draw(chance, args.faults, [name for name in args.kinds if name not in left_out])
    fields = (f"--config.checkpoint.local_directory={directory / 'run' / 'local'}",) if seed % 2 else ()
    print(f"\nseed {seed}" + "".join(f"; {name} is left out ({why})" for name, why in left_out.items()), flush=True)
    print(f"{'fault':<47} {'step':>5} {'detected':>9} {'lost steps':>10} {'downtime':>9}", flush=True)
    job, done, difference, failure = Job(directory, config, processes, world, fields), [], None, None
    try:
        since = 0
        for index, name in enumerate(plan):
            job.wait_for_step(FIRST + SPACING * index + chance.randrange(JITTER), since)
            fault, since = inject(job, name, processes, chance)
            done.append(fault)
            detected = "none" if fault["detected_s"] is None else f"{fault['detected_s']:.1f} s"
            down = f"{fault['downtime_s']:.1f} s" if fault["restarted"] else "none"
            print(f"{KINDS[name].says:<47} {fault['step']:>5} {detected:>9} {fault['lost_steps']:>10} {down:>9}", flush=True)
        if (status := job.wait()) != 0:
            raise Stuck(f"the supervisor ended with {status}")
        tolerant_from = min((fault["continued_at"] for fault in done if fault["kind"] == "fewer"), default=None)
        difference = compare(read_results(job.workdir), undisturbed, tolerant_from)
        print(f"all {len(undisturbed)} steps as undisturbed, "
              + (f"to {difference:.1e} from step {tolerant_from + 1} on" if difference else "exactly"), flush=True)  # fmt: skip
    except Stuck as error:
        failure = str(error)
        print(f"FAILED: {failure}", flush=True)
    finally:
        job.end()
        world.close()
    incidents = read_lines(job.workdir / "incidents.jsonl")
    return {"seed": seed, "faults": done, "incidents": incidents, "largest_relative_difference": difference, "failure": failure}


def compare(results: dict[int, dict], undisturbed: dict[int, dict], tolerant_from: int | None) -> float:
    """The largest relative difference. Raises Stuck where one is too large: any at all up to step `tolerant_from` (None: throughout)."""
    if list(results) != list(undisturbed):
        raise Stuck("the steps of metrics.jsonl are not those of the undisturbed run")
    largest = 0.0
    for step, line in results.items():
        allowed = 0.0 if tolerant_from is None or step <= tolerant_from else 1e-6
        for name, expected in undisturbed[step].items():
            if line[name] == expected:
                continue
            difference = abs(line[name] - expected) / abs(expected) if None not in (line[name], expected) and expected else float("inf")
            if difference > allowed:
                raise Stuck(f"{name} of step {step} is {line[name]}, and {expected} in the undisturbed run")
            largest = max(largest, difference)
    return largest


def read_results(workdir: Path) -> dict[int, dict]:
    return {line["step"]: {name: line.get(name) for name in RESULTS} for line in read_lines(workdir / "metrics.jsonl")}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
