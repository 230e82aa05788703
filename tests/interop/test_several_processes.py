"""A model on the mesh of several processes: each reads only its part, and together they write what one process writes."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from random_models import FLOAT32, assert_same_model, save_random

import herd_jax
from herd_jax.interop.formats import safetensors
from herd_jax.mesh import MeshConfig, make_mesh
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


@pytest.mark.slow
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


def test_metas_files_are_written_by_several_processes(tmp_path):
    pytest.importorskip("torch")
    config = dataclasses.replace(CONFIG, dim=64, rope_scaling=None)
    save_random(tmp_path / "model", config, "herd", FLOAT32, context_length=64)
    done = run(["-c", START + '    loaded.save(target / "two", "meta")'], tmp_path / "model", tmp_path, "[2, 1, 2, 1]")
    assert [status for status, *_ in done] == [0, 0], done
    herd_jax.load(tmp_path / "model", make_mesh(MeshConfig(tp=2, dp=1), jax.devices()[:2]), "float32").save(tmp_path / "one", "meta")
    assert contents(tmp_path / "two") == contents(tmp_path / "one") and len(contents(tmp_path / "two")) == 3
    done = run(["-m", "herd_jax.convert", "--source", tmp_path / "model", "--target", tmp_path / "command", "--to", "meta", "--tp", "2"])
    assert [status for status, *_ in done] == [0, 0], done
    assert contents(tmp_path / "command") == contents(tmp_path / "one")


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


@pytest.mark.parametrize("form, mesh", [("apart", (2, 1, 2, 1)), ("stacked", (2, 1, 1, 4)), ("stacked", (1, 2, 2, 2)), ("apart", (4, 1, 1, 1))], ids=str)
def test_a_process_reads_and_holds_only_its_part(tmp_path, monkeypatch, form, mesh):
    """The model takes 87 MB in BF16. What memory holds beyond the part of a process is less than its largest parameter."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from load import measure

    config = dataclasses.replace(tiny.CONFIG, dim=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, ffn_dim=2048, vocab_size=8192)
    save_random(tmp_path / "model", config, "huggingface")
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    ends = 2 * 2 * config.dim * config.vocab_size  # of which each pipeline rank has all
    num_processes = 1 if mesh == (4, 1, 1, 1) else 2
    expected = size if num_processes == 1 else (size - ends) / 2 + (ends if mesh[2] > 1 else ends / 2)
    for found in measure(tmp_path / "model", num_processes, mesh, form):
        assert found["held"] == pytest.approx(expected, rel=0.01) and found["read"] == pytest.approx(expected, rel=0.01)
        assert found["peak"] < found["held"] + 20e6
