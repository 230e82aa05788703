"""The check of hosts before a run: who is named, and the table. Runs of it with several processes are in test_processes.py."""

import dataclasses

import pytest

from herd_jax.errors import UserError
from herd_jax.mesh import MeshConfig
from herd_jax.reliability.preflight import Row, preflight, problems, table


def rows(**last):
    """Of four hosts with the noise of measurements; the last one is different in `last`."""
    found = [Row(i, f"gpu{i}", "8 x H100", 80.0, 700.0 + i, {"tp": 300.0 - i, "dp": 40.0}, 0.002 * i, "") for i in range(4)]
    return [*found[:-1], dataclasses.replace(found[-1], **last)]


def test_noise_is_no_problem():
    assert problems(rows()) == []


@pytest.mark.parametrize(
    "last, words",
    [
        ({"devices": "7 x H100"}, "process 3 on gpu3 has 7 x H100 where most have 8 x H100"),
        ({"memory": 60.0}, "process 3 on gpu3 has 60 GB of memory where the median is 80"),
        ({"matmul": 500.0}, "process 3 on gpu3 has 500 TFLOP/s of matmul where the median is 700"),
        ({"all_reduce": {"tp": 300.0, "dp": 20.0}}, "process 3 on gpu3 has 20 GB/s of all-reduce over dp where the median is 40"),
        ({"clock": -3.0}, "the clock of process 3 on gpu3 is 3.0 s behind"),
        ({"path": "/runs cannot be written (Read-only file system)"}, "process 3 on gpu3: /runs cannot be written (Read-only file system)"),
    ],
)
def test_the_outlier_is_named(last, words):
    (problem,) = problems(rows(**last))
    assert problem.startswith(words)


def test_fake_devices_are_not_judged_by_their_speed():
    assert problems(rows(matmul=1.0, memory=1.0), judges_rates=False) == []


def test_table_has_a_row_a_process():
    lines = table(rows()).splitlines()
    assert len(lines) == 5 and "all-reduce tp GB/s" in lines[0] and lines[4].split()[:2] == ["3", "gpu3"]


def test_this_host(tmp_path, capsys):
    preflight(MeshConfig(tp=2, pp=2), str(tmp_path / "run"))
    header, row = capsys.readouterr().out.splitlines()
    assert "all-reduce dp GB/s" in header and row.startswith("0 ") and row.endswith("ok")
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"process 0 on .*: {tmp_path}/file/run cannot be written"):
        preflight(MeshConfig(), str(tmp_path / "file" / "run"))
