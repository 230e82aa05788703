"""Silent corruption: a device that computes wrongly is found and named, and one that does not is left alone."""

import dataclasses
import functools
import itertools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from herd_jax.errors import MISCOMPUTED, Miscomputed, command_line
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.reliability.timeline import Timeline
from herd_jax.training import step
from herd_jax.training.checkpoints.checksums import leaf_types
from herd_jax.training.corruption import NUM_REPETITIONS, Verification, odd_copies
from herd_jax.training.state import State

LEAF = ".params['layers']['attention_norm']"  # copied over all but pp


def verification(steps, tmp_path, every_steps=1):
    return Verification(every_steps, steps, ["here"], 0, Timeline(tmp_path, time.time()))


def flip(state: State, name: str, device: int, bit: int = 3) -> State:
    """The state with one bit of the first element flipped in one device's part of a leaf."""

    def flipped(path, leaf):
        if jax.tree_util.keystr(path) != name:
            return leaf
        parts = []
        for shard in leaf.addressable_shards:
            part = np.array(shard.data)
            if shard.device.id == device:
                part.reshape(-1).view(np.uint32)[0] ^= 1 << bit
            parts.append(jax.device_put(part, shard.device))
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)

    return jax.tree_util.tree_map_with_path(flipped, state)


@functools.cache
def make_steps(mesh):
    return tiny.make_steps(*mesh)


def start(mesh=(2, 1, 1, 4)):
    """(steps, state, batch) on a mesh (tp, cp, pp, dp)."""
    steps = make_steps(mesh)
    return steps, steps.plan.init(0), tiny.to_batch(steps, tiny.make_rows(), 2)


@pytest.mark.parametrize("mesh", [(2, 2, 2, 1), (2, 1, 1, 4)])
def test_a_healthy_step_is_the_same_verified_or_not(mesh, tmp_path):
    steps, state, batch = start(mesh)
    verified, metrics = verification(steps, tmp_path).run(1, steps.train, state, batch)
    expected, expected_metrics = steps.train(steps.plan.init(0), batch)
    chex.assert_trees_all_equal((verified, metrics), (expected, expected_metrics))
    assert leaf_types(verified)[LEAF]  # what the tests below flip is there


def test_only_the_steps_that_are_due_are_computed_twice(tmp_path):
    steps, state, batch = start()
    computed = []

    def compute(state, batch):
        computed.append(int(state.step) + 1)
        return steps.train(state, batch)

    checked, never = verification(steps, tmp_path, 2), verification(steps, tmp_path, 0)
    for number in range(1, 5):
        state, _ = checked.run(number, compute, state, batch)
    never.run(5, compute, state, batch)
    assert computed == [1, 2, 2, 3, 4, 4, 5]


@pytest.mark.parametrize("wrong_one", [0, 1])
def test_a_bit_that_flips_in_one_of_both_is_found(wrong_one, tmp_path):
    steps, state, batch = start()
    number = itertools.count()

    def compute(state, batch):
        new, metrics = steps.train(state, batch)
        return (flip(new, LEAF, 5) if next(number) == wrong_one else new), metrics

    with pytest.raises(Miscomputed) as error:
        verification(steps, tmp_path).run(1, compute, state, batch)
    text = str(error.value)
    assert text.startswith("step 1 ") and f"(1 elements, most of them in {LEAF}), on device 5 (process 0 on here) alone" in text
    assert "checkpoints after step 0" in text and error.value.status == MISCOMPUTED


def test_copies_that_went_apart_are_found(tmp_path):
    """Both computations agree, as the copy was wrong before."""
    steps, state, batch = start()
    with pytest.raises(Miscomputed, match=r"copies of .params\['layers'\]\['attention_norm'\] are not alike, on device 0 \(process 0 on here\);"):
        verification(steps, tmp_path).run(1, steps.train, flip(state, LEAF, 0, bit=30), batch)


def miscomputing(monkeypatch, rank):
    """Makes the devices of one dp rank compute with weights that are a little off, differently each time."""
    noise = itertools.count(1)
    call = lambda rank_here: np.float32(next(noise) * 1e-3 if rank_here == rank else 0)
    healthy = step.data.gather_weights

    def gathered(*arguments):
        off = jax.pure_callback(call, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.axis_index("dp"))
        return jax.tree.map(lambda leaf: leaf + off.astype(leaf.dtype), healthy(*arguments))

    monkeypatch.setattr(step.data, "gather_weights", gathered)


def test_the_device_is_named_although_its_error_went_to_all(monkeypatch, tmp_path):
    steps, state, batch = start()
    steps = dataclasses.replace(steps)  # to be compiled anew
    miscomputing(monkeypatch, rank=2)
    with pytest.raises(Miscomputed) as error:
        verification(steps, tmp_path).run(1, steps.train, state, batch)
    assert "and so has the gradient of device 4 (process 0 on here), device 5 (process 0 on here) alone;" in str(error.value)


def test_what_does_not_happen_again_names_no_device(monkeypatch, tmp_path):
    fine, state, batch = start()
    steps = dataclasses.replace(fine)
    miscomputing(monkeypatch, rank=1)
    jax.block_until_ready(steps.train(steps.plan.init(0), batch))  # compiled as it is now
    monkeypatch.undo()
    steps.__dict__["fingerprint"] = fine.fingerprint
    with pytest.raises(Miscomputed, match=f"on all devices; in {NUM_REPETITIONS} repetitions the gradient of each device was the same"):
        verification(steps, tmp_path).run(1, steps.train, state, batch)


def test_the_program_ends_with_a_status_of_its_own(capsys):
    def main(argv):
        raise Miscomputed("device 3 computes wrongly: take it out")

    with pytest.raises(SystemExit) as stopped:
        command_line(main)()
    assert stopped.value.code == MISCOMPUTED and capsys.readouterr().err == "error: device 3 computes wrongly: take it out\n"


@pytest.mark.parametrize(
    "spec, sums, odd",
    [
        (P(("dp", "cp"), "tp"), [1, 2, 3, 4, 5, 6, 7, 8], []),  # tp 2, cp 2, dp 2: no copies
        (P(("dp", "cp")), [1, 2, 3, 4, 1, 2, 3, 4], []),
        (P(("dp", "cp")), [1, 2, 3, 4, 1, 2, 9, 4], [2, 6]),  # two copies, so nobody knows
        (P(None, "tp"), [1, 1, 1, 1, 2, 2, 2, 2], []),
        (P(None, "tp"), [1, 1, 1, 1, 2, 2, 9, 2], [6]),
        (P(), [7] * 8, []),
        (P(), [7, 7, 7, 6, 7, 5, 7, 7], [3, 5]),
        (P(), [7, 7, 7, 7, 6, 6, 6, 6], [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_odd_copies(spec, sums, odd):
    mesh = make_mesh(MeshConfig(tp=2, cp=2, dp=2), jax.devices()[:8])
    assert odd_copies(np.array(sums, np.uint32), spec, mesh) == odd
