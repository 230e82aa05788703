"""Disks that cannot take a checkpoint, full, without inodes, read-only or not there: one sentence, and nothing is lost."""

import logging
import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest
from saved_states import CONFIG, abstract, assert_same_bits, make_state

from herd_jax.errors import PEER_LOST, FailedAlone, UserError
from herd_jax.training.checkpoints import orbax_storage
from herd_jax.training.checkpoints.checkpoint import Checkpointer, SaveFailed


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small disk takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("filled", ["before", "meanwhile"])
def test_a_full_disk_is_one_sentence_and_loses_nothing(small_disk, capfd, caplog, monkeypatch, filled):
    if filled == "meanwhile":  # the disk had room when the save began
        monkeypatch.setattr(orbax_storage, "require_room", lambda *_: None)
    small, large = {"w": jnp.arange(1000.0)}, {"w": jax.random.normal(jax.random.key(0), (2_000_000,))}
    sentence = f"checkpoint in {small_disk}/checkpoints .no space is left.: .*the earlier checkpoints are intact"
    checkpointer = Checkpointer(small_disk / "checkpoints", keep=1)
    checkpointer.save(1, small, CONFIG, {})
    for step, surface in ((2, checkpointer.wait), (3, lambda: checkpointer.save(4, small, CONFIG, {}))):
        with pytest.raises(SaveFailed, match=sentence):
            checkpointer.save(step, large, CONFIG, {})
            assert filled == "meanwhile"
            surface()
        assert checkpointer.steps() == [1]
    assert_same_bits(checkpointer.restore(abstract(small)).state, small)
    checkpointer.save(5, small, CONFIG, {})
    checkpointer.wait()
    assert checkpointer.steps() == [5]  # what failed saves would have deleted is deleted now
    with pytest.raises(SaveFailed, match=sentence):
        checkpointer.save(6, large, CONFIG, {})
        assert filled == "meanwhile"
        checkpointer.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    printed = capfd.readouterr().err.splitlines()
    assert all("is half-written" in line for line in printed)


@pytest.mark.parametrize("fault, problem", [("inodes", "no inode is left: remove files"), ("read-only", "Read-only file system")])
def test_a_disk_without_inodes_or_without_permission_loses_nothing(small_disk, fault, problem):
    if fault == "inodes":
        subprocess.run(["mount", "-o", "remount,nr_inodes=300", small_disk], check=True)
    state = {"w": jnp.arange(1000.0)}
    checkpointer = Checkpointer(small_disk / "checkpoints", keep=1)
    checkpointer.save(1, state, CONFIG, {})
    checkpointer.wait()
    if fault == "inodes":
        for i in range(250):
            (small_disk / str(i)).touch()
    else:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SaveFailed, match=problem):
        checkpointer.save(2, state, CONFIG, {})
    assert checkpointer.steps() == [1]
    if fault == "inodes":
        for i in range(250):
            (small_disk / str(i)).unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    checkpointer.save(3, state, CONFIG, {})
    checkpointer.wait()
    assert checkpointer.steps() == [3]


def test_a_disk_that_one_process_alone_found_full(small_disk, monkeypatch):
    """The others, in Orbax's barrier, do not come to ours."""

    def nobody_comes(flag, what, seconds=None):
        if flag:
            raise UserError("another process did not come")
        return False

    checkpointer = Checkpointer(small_disk / "checkpoints", keep=1)
    monkeypatch.setattr(orbax_storage, "require_room", lambda *_: None)
    checkpointer.save(1, {"w": jax.random.normal(jax.random.key(0), (2_000_000,))}, CONFIG, {})
    monkeypatch.setattr(orbax_storage, "on_any", nobody_comes)
    with pytest.raises(FailedAlone, match="no space is left.* the other processes wait for this one") as raised:
        checkpointer.wait()
    assert raised.value.status == PEER_LOST
    checkpointer.close()  # does not raise another error in its place


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    checkpointer = Checkpointer(tmp_path / "file" / "checkpoints", keep=1)
    with pytest.raises(UserError, match="cannot write a checkpoint in .*Not a directory"):
        checkpointer.save(1, make_state(), CONFIG, {})
    checkpointer.close()
