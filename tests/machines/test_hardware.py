"""Hardware: names and their spellings, peaks by device, what a ring of devices has, and this CPU."""

from types import SimpleNamespace

import jax
import pytest

from herd_jax.errors import UserError
from herd_jax.machines.hardware import HARDWARE, PEAK_FLOPS, Link, look_up, peak_flops


@pytest.mark.parametrize(
    "kind, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peaks(kind, flops):
    assert peak_flops(SimpleNamespace(platform="gpu", device_kind=kind)) == flops


def test_a_cpu_is_measured_once_and_shared_by_its_fake_devices():
    device = jax.devices("cpu")[0]
    assert peak_flops(device) == 8 * peak_flops(device, num_local_devices=8) > 1e8


@pytest.mark.parametrize("name", ["tpu v5p", "TPU v5p", "tpu_v5p", " tpu-v5p "])
def test_a_name_may_be_spelled_in_any_way(name):
    assert look_up(name) is HARDWARE["tpu-v5p"]
    assert look_up("H100").memory_bytes == 80e9


def test_an_unknown_name_is_one_sentence_with_the_known_ones():
    with pytest.raises(UserError, match=r"^hardware 'h300' is not known: choose one of h100, h200, a100, b200, tpu-v5p, cpu$"):
        look_up("h300")


def test_the_planner_and_mfu_have_the_same_peaks():
    kinds = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "a100": "NVIDIA A100-SXM4-80GB", "b200": "NVIDIA B200"}
    for name, kind in kinds.items():
        assert look_up(name).peak_flops == peak_flops(SimpleNamespace(platform="gpu", device_kind=kind))
    assert look_up("tpu v5p").peak_flops == PEAK_FLOPS["TPU v5p"]


def test_figures_are_in_order():
    """Units mixed up (bits, both ways, GiB) would show."""
    for hardware in HARDWARE.values():
        assert 30e9 < hardware.memory_bytes < 300e9
        assert hardware.memory_bandwidth > 2 * hardware.inside.bandwidth > 4 * hardware.across.bandwidth
        assert 0 < hardware.inside.latency < hardware.across.latency < 1e-3


def test_a_ring_within_a_node_never_leaves_it():
    h100 = HARDWARE["h100"]
    assert h100.ring(8, in_node=8) == Link(450e9, pytest.approx(7 * h100.inside.latency))


def test_a_ring_over_nodes_crosses_the_network_with_all_its_devices_of_a_node_at_once():
    h100 = HARDWARE["h100"]
    assert h100.ring(4, in_node=1) == Link(50e9, pytest.approx(3 * h100.across.latency))
    assert h100.ring(16, in_node=2) == Link(100e9, pytest.approx(8 * h100.inside.latency + 7 * h100.across.latency))
    assert h100.ring(16, in_node=8).bandwidth == 400e9
    assert HARDWARE["a100"].ring(64, in_node=8).bandwidth == 200e9


def test_a_cpu_is_measured_and_shared_by_its_fake_devices():
    one, eight = look_up("cpu"), look_up("CPU", num_devices=8)
    for field in ("peak_flops", "memory_bytes", "memory_bandwidth"):
        assert getattr(one, field) == pytest.approx(8 * getattr(eight, field)) and getattr(eight, field) > 1e8
    assert eight.devices_per_node == 8 and eight.power is None and eight.value_bytes == 4
    assert one.peak_flops == peak_flops(jax.devices("cpu")[0])
