"""The launch files: what can be checked of them without a cluster."""

import subprocess
from pathlib import Path

import pytest
import yaml

from herd_jax.machines.place import FIRST_PORT, find_place

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")))
def test_scripts_parse(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("arguments", [[], ["--config"], ["0"]])
def test_local_processes_need_a_number(arguments):
    ran = subprocess.run(["bash", LAUNCH / "local_multiprocess.sh", *arguments], capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.startswith("error: give the number of processes first")


def test_slurm_runs_a_task_a_node_and_ends_in_the_same_command():
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --ntasks-per-node=1" in text and '-m herd_jax.train "$@"' in text


def test_kubernetes_gives_each_pod_its_place():
    jobset = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][:4] == ["python", "-m", "herd_jax.train", "--config"]
    told = {"JOBSET_NAME": jobset["metadata"]["name"], "REPLICATED_JOB_NAME": replicated["name"], "JOB_COMPLETION_INDEX": "3"}
    place = find_place({each["name"]: each.get("value") or told[each["name"]] for each in container["env"]} | told)
    assert (place.num_processes, place.process_id) == (job["parallelism"], 3)
    assert place.coordinator == f"herd-host-0-0.herd:{FIRST_PORT}"
    assert [port["containerPort"] for port in container["ports"]] == [FIRST_PORT, FIRST_PORT + 1]
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
