"""A save counts once it was read back: what cannot be restored is no checkpoint, and nothing older is deleted for it."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from orbax.checkpoint._src.serialization import ocdbt_utils

from herd_jax.errors import UserError
from herd_jax.training.checkpoints.checkpoint import Checkpointer, SaveFailed
from herd_jax.training.checkpoints.read_back import require_readable


def make_state():
    """Arrays in chunks, scalars, zeros (which some stores leave out), types that only jax knows."""
    half, mask = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((2, 2), bool)
    return {"zeros": jnp.zeros((3, 1024, 512)), "step": jnp.int32(0), "nested": (half, mask, jnp.uint8(3))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(directory, keep=2)
    checkpointer.save(1, make_state(), {}, {})
    checkpointer.close()
    return directory / "1"


def test_what_was_saved_is_readable(saved):
    require_readable(saved)


def remove_key(directory, key):
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/state/"}).result()
    assert key in store.list().result()
    store.write(key, None).result()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda step: remove_key(step, b"zeros/1.0.0"), "chunk 1.0.0 of zeros is missing"),
        (lambda step: remove_key(step, b"step/0"), "chunk 0 of step is missing"),
        (lambda step: remove_key(step, b"nested.0/.zarray"), "4 arrays"),
        (lambda step: (step / "state" / "manifest.ocdbt").write_bytes(b""), "manifest"),
        (lambda step: shutil.rmtree(step / "state"), "0 arrays"),
        (lambda step: (step / "record" / "metadata").unlink(), "No such file"),
        (lambda step: (step / "record" / "metadata").write_text("{}"), "record"),
        (lambda step: (step / "record" / "metadata").write_bytes((step / "record" / "metadata").read_bytes()[:-9]), ""),
    ],
)
def test_what_cannot_be_restored(damage, words, saved, tmp_path):
    copy = tmp_path / "1"
    shutil.copytree(saved, copy)
    damage(copy)
    with pytest.raises(OSError, match=f"cannot be read back: .*({words})"):
        require_readable(copy)


@pytest.mark.parametrize("private", [False, True])
def test_a_save_that_orbax_calls_good_and_nobody_can_read(private, tmp_path, monkeypatch, capfd):
    """Orbax skips the index of the arrays, with a warning, where it does not find its own files."""
    state = {"a": jnp.arange(12.0).reshape(3, 4)}
    checkpointer = Checkpointer(tmp_path, keep=1, private=private)
    checkpointer.save(1, state, {}, {})
    checkpointer.wait()

    async def skip(*args, **kwargs):
        pass

    with monkeypatch.context() as broken:
        broken.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", skip)
        checkpointer.save(2, state, {}, {})
        with pytest.raises(SaveFailed, match="cannot be read back"):
            checkpointer.wait()
    assert checkpointer.steps() == [1]
    restored = checkpointer.restore(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state))
    np.testing.assert_array_equal(restored.state["a"], state["a"])
    checkpointer.save(3, state, {}, {})
    checkpointer.close()
    assert checkpointer.steps() == [3]


@pytest.mark.parametrize("name", ["lr[3e-3]", "a*b/run", "what?", "[x]/deep/er"])
def test_paths_that_orbax_takes_for_patterns(name, tmp_path):
    with pytest.raises(UserError, match="takes for a pattern: choose another path"):
        Checkpointer(tmp_path / name, keep=1)


@pytest.mark.parametrize("name", ["a]b", "{x}", "lr=3e-3, b (2)", "ü", "%20", "a'b\"c", "#1", "~", "$HOME"])
def test_other_odd_paths_hold_checkpoints(name, tmp_path):
    checkpointer = Checkpointer(tmp_path / name, keep=1)
    checkpointer.save(1, {"a": jnp.arange(3.0)}, {}, {})
    checkpointer.close()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restored = Checkpointer(tmp_path / name, keep=1).restore({"a": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding)})
    assert restored.step == 1
