"""Whole curation runs on real text of the Python library: what comes out, kills and resumption, other executors, refusals."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from curation_runs import FRENCH, SETTINGS, configured, prose, results

from herd_jax.config import read_command_line
from herd_jax.curation.parquet import rows
from herd_jax.curation.reporting.report import inspect
from herd_jax.curation.run import curate
from herd_jax.data.rows import load_data_tokenizer, open_streams
from herd_jax.data.streams import TokenStream
from herd_jax.errors import UserError
from herd_jax.training.config import RunConfig


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """Pages, JSONL, source code, French, an e-mail address, a newer version, a copy, a menu, and rubbish."""
    directory = tmp_path_factory.mktemp("inputs")
    with gzip.open(directory / "docs.jsonl.gz", "wt") as file:
        for i in range(40):
            line = {"id": f"doc-{i}", "text": prose(i), "url": f"http://docs.example.org/{i}", "date": "2020-01-01"}
            file.write(json.dumps(line) + "\n")
        newer = {"id": "newer", "text": prose(0) + "\nYou can write to jane.doe@company.com now.", "url": "http://docs.example.org/0", "date": "2021-01-01"}
        file.write(json.dumps(newer) + "\n")
    for i in range(40):
        paragraphs = "".join(f"<p>{line}</p>" for line in prose(100 + i).split("\n"))
        (directory / f"page{i:02d}.html").write_text(f"<body><nav>Home | About</nav><main>{paragraphs}<p>Read all of our terms before you go on.</p></main></body>")
    (directory / "copy.txt").write_text(prose(5))
    (directory / "french.txt").write_text(FRENCH)
    (directory / "rubbish.txt").write_bytes(bytes(range(256)) * 20)
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-p]*.py")):  # about 3 MB: several tasks
        (directory / source.name).write_bytes(source.read_bytes())
    return directory


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory) -> Path:
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    curate(configured(inputs, workdir))
    return workdir


def test_there_are_several_tasks(finished):
    assert json.loads((finished / "phases" / "tasks.json").read_text())["read"] >= 3


def clean(workdir: Path) -> dict[str, dict]:
    return {row["id"]: row for file in sorted((workdir / "clean").rglob("*.parquet")) for row in rows(file)}


def test_what_comes_out(inputs, finished):
    documents = clean(finished)
    by_category = {name: [doc for doc in documents.values() if doc["category"] == name] for name in ("general", "code", "multilingual")}
    assert all(by_category.values())
    assert {doc["language"] for doc in by_category["multilingual"]} == {"fr"}
    assert {Path(doc["source"]).name for doc in by_category["code"]} >= {"bisect.py", "heapq.py"}
    assert "doc-0" not in documents and "newer" in documents  # an older version of the same URL
    assert "doc-5" not in documents and f"{inputs / 'copy.txt'}#0" in documents  # the first of near duplicates
    assert "jane.doe" not in documents["newer"]["text"] and "write to" in documents["newer"]["text"]
    pages = [doc["text"] for doc in documents.values() if doc["source"].endswith(".html")]
    assert len(pages) == 40 and not any("Home" in text or "our terms" in text for text in pages)  # a menu, and a line of all pages
    fates = [json.loads(line) for file in sorted((finished / "dropped").rglob("*.jsonl")) for line in file.read_text().splitlines()]
    reasons = {(fate["block"], fate["reason"]) for fate in fates}
    assert ("duplicate_urls", "newer_version_exists") in reasons and ("near_duplicates", "near_duplicate") in reasons
    assert len({fate["id"] for fate in fates} & set(documents)) == 0  # each document has one fate
    assert "near_duplicate" in inspect(finished)


def test_streams_hold_the_clean_text_and_train_reads_them(finished):
    documents = clean(finished)
    for category in ("general", "code"):
        num_bytes = sum(len(doc["text"].encode()) for doc in documents.values() if doc["category"] == category)
        assert sum(TokenStream(finished / "streams" / category / split).num_bytes for split in ("train", "validation")) == num_bytes
    assert (finished / "streams" / "multilingual-fr" / "train").is_dir()
    config = read_command_line(RunConfig, ["--config", str(finished / "train.py")])
    assert {Path(path).name for path in config.data.sources} == {"general", "code"}  # of one document, nothing is left to validate on
    streams = open_streams(config.data, "train")
    assert load_data_tokenizer(config.data, streams).vocab_size <= config.model.resolve().vocab_size


def test_a_finished_run_does_nothing_again(inputs, finished):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*.parquet")}
    curate(configured(inputs, finished))
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*.parquet")} == before


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_bytes(inputs, finished, tmp_path, seed):
    chance, workdir = random.Random(seed), tmp_path / "run"
    config = tmp_path / "config.py"
    config.write_text(f"def get_config():\n    return {SETTINGS | {'workers': 2}}\n")
    command = [sys.executable, "-m", "herd_jax.curate", "--config", str(config), f"--config.workdir={workdir}", f"--config.input={inputs}"]
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        while not (workdir / "phases").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.uniform(1, 8))
        if chance.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # its workers notice and end by themselves
        process.wait()
    curate(configured(inputs, workdir))
    assert results(workdir) == results(finished)


def test_other_settings_and_other_input_are_refused(inputs, finished, tmp_path):
    with pytest.raises(UserError, match=r"deduplication.rows is 4 and was 8\): go on with the old"):
        curate(configured(inputs, finished, deduplication={"rows": 4}))
    (tmp_path / "more.txt").write_text("more")
    with pytest.raises(UserError, match="made from other input, such as .*more.txt"):
        curate(configured(inputs, finished, input=(str(inputs), str(tmp_path))))


def test_input_that_changed_in_place_is_refused(inputs, tmp_path):
    """Though it is as long as it was; touching it does not matter."""
    source = tmp_path / "in" / "text.txt"
    source.parent.mkdir()
    source.write_text((inputs / "copy.txt").read_text())
    curate(configured(tmp_path / "in", tmp_path / "run"))
    os.utime(source)
    curate(configured(tmp_path / "in", tmp_path / "run"))
    text = source.read_text()
    source.write_text(text[:-3] + "xyz")
    with pytest.raises(UserError, match="made from other input, such as .*text.txt: restore it"):
        curate(configured(tmp_path / "in", tmp_path / "run"))


def test_damaged_input_is_named_and_the_rest_is_done(inputs, tmp_path):
    good, bad = tmp_path / "in" / "good.txt", tmp_path / "in" / "bad.parquet"
    good.parent.mkdir()
    good.write_text((inputs / "copy.txt").read_text())
    bad.write_bytes(b"PAR1 this is none")
    with pytest.raises(UserError, match="the run is done, but 1 inputs were damaged or unreadable, at least in part: .*bad.parquet"):
        curate(configured(tmp_path / "in", tmp_path / "run"))
    assert [Path(doc["source"]) for doc in clean(tmp_path / "run").values()] == [good]


def test_a_failing_task_is_named_and_what_is_done_stays(inputs, tmp_path):
    with pytest.raises(UserError, match="no tokenizer of 99999999 tokens can be trained here"):
        curate(configured(inputs, tmp_path / "run", tokenizer="99999999"))
    assert len(list((tmp_path / "run" / "phases" / "read" / "completions").iterdir())) >= 3


SBATCH = """#!{python}
# Runs the tasks of a job script at once, as a cluster would later.
import os, re, subprocess, sys
script = sys.stdin.read() if sys.argv[-1].startswith("-") else open(sys.argv[-1]).read()
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
array = re.search(r"--array=0-(\\d+)", script)
for task in range(int(array[1]) + 1 if array else 0):
    subprocess.run(["bash", "-c", script], check=True, env=os.environ | {{"SLURM_ARRAY_TASK_ID": str(task), "RUN_OFFSET": "0", "SLURM_JOB_ID": "1", "SLURM_NODELIST": "here"}})
print("Submitted batch job 7")
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo localhost
"""


def test_slurm_submits_a_chain_of_jobs_that_give_the_same_bytes(inputs, tmp_path, monkeypatch):
    # No cluster here: what stands in for it runs each job's script when it is submitted.
    tools, few = tmp_path / "tools", tmp_path / "in"
    tools.mkdir()
    few.mkdir()
    for name in ("docs.jsonl.gz", "bisect.py", "french.txt"):
        (few / name).write_bytes((inputs / name).read_bytes())
    sbatch = SBATCH.format(python=sys.executable, log=str(tmp_path / "log"))
    for name, text in (("sbatch", sbatch), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    said = curate(configured(few, tmp_path / "run", executor="slurm", cluster={"partition": "cpu"}))
    assert "submitted" in said
    curate(configured(few, tmp_path / "here"))
    assert results(tmp_path / "run") == results(tmp_path / "here")
    assert "--dependency=afterok:7" in (tmp_path / "log").read_text()


def test_slurm_without_a_cluster_is_refused(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no sbatch on this machine"):
        curate(configured(inputs, tmp_path / "run", executor="slurm"))
    with pytest.raises(UserError, match="executor is 'spark': it must be one of local, slurm, ray"):
        curate(configured(inputs, tmp_path / "other", executor="spark"))
