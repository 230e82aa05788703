"""A model on the mesh of several processes: each reads only its part, and together they write what one process writes."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny
from random_models import FLOAT32, assert_same_model, save_random

import herd_jax
from herd_jax.interop.formats import safetensors
from herd_jax.text.tokenizer import load_tokenizer

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=264, init_std=0.4)
IDS = np.random.default_rng(0).integers(0, 256, (3, 13)).tolist()
START = """
import json, sys
from pathlib import Path
from herd_jax.machines.place import joined
from herd_jax.mesh import MeshConfig, request_cpu_devices

model, target, mesh = Path(sys.argv[1]), Path(sys.argv[2]), MeshConfig(*json.loads(sys.argv[3]))
with joined({}) as num_processes:
    request_cpu_devices(mesh, num_processes)
    import herd_jax, jax
    from herd_jax.interop.formats import safetensors

    safetensors.MAX_FILE_BYTES = 20_000  # so there are several files
    loaded = herd_jax.load(model, mesh)
"""


def run(program, *arguments, num_processes=2):
    """Runs a program in several processes; returns the status, the lines of the standard output, and the error output of each."""
    with socket.create_server(("", 0)) as first:
        port = first.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HERD_COORDINATOR": f"localhost:{port}", "HERD_NUM_PROCESSES": str(num_processes)}
    environment.pop("XLA_FLAGS", None)
    processes = [
        subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            env={**environment, "HERD_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(num_processes)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    lines = [[line for line in output.splitlines() if not line.startswith("[Gloo]")] for output, _ in outputs]
    return [(process.returncode, of, errors) for process, of, (_, errors) in zip(processes, lines, outputs, strict=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("several") / "model"
    save_random(path, CONFIG, "huggingface", FLOAT32, tokenizer=load_tokenizer("bytes"), context_length=64)
    return path


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("mesh", [(2, 1, 2, 1), (1, 2, 1, 2), (2, 1, 1, 2)], ids=str)
def test_two_processes_write_and_say_what_one_does(model, tmp_path, monkeypatch, mesh):
    program = f"""{START}
    loaded.save(target / "herd")
    text = loaded.generate(["abc", "a longer prompt"], max_new_tokens=5)
    loaded.save(target / "huggingface", "huggingface")  # now the weights are as the decoder wants them
    losses = loaded.loss(["some text", "another one"])
    found = json.dumps([text, losses, loaded.logits({IDS}).tolist()])
    (target / str(jax.process_index())).write_text(found)  # more than a pipe holds
"""
    done = run(["-c", program], model, tmp_path, json.dumps(mesh))
    assert [status for status, *_ in done] == [0, 0], done
    monkeypatch.setattr(safetensors, "MAX_FILE_BYTES", 20_000)
    one = herd_jax.load(model, dtype="float32")
    for format in ("herd", "huggingface"):
        one.save(tmp_path / f"one-{format}", format)
        assert contents(tmp_path / format) == contents(tmp_path / f"one-{format}") and len(contents(tmp_path / format)) > 10
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "herd", "huggingface", "one-herd", "one-huggingface"}
    for process in ("0", "1"):
        text, losses, logits = json.loads((tmp_path / process).read_text())
        assert text == one.generate(["abc", "a longer prompt"], max_new_tokens=5)
        np.testing.assert_allclose(losses, one.loss(["some text", "another one"]), rtol=1e-5)
        np.testing.assert_allclose(logits, one.logits(IDS), atol=1e-2)  # the logits of such weights reach 30


def test_a_directory_that_is_not_shared(model, tmp_path):
    """Nothing is left behind, and both processes say why."""
    program = f"""{START}
    from herd_jax.interop import save
    save.PATIENCE_SECONDS = 1
    loaded.save(target / str(jax.process_index()) / "herd")
"""
    done = run(["-c", program], model, tmp_path, "[2, 1, 2, 1]")
    for status, _, errors in done:
        assert status == 1 and "is not the same directory on all hosts: name one on a file system that all of them share" in errors
    assert not list(tmp_path.rglob("herd*"))


def test_one_that_cannot_write_ends_all(model, tmp_path):
    program = f"""{START}
    if jax.process_index() == 1:
        def full(*_):
            raise OSError(28, "No space left on device")
        safetensors._write_file = full
    loaded.save(target / "herd")
"""
    done = run(["-c", program], model, tmp_path, "[2, 1, 2, 1]")
    for status, _, errors in done:
        assert status == 1 and "cannot write" in errors and "No space left on device" in errors
    assert not list(tmp_path.iterdir())


def test_the_command_in_two_processes(model, tmp_path):
    arguments = ("-m", "herd_jax.convert", "--source", model, "--target", tmp_path / "herd")
    done = run(arguments)
    assert [(status, lines) for status, lines, _ in done] == [(0, [f"wrote {tmp_path / 'herd'}"]), (0, [])], done
    assert_same_model(tmp_path / "herd", CONFIG, herd_jax.interop.load.open_source(model).read, FLOAT32)
    done = run(arguments)
    assert [status for status, *_ in done] == [1, 1] and all("exists: name a new directory" in errors for *_, errors in done)


MEASURED = """
    import gc, resource, threading, time

    def anonymous():
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) * 1024

    read, peak, before, form = [0], [0], anonymous(), sys.argv[4]
    of_tensor = safetensors.SafetensorsFiles.read

    def counted(*arguments):
        array = of_tensor(*arguments)
        read[0] += array.nbytes
        return array

    def watch():
        while True:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.005)

    safetensors.SafetensorsFiles.read = counted
    threading.Thread(target=watch, daemon=True).start()
    tree = jax.block_until_ready(getattr(loaded.weights, form)())
    time.sleep(0.1)
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    print(json.dumps({"held": held, "read": read[0], "peak": peak[0] - before}), flush=True)
"""


@pytest.mark.parametrize("form, mesh, share", [("apart", (2, 1, 2, 1), 0.5), ("stacked", (2, 1, 1, 4), 0.5), ("stacked", (1, 2, 2, 2), 0.5)], ids=str)
def test_a_process_reads_and_holds_only_its_part(tmp_path, form, mesh, share):
    """The model takes 174 MB. What is held beyond the part of a process is less than its largest parameter."""
    config = dataclasses.replace(tiny.CONFIG, dim=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, ffn_dim=2048, vocab_size=8192)
    save_random(tmp_path / "model", config, "huggingface", FLOAT32)
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    ends = 2 * 4 * config.dim * config.vocab_size  # of which pipeline ranks have no part alone
    for status, lines, errors in run(["-c", START + MEASURED], tmp_path / "model", tmp_path, json.dumps(mesh), form):
        assert status == 0, errors
        found = json.loads(lines[0])
        expected = share * (size - ends) + (ends if mesh[2] > 1 else share * ends)
        assert found["held"] == pytest.approx(expected, rel=0.01) and found["read"] == pytest.approx(expected, rel=0.01)
        assert found["peak"] < 1.05 * found["held"] + 35e6
