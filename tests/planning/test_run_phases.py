"""A run is planned from its own config: each phase of its ramp and of its stages, with flags in place of what it says."""

import json
from pathlib import Path

import pytest
from run_configs import config, phases

from herd_jax import plan
from herd_jax.config import read_command_line
from herd_jax.errors import UserError
from herd_jax.planning.run_phases import run_phases
from herd_jax.training.config import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def read(name):
    return read_command_line(RunConfig, ["--config", str(CONFIGS / f"{name}.py")])


def test_the_405b_is_the_layout_of_table_4():
    """The last phase is what --tp 8 --pp 16 --dp 64 --batch-per-dp 32 says, interleaved in 8 chunks; all of 15.6T tokens."""
    found = run_phases(read("llama3_405b"), "h100", {}, {})
    job = found[-1].job
    assert [(phase.job.seq_len, phase.job.batch_per_dp, phase.job.micro_batch_size) for phase in found] == [(4096, 16, 1), (8192, 16, 1), (8192, 32, 1)]
    assert (job.tp, job.cp, job.pp, job.dp, job.pipeline.schedule, job.pipeline.num_chunks) == (8, 1, 16, 64, "interleaved", 8)
    assert sum(phase.tokens for phase in found) == pytest.approx(15.6e12, rel=1e-6) and found[0].tokens >= 252_000_000


def test_stages_have_their_own_meshes():
    found = run_phases(read("llama3_405b_long_context"), "h100", {}, {})
    assert [phase.job.cp for phase in found] == [1, 1, 1, 2, 4, 8, 8, 16, 16] and found[-1].job.seq_len == 131_072
    assert all(phase.job.num_devices == 16_384 for phase in found)


def test_flags_override_the_config():
    run = config(train__phases=phases(), train__remat="layer", mesh={"tp": 2, "dp": 4}, train__num_steps=100)
    job = run_phases(run, "h100", {"dp": 2, "gather": "layer"}, {"overlap": True})[-1].job
    assert (job.tp, job.dp, job.batch_per_dp, job.remat, job.gather, job.pipeline.overlap) == (2, 2, 4, "layer", "layer", True)


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(UserError, match="mesh.dp is 0.*: say with --dp"):
        run_phases(config(mesh={}), "h100", {}, {})
    with pytest.raises(UserError, match="a batch of 8 sequences does not divide by dp 3"):
        run_phases(config(), "h100", {"dp": 3}, {})


def test_the_command_plans_a_run(capsys, tmp_path):
    plan.main.__wrapped__(["--config", str(CONFIGS / "llama3_8b.py"), "--json"])
    planned = json.loads(capsys.readouterr().out)
    last = planned["phases"][-1]
    assert len(planned["phases"]) == 3 and planned["num_devices"] == last["num_devices"] == 256
    assert planned["days"] / planned["budget_tokens"] == pytest.approx(last["days"] / last["budget_tokens"])
    with pytest.raises(UserError, match="--gpus goes with --search"):
        plan.main.__wrapped__(["--config", str(CONFIGS / "llama3_8b.py"), "--gpus", "8"])
    plan.main.__wrapped__(["--config", str(CONFIGS / "llama3_8b.py"), "--dp", "128", "--remat", "layer"])
    said = capsys.readouterr().out
    assert "128 x h100: tp 1, cp 1, pp 1, dp 128, micro-batch 2, remat layer, gather layer" in said and said.count("GB") > 4
