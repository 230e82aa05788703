"""The mesh: the paper's order of ranks, what "whatever is left" means, and the sizes that are refused."""

import itertools
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.errors import UserError
from herd_jax.mesh import AXES, MeshConfig, arrange, fsdp_size, make_mesh, request_cpu_devices

SIZES = st.sampled_from([sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8])


def neighbours(mesh, axis):
    """Device ids of the groups that communicate along `axis`, each in rank order."""
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    groups = np.moveaxis(ids, AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
    return sorted(groups.tolist())


def test_groups_of_the_paper():
    """Figure 5 of the paper has 16 GPUs, two along each axis; these are the eight of dp rank 0."""
    mesh = make_mesh(MeshConfig(tp=2, cp=2, pp=2))
    assert mesh.axis_names == ("tp", "cp", "pp", "dp")
    assert neighbours(mesh, "tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert neighbours(mesh, "cp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert neighbours(mesh, "pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert neighbours(make_mesh(MeshConfig(tp=1, cp=2, pp=2, dp=2)), "dp") == [[0, 4], [1, 5], [2, 6], [3, 7]]


@settings(deadline=None)
@given(SIZES)
def test_rank_formula(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    num_tp, num_cp, num_pp, _ = sizes
    for (tp, cp, pp, dp), device in np.ndenumerate(mesh.devices):
        assert device == jax.devices()[tp + num_tp * (cp + num_cp * (pp + num_pp * dp))]


@pytest.mark.parametrize(
    "config, dp", [(MeshConfig(), 8), (MeshConfig(tp=4), 2), (MeshConfig(2, 2, 2), 1), (MeshConfig(1, 2, 2, 2), 2)]
)
def test_dp_takes_what_is_left(config, dp):
    mesh = make_mesh(config)
    assert mesh.shape["dp"] == dp and mesh.size == 8
    assert fsdp_size(mesh) == dp * config.cp


@pytest.mark.parametrize(
    "config, num_devices, words",
    [
        (MeshConfig(tp=3), 8, ("tp 3 x cp 1 x pp 1", "a multiple of 3", "there are 8")),
        (MeshConfig(tp=2, dp=2), 8, ("x dp 2", "takes 4 devices", "there are 8")),
        (MeshConfig(tp=2, cp=2, pp=2, dp=2), 8, ("takes 16 devices", "there are 8")),
        (MeshConfig(tp=8), 4, ("a multiple of 8", "there are 4")),
    ],
)
def test_devices_that_do_not_divide(config, num_devices, words):
    with pytest.raises(UserError) as error:
        make_mesh(config, jax.devices()[:num_devices])
    for word in (*words, "mesh.tp", "mesh.cp", "mesh.pp", "mesh.dp"):
        assert word in str(error.value)


def fake_devices(num_hosts, in_host):
    """Of several processes, in an order that is not theirs."""
    return [types.SimpleNamespace(process_index=host, id=(host, i)) for i in range(in_host) for host in range(num_hosts)]


def test_tp_inside_a_host_and_dp_outermost():
    grid = arrange(MeshConfig(tp=4, cp=2, pp=2, dp=2), fake_devices(4, 8))
    hosts = np.vectorize(lambda device: device.process_index)(grid)
    np.testing.assert_array_equal(hosts, np.broadcast_to([[[[0, 2], [1, 3]]]], (4, 2, 2, 2)))  # a host: one pp rank of one dp rank
    ranks = np.vectorize(lambda device: device.id[1])(grid)
    np.testing.assert_array_equal(ranks[:, :, 0, 0], [[0, 4], [1, 5], [2, 6], [3, 7]])


@pytest.mark.parametrize("tp, num_hosts, in_host", [(8, 2, 4), (16, 4, 8), (3, 3, 4)])
def test_tp_across_hosts_only_if_asked_for(tp, num_hosts, in_host):
    devices = fake_devices(num_hosts, in_host)
    with pytest.raises(UserError, match=f"mesh.tp {tp} does not fit into the hosts, of {in_host} devices each.*allow_tp_across_hosts=true"):
        arrange(MeshConfig(tp=tp), devices)
    assert arrange(MeshConfig(tp=tp, allow_tp_across_hosts=True), devices).shape[0] == tp


def test_processes_share_the_fake_devices(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: asked.append(value))
    monkeypatch.setenv("XLA_FLAGS", "")
    for config, num_processes in ((MeshConfig(tp=2, dp=4), 4), (MeshConfig(pp=4), 2), (MeshConfig(pp=2), 4), (MeshConfig(), 3)):
        request_cpu_devices(config, num_processes)
    assert asked == [2, 2, 1, 1]
    with pytest.raises(UserError, match="3 processes cannot share the 4 devices"):
        request_cpu_devices(MeshConfig(dp=4), 3)


@pytest.mark.parametrize("sizes", [{"tp": 0}, {"cp": -1}, {"pp": 0}, {"dp": -1}])
def test_sizes_below_one(sizes):
    (axis,) = sizes
    with pytest.raises(UserError, match=f"mesh.{axis} is {sizes[axis]}: it must be 1 or more"):
        MeshConfig(**sizes)


def test_cpu_devices_chosen_outside_stay(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: asked.append((name, value)))
    request_cpu_devices(MeshConfig(tp=2, cp=2))
    assert not asked  # the tests' XLA_FLAGS choose
    monkeypatch.setenv("XLA_FLAGS", "")
    request_cpu_devices(MeshConfig(tp=2, cp=2))
    request_cpu_devices(MeshConfig(pp=2, dp=3))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    request_cpu_devices(MeshConfig(tp=4))
    assert asked == [("jax_num_cpu_devices", 4), ("jax_num_cpu_devices", 6)]
