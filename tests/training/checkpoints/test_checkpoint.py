"""Checkpoints: any mesh restores what any mesh saved, and damage of every kind is found, named and stepped over."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from saved_states import CONFIG, abstract, assert_same_bits, make_state, mesh, place

from herd_jax.errors import FailedAlone, Miscomputed, UserError
from herd_jax.training.checkpoints import checksums, orbax_storage
from herd_jax.training.checkpoints.checkpoint import CheckpointConfig, Checkpointer


def save_steps(directory, steps, keep=10, val_losses=None):
    checkpointer = Checkpointer(directory, keep)
    for step in steps:
        checkpointer.save(
            step, place(make_state(step), mesh(8, (4, 2)), P("x", "y")), CONFIG, {"step": step}, (val_losses or {}).get(step)
        )
    checkpointer.close()
    return checkpointer


@pytest.fixture
def two_steps(saved, tmp_path):
    """A directory of its own with the checkpoints of steps 1 and 2."""
    shutil.copytree(saved, tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(directory, [1, 2])
    return directory


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_any_mesh_restores_what_any_mesh_saved(saved, num_devices):
    target = abstract(place(make_state(), mesh(num_devices), P(None, "x"), P("x")))
    checkpointer = Checkpointer(saved, keep=10)
    restored = checkpointer.restore(target)
    assert (restored.step, restored.config, restored.position) == (2, CONFIG, {"step": 2})
    assert_same_bits(restored.state, make_state(2))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored.state) == jax.tree.map(lambda leaf: leaf.sharding, target)
    assert checkpointer.config() == CONFIG and checkpointer.steps() == [1, 2]
    checkpointer.close()


def test_no_checkpoints(tmp_path):
    checkpointer = Checkpointer(tmp_path / "none", keep=1)
    assert checkpointer.steps() == [] and checkpointer.config() is None
    assert checkpointer.restore(abstract(make_state())) is None
    checkpointer.close()
    assert not (tmp_path / "none").exists()


def test_arrays_may_be_donated_once_save_returns(tmp_path):
    state = {f"w{index}": jnp.full((512, 512), index, jnp.float32) for index in range(8)}
    expected, target = jax.tree.map(np.array, state), abstract(state)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, state, {}, {})
    jax.block_until_ready(overwrite(overwrite(state)))
    assert_same_bits(checkpointer.restore(target).state, expected)
    checkpointer.close()


@pytest.mark.parametrize(
    "val_losses, kept", [({}, [4, 5]), ({1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan")}, [2, 4, 5]), ({3: 1.0, 1: 1.0}, [3, 4, 5])]
)
def test_the_newest_and_the_best_are_kept(tmp_path, val_losses, kept):
    save_steps(tmp_path, [1, 2, 3], 2, val_losses)
    assert save_steps(tmp_path, [4, 5], 2, val_losses).steps() == kept  # another process knows the best, too


@pytest.mark.parametrize("spec", [P("x", "y"), P("y"), P(None, ("x", "y")), P()])
def test_checksums_do_not_depend_on_sharding(spec):
    state = {name: make_state()[name] for name in ("half", "counts", "mask", "big")}
    assert checksums.checksums(place(state, mesh(8, (4, 2)), spec)) == checksums.checksums(state)


def test_checksums_against_numpy_and_every_single_flipped_bit():
    bits = np.random.default_rng(0).integers(0, 2**32, (3, 5), dtype=np.uint32)
    weights = np.arange(bits.size, dtype=np.uint32).reshape(bits.shape) * 2 + 1
    checksum = int(checksums.checksum(jnp.asarray(bits.view(np.float32))))
    assert checksum == int((bits * weights).sum(dtype=np.uint32))
    for element in np.ndindex(bits.shape):
        for bit in (0, 9, 31):
            flipped = bits.copy()
            flipped[element] ^= np.uint32(1 << bit)
            assert int(checksums.checksum(jnp.asarray(flipped.view(np.float32)))) != checksum
    assert int(checksums.checksum(jnp.asarray(bits[::-1].view(np.float32)))) != checksum  # elements that changed places


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 16
    path.write_bytes(data[: {"truncate": len(data) // 2, "empty": 0, "flip": len(data)}[how]])


def restore_around_damage(directory, capfd):
    """Restores, checks that nothing wrong was believed, then saves step 2 again; returns the step and what was printed."""
    target = abstract(place(make_state(), mesh(8), P("x")))
    checkpointer = Checkpointer(directory, keep=10)
    restored = checkpointer.restore(target)
    assert_same_bits(restored.state, make_state(restored.step))
    assert restored.position == {"step": restored.step} and restored.config == CONFIG
    if restored.step == 1:
        checkpointer.save(2, place(make_state(2), mesh(8), P("x")), CONFIG, {"step": 2})
    checkpointer.close()
    assert checkpointer.steps() == [1, 2]
    return restored.step, capfd.readouterr().err


def files_of(step_directory):
    return sorted(path.relative_to(step_directory) for path in step_directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("how", ["truncate", "empty", "flip"])
def test_damage_to_any_file_is_found_or_harmless(saved, tmp_path, capfd, how):
    stepped_over = []
    for index, file in enumerate(files_of(saved / "2")):
        directory = tmp_path / str(index) / "checkpoints"
        shutil.copytree(saved, directory)
        damage(directory / "2" / file, how)
        step, printed = restore_around_damage(directory, capfd)
        if step == 1:
            stepped_over.append(file)
            (line,) = printed.splitlines()
            assert line.startswith("warning: the checkpoint of step 2 is unreadable (") and line.endswith("using step 1")
            assert (directory.parent / "checkpoints.corrupt-2" / file).exists()
        else:
            assert printed == ""
    largest = max(files_of(saved / "2"), key=lambda file: (saved / "2" / file).stat().st_size)
    assert {largest, Path("record/metadata"), Path("state/_METADATA"), Path("state/manifest.ocdbt")} <= set(stepped_over)


@pytest.mark.parametrize(
    "file", ["_CHECKPOINT_METADATA", "record", "record/metadata", "state", "state/_METADATA", "state/manifest.ocdbt"]
)
def test_missing_files(two_steps, capfd, file):
    path = two_steps / "2" / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    step, printed = restore_around_damage(two_steps, capfd)
    assert step == (2 if file == "_CHECKPOINT_METADATA" else 1)
    assert len(printed.splitlines()) == 2 - step


def test_a_record_that_still_parses_but_changed(two_steps, capfd):
    record = two_steps / "2" / "record" / "metadata"
    record.write_text(record.read_text().replace('"step": 2', '"step": 3'))
    step, printed = restore_around_damage(two_steps, capfd)
    assert step == 1 and "its record changed since it was saved" in printed


def test_config_comes_from_the_newest_readable_record(two_steps):
    damage(two_steps / "2" / "record" / "metadata", "truncate")
    checkpointer = Checkpointer(two_steps, keep=10)
    assert checkpointer.config() == CONFIG and checkpointer.steps() == [1, 2]
    checkpointer.close()


def test_the_same_step_damaged_twice_is_set_aside_twice(two_steps, capfd):
    for name in ("checkpoints.corrupt-2", "checkpoints.corrupt-2.again"):
        damage(two_steps / "2" / "record" / "metadata", "empty")
        assert restore_around_damage(two_steps, capfd)[0] == 1
        assert (two_steps.parent / name).is_dir()


def test_damage_that_one_process_alone_found(two_steps, monkeypatch):
    """The others, in Orbax's barrier, do not come to ours; what is set aside is gone at the next start, but never the last one."""

    def nobody_comes(flag, what, seconds=None):
        if flag:
            raise UserError("another process did not come")
        return False

    monkeypatch.setattr(orbax_storage, "on_any", nobody_comes)
    state = abstract(place(make_state(), mesh(1), P()))
    damage(two_steps / "2" / "record" / "metadata", "truncate")
    with pytest.raises(FailedAlone, match="step 2 is unreadable .* the one before"):
        Checkpointer(two_steps, keep=2).restore(state)
    assert not (two_steps / "2").exists() and two_steps.with_name(f"{two_steps.name}.corrupt-2").exists()
    assert Checkpointer(two_steps, keep=2).restore(state).step == 1
    damage(two_steps / "1" / "record" / "metadata", "truncate")
    with pytest.raises(UserError, match="no checkpoint in .* is readable"):
        Checkpointer(two_steps, keep=2).restore(state)
    assert (two_steps / "1").exists()


def test_all_unreadable_is_an_error_that_moves_nothing(two_steps):
    for step in ("1", "2"):
        damage(two_steps / step / "record" / "metadata", "empty")
    checkpointer = Checkpointer(two_steps, keep=10)
    with pytest.raises(
        UserError, match="no checkpoint in .* is readable .step 2: .*: bring back a good copy, or move the directory away"
    ):
        checkpointer.restore(abstract(make_state()))
    assert checkpointer.steps() == [1, 2] and checkpointer.config() is None
    checkpointer.close()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"big": jnp.zeros((64, 128))}, r"\['big'\] is float32\[64, 256\] in the checkpoint and float32\[64, 128\] in the model"),
        ({"half": jnp.zeros((24, 8))}, r"\['half'\] is bfloat16\[24, 8\] in the checkpoint and float32\[24, 8\] in the model"),
        ({"more": jnp.zeros(3)}, r"\['more'\] is absent in the checkpoint and float32\[3\] in the model"),
        ({"mask": None}, r"\['mask'\] is bool\[8, 8\] in the checkpoint and absent in the model"),
    ],
)
def test_another_model_is_the_users_error(saved, change, message):
    checkpointer = Checkpointer(saved, keep=10)
    with pytest.raises(UserError, match=f"checkpoint of step 2 does not fit this model: {message}"):
        checkpointer.restore(abstract(place({**make_state(), **change}, mesh(8), P())))
    assert checkpointer.steps() == [1, 2]
    checkpointer.close()


def test_a_device_error_is_not_damage(two_steps, monkeypatch):
    checkpointer = Checkpointer(two_steps, keep=10)
    restore = checkpointer._manager.restore

    def lose_device(step, args):
        if "state" in args:
            raise jax.errors.JaxRuntimeError("INTERNAL: device lost")
        return restore(step, args=args)

    monkeypatch.setattr(checkpointer._manager, "restore", lose_device)
    with pytest.raises(jax.errors.JaxRuntimeError):
        checkpointer.restore(abstract(make_state()))
    assert checkpointer.steps() == [1, 2]
    checkpointer.close()


def test_a_half_written_checkpoint_is_named_and_its_space_freed(two_steps, capfd):
    leftover = two_steps / "7.orbax-checkpoint-tmp"
    shutil.copytree(two_steps / "2", leftover)
    checkpointer = Checkpointer(two_steps, keep=10)
    assert checkpointer.restore(abstract(place(make_state(), mesh(1), P()))).step == 2
    assert (
        capfd.readouterr().err == "warning: the checkpoint of step 7 is half-written (its save did not finish): it is ignored\n"
    )
    assert leftover.exists()  # a reader deletes nothing
    checkpointer.save(3, make_state(3), CONFIG, {"step": 3})
    checkpointer.close()
    assert checkpointer.steps() == [1, 2, 3] and not leftover.exists()


def test_a_save_that_is_written_at_once_makes_the_older_go(tmp_path, monkeypatch):
    """The background may be done with the files, not yet with their directory's name, before the main thread asks what may go."""
    judged = set()
    should_preserve, note_written = orbax_storage.NewestAndBest.should_preserve, orbax_storage.NewestAndBest.note_written

    def judge_when_written(policy, checkpoints, *, context):
        while checkpoints[-1].step not in policy.sizes:
            time.sleep(0.001)
        kept = should_preserve(policy, checkpoints, context=context)
        judged.add(checkpoints[-1].step)
        return kept

    def note_and_wait(policy, step):
        directory = note_written(policy, step)
        while step not in judged:
            time.sleep(0.001)
        return directory

    monkeypatch.setattr(orbax_storage.NewestAndBest, "should_preserve", judge_when_written)
    monkeypatch.setattr(orbax_storage.NewestAndBest, "note_written", note_and_wait)
    checkpointer = save_steps(tmp_path, [1, 2], keep=1)
    assert checkpointer.steps() == [2]


def test_copies_that_are_not_alike_are_not_saved(tmp_path):
    """A bit flipped in the memory of one device: a checkpoint would keep it, with a checksum that fits."""
    whole = NamedSharding(mesh(8), P())
    copies = [jax.device_put(np.arange(4.0, dtype=np.float32) + (i == 3), device) for i, device in enumerate(whole.mesh.devices.flat)]
    unlike = {"w": jax.make_array_from_single_device_arrays((4,), whole, copies)}
    checkpointer = Checkpointer(tmp_path, keep=2)
    checkpointer.save(1, {"w": jax.device_put(np.arange(4.0, dtype=np.float32), whole)}, CONFIG, {})
    with pytest.raises(Miscomputed, match="the copies of .'w'. that devices hold are not alike.* start again from the checkpoint before"):
        checkpointer.save(2, unlike, CONFIG, {})
    assert checkpointer.steps() == [1]


def test_what_one_process_alone_reads_wrongly_no_process_takes(tmp_path, monkeypatch, capfd):
    """A bit that flipped in one copy of a leaf, just before a save of private checkpoints, was found by that process alone."""
    save_steps(tmp_path, [1, 2])
    checkpointer, found = Checkpointer(tmp_path, keep=2), iter([True, False])
    monkeypatch.setattr(orbax_storage, "on_any", lambda flag, what, seconds=None: next(found) if what == "verifying a checkpoint" else flag)
    assert checkpointer.restore(abstract(place(make_state(), mesh(8), P("x")))).step == 1
    assert "the checkpoint of step 2 is unreadable (another process read data that changed)" in capfd.readouterr().err


def test_a_process_killed_while_it_saves_leaves_the_one_before(tmp_path):
    script = """
    import os, signal, sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from herd_jax.training.checkpoints.checkpoint import Checkpointer
    checkpointer = Checkpointer(sys.argv[1], keep=1)
    checkpointer.save(1, {"w": jnp.arange(10)}, {"a": 1}, {})
    checkpointer.wait()
    checkpointer.save(2, {"w": jax.random.normal(jax.random.key(0), (2**25,))}, {"a": 2}, {})
    while not list(Path(sys.argv[1]).glob("2*/state*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path], env=environment, timeout=120)
    assert result.returncode == -signal.SIGKILL
    checkpointer = Checkpointer(tmp_path, keep=1)
    assert checkpointer.steps() == [1] and checkpointer.config() == {"a": 1}
    assert_same_bits(checkpointer.restore(abstract({"w": jnp.arange(10)})).state, {"w": jnp.arange(10)})
    checkpointer.close()


@pytest.mark.parametrize("field", ["every_steps", "keep", "local_every_steps"])
def test_config_is_validated(field):
    with pytest.raises(UserError, match=f"checkpoint.{field} is 0: set it to 1 or more"):
        CheckpointConfig(**{field: 0})
