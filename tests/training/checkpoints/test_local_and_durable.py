"""Two tiers of checkpoints: the newest whole one of both is used, a failed save costs a warning, and no process waits for ever."""

import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import herd_jax
from herd_jax.errors import FailedAlone, UserError
from herd_jax.training.checkpoints import local_and_durable, orbax_storage
from herd_jax.training.checkpoints.checkpoint import CheckpointConfig, Checkpointer, SaveFailed
from herd_jax.training.checkpoints.local_and_durable import TieredCheckpointer


def make_state(step, spec=P("x"), size=64):
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    rows = jnp.arange(float(size * 8)).reshape(size, 8) + step
    return {"step": jax.device_put(jnp.int32(step), NamedSharding(mesh, P())), "w": jax.device_put(rows, NamedSharding(mesh, spec))}


def abstract(spec=P("x")):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), make_state(0, spec))


@pytest.fixture
def run(tmp_path):
    """Opens the run in tmp_path/NAME, whose local directory all runs share."""
    opened = []

    def open_run(name="run", keep=3):
        config = CheckpointConfig(every_steps=4, keep=keep, local_directory=str(tmp_path / "local"), local_every_steps=1)
        opened.append(TieredCheckpointer(tmp_path / name, config))
        return opened[-1]

    yield open_run
    for checkpointer in opened:
        checkpointer.close()


def save(checkpointer, step, durable, **size):
    return checkpointer.save(step, make_state(step, **size), {"a": 1}, {"step": step}, durable=durable)


def damage(step_directory):
    for path in step_directory.glob("state/**/d/*"):
        os.truncate(path, path.stat().st_size // 2)


def assert_restores(checkpointer, step, spec=P("x")):
    restored = checkpointer.restore(abstract(spec))
    assert restored.step == step and restored.position == {"step": step}
    chex.assert_trees_all_equal(restored.state, make_state(step))


def local_steps(tmp_path):
    return sorted(int(path.name) for path in (tmp_path / "local").glob("*/*"))


def test_the_newest_of_both_tiers_is_used_and_the_local_ones_are_bounded(run, tmp_path):
    first = run()
    for step in range(1, 8):
        assert save(first, step, durable=step == 4) > 0
    first.close()
    assert local_steps(tmp_path) == [6, 7]
    again = run()
    assert again.steps() == [4, 6, 7] and again.newest()[1]["position"] == {"step": 7}
    assert_restores(again, 7)
    save(again, 8, durable=True)
    again.close()
    assert_restores(run(), 8)


def test_damaged_ones_of_both_tiers_are_stepped_over_in_turn(run, tmp_path, capfd):
    first = run()
    for step, durable in ((3, True), (4, True), (5, False), (6, True), (7, False)):
        save(first, step, durable)
    first.close()
    (local,) = (tmp_path / "local").iterdir()
    for step_directory in (local / "7", tmp_path / "run" / "6", local / "5"):
        damage(step_directory)
        last = run()
        last.restore(abstract())
    assert_restores(last, 4)
    printed = capfd.readouterr().err
    for step, done, instead in ((7, "deleted", 6), (6, f"moved to {tmp_path}/run.corrupt-6", 5), (5, "deleted", 4)):
        assert f"the checkpoint of step {step} is unreadable (" in printed and f"): {done}, using step {instead}" in printed
    assert local_steps(tmp_path) == [] and (tmp_path / "run.corrupt-6").is_dir()


def test_local_checkpoints_of_another_run_are_not_seen(run, tmp_path):
    first = run()
    save(first, 4, durable=True)
    save(first, 5, durable=False)
    first.close()
    assert run("other").restore(abstract()) is None
    shutil.move(tmp_path / "run", tmp_path / "moved")  # another run in the same directory
    assert run().restore(abstract()) is None
    assert_restores(run("moved"), 5)


def test_local_checkpoints_of_another_mesh_give_way_to_the_durable_one(run, tmp_path, capfd):
    first = run()
    save(first, 1, durable=False)
    first.close()
    other = run()
    assert other.restore(abstract(P(None, "x"))) is None  # nothing durable was lost: it starts anew
    assert "step 1 is unreadable (other parts of the state belonged to this process): deleted, starting anew" in capfd.readouterr().err
    save(other, 4, durable=True)
    save(other, 5, durable=False)
    other.close()
    assert_restores(run(), 5)
    assert_restores(run(), 5)
    assert_restores(run(), 4, P(None, "x"))
    assert local_steps(tmp_path) == []


def test_retention_keeps_whole_ones_while_the_newest_is_damaged(tmp_path):
    checkpointer = Checkpointer(tmp_path / "run", keep=2)
    for step in (1, 2, 3, 4):
        checkpointer.save(step, make_state(step), {}, {"step": step})
        checkpointer.wait()
        if step == 2:
            damage(tmp_path / "run" / "2")
        assert checkpointer.steps() == {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [3, 4]}[step]  # 2 does not count as one of two
    damage(tmp_path / "run" / "4")
    checkpointer.close()
    again = Checkpointer(tmp_path / "run", keep=2)
    assert_restores(again, 3)
    again.close()


def disk_without_space(monkeypatch, checkpointer, tier):
    """Saves of the tier fail in the background, as on a full disk, while the returned list is not empty."""
    full = [True]
    written = getattr(checkpointer, tier)._policy.note_written

    def note_written(step):
        if full:
            raise OSError(28, "No space left on device")
        return written(step)

    monkeypatch.setattr(getattr(checkpointer, tier)._policy, "note_written", note_written)
    return full


def test_a_full_disk_costs_one_save(run, tmp_path, monkeypatch, capfd):
    checkpointer = run()
    save(checkpointer, 1, durable=True)
    checkpointer.wait()
    full = disk_without_space(monkeypatch, checkpointer, "_durable")
    save(checkpointer, 2, durable=True)
    save(checkpointer, 3, durable=True)
    checkpointer.wait()
    full.clear()
    save(checkpointer, 4, durable=True)
    checkpointer.wait()
    assert checkpointer.steps() == [1, 4] and not list((tmp_path / "run").glob("*tmp*"))  # what failed left no litter
    warning = f"warning: cannot write a checkpoint in {tmp_path}/run (no space is left): training goes on, the next save tries again"
    assert capfd.readouterr().err.splitlines() == [f"{warning}; the earlier checkpoints are intact"] * 2
    full.append(True)
    for step in range(5, 5 + local_and_durable.MAX_FAILURES):
        save(checkpointer, step, durable=True)
    with pytest.raises(UserError, match="the last 3 saves all failed: cannot write .* .no space is left.: mend that"):
        checkpointer.wait()
    assert checkpointer.steps() == [1, 4]


def test_the_last_save_of_a_run_must_not_fail(run, monkeypatch):
    checkpointer = run()
    disk_without_space(monkeypatch, checkpointer, "_durable")
    save(checkpointer, 1, durable=True)
    checkpointer.wait()
    with pytest.raises(UserError, match="no space is left"):
        checkpointer.close()


def test_local_failures_never_end_a_run(run, monkeypatch, capfd):
    checkpointer = run()
    disk_without_space(monkeypatch, checkpointer, "_local")
    for step in range(1, 3 + local_and_durable.MAX_FAILURES):
        save(checkpointer, step, durable=False)
    save(checkpointer, 9, durable=True)
    checkpointer.wait()
    assert checkpointer.steps() == [9] and len(capfd.readouterr().err.splitlines()) == 2 + local_and_durable.MAX_FAILURES


def test_a_disk_that_is_really_full(tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        checkpointer = TieredCheckpointer(disk / "run", CheckpointConfig(keep=1))
        save(checkpointer, 1, durable=True)
        save(checkpointer, 2, durable=True, size=2**18)  # 8 MiB
        save(checkpointer, 3, durable=True, size=2**18)
        save(checkpointer, 4, durable=True)
        checkpointer.close()
        assert checkpointer.steps() == [4] and capfd.readouterr().err.count("no space is left") == 2
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("ending, reported", [(FailedAlone("the others wait"), FailedAlone), (UserError("interrupted"), SaveFailed)])
def test_a_failed_save_is_told_at_the_end_unless_that_is_another_one(tmp_path, monkeypatch, ending, reported):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(orbax_storage, "require_room", full)
    with pytest.raises(reported), TieredCheckpointer(tmp_path / "run", CheckpointConfig()) as checkpointer:
        save(checkpointer, 1, durable=True)
        raise ending


SCRIPT = """
import resource, shutil, sys
from pathlib import Path
import jax, numpy as np
index, port, workdir, scene = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index, initialization_timeout=120)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from herd_jax.errors import UserError
from herd_jax.training.checkpoints import orbax_storage
from herd_jax.training.checkpoints.checkpoint import CheckpointConfig
from herd_jax.training.checkpoints.local_and_durable import TieredCheckpointer

mesh = Mesh(np.array(jax.devices()), ("x",))
def make(step):
    put = lambda array, spec: jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])
    return {"w": put(np.arange(64.0, dtype=np.float32).reshape(8, 8) + step, P("x")), "step": put(np.array(step, np.int32), P())}

abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), make(0))
open_run = lambda: TieredCheckpointer(workdir / "run", CheckpointConfig(local_directory=str(workdir / "local")))
own = lambda: next((workdir / "local").glob(f"*-{index}"))

def restores(step):
    restored = open_run().restore(abstract)
    assert restored.step == step, restored.step
    for name, leaf in make(step).items():
        for ours, theirs in zip(leaf.addressable_shards, restored.state[name].addressable_shards, strict=True):
            np.testing.assert_array_equal(ours.data, theirs.data)

if scene == "tiers":
    checkpointer = open_run()
    for step in (1, 2, 3, 4):
        checkpointer.save(step, make(step), {}, {}, durable=step == 1)
    checkpointer.wait()
    checkpointer.close()
    assert len(list(own().iterdir())) == 2
    restores(4)
    if index == 1:
        shutil.rmtree(own() / "4")  # a host that was replaced
    restores(3)
    assert [path.name for path in own().iterdir()] == ["3"]
    if index == 1:
        for path in own().glob("3/state/**/d/*"):
            path.write_bytes(path.read_bytes()[:10])
    restores(1)
    assert not list(own().iterdir())
elif scene == "one fails":  # its disk takes no large files
    orbax_storage.TIME_LIMIT_S = 30
    with open_run() as checkpointer:
        checkpointer.save(1, make(1), {}, {})
        checkpointer.wait()
        if index == 1:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        checkpointer.save(2, make(2), {}, {})
        checkpointer.wait()
        print("known", file=sys.stderr)
        if index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpointer.save(3, make(3), {}, {})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3], checkpointer.steps()
    restores(3)
else:  # a process that does not come
    orbax_storage.TIME_LIMIT_S = 5
    if index == 0:
        try:
            open_run().restore(abstract)
        except UserError as error:
            print(error, file=sys.stderr)
    orbax_storage.TIME_LIMIT_S = 100
    jax._src.distributed.global_state.client.wait_at_barrier("the end", 100_000)
print("done")
"""


def two_processes(tmp_path, scene):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment["PYTHONPATH"] = str(Path(herd_jax.__file__).parents[1])
    commands = [[sys.executable, "-c", textwrap.dedent(SCRIPT), str(index), port, str(tmp_path), scene] for index in (0, 1)]
    processes = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) for command in commands]
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, results, strict=True):
        assert process.returncode == 0 and out.endswith("done\n"), err
    return [err for _, err in results]


def test_a_local_checkpoint_needs_the_parts_of_all_processes(tmp_path):
    err = two_processes(tmp_path, "tiers")[0]
    assert "the checkpoint of step 3 is unreadable (another process cannot read it): deleted, using step 1" in err


def test_a_save_that_one_process_cannot_write_is_lost_for_all(tmp_path):
    ours, theirs = two_processes(tmp_path, "one fails")
    assert "(another process could not write it): training goes on, the next save tries again" in ours and ours.endswith("known\n")
    assert "another process" not in theirs and theirs.count("cannot write a checkpoint") == 1 and theirs.endswith("known\n")


def test_no_process_waits_for_ever(tmp_path):
    err = two_processes(tmp_path, "absent")[0]
    assert "another process did not come to" in err and "within 5 s" in err
