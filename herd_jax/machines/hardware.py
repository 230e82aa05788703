"""What the devices can do: the peak rates that MFU is relative to, and the figures from which the planner predicts.

Rates are those of the data sheets, which no program reaches: what share of them is reached is the planner's business.
"""

import dataclasses
import functools
import os
import re
import time

import jax
import jax.numpy as jnp

from herd_jax.errors import UserError

# Dense BF16 FLOP/s of one device, by words of `device.device_kind`; the first that fits counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,  # NVIDIA H100 datasheet (PCIe card), without sparsity
    "H100 NVL": 835e12,  # NVIDIA H100 NVL datasheet: 1,671 with sparsity, halved
    "H100": 989.4e12,  # NVIDIA H100 white paper (SXM5); the Llama 3 paper's MFU (table 4) is relative to it
    "H200": 989.4e12,  # NVIDIA H200 datasheet: the chip of the H100 SXM5 with more memory
    "GH200": 989.4e12,  # NVIDIA GH200 datasheet: the same chip
    "GB200": 2500e12,  # NVIDIA GB200 NVL72 datasheet: 360 PFLOP/s for 72 GPUs with sparsity, halved
    "B200": 2250e12,  # NVIDIA DGX B200 datasheet: 36 PFLOP/s for 8 GPUs with sparsity, halved
    "A100": 312e12,  # NVIDIA A100 white paper
    "L40S": 362e12,  # NVIDIA L40S datasheet
    "L4": 121e12,  # NVIDIA L4 datasheet: 242 with sparsity, halved
    "TPU v4": 275e12,  # Google Cloud TPU v4 documentation
    "TPU v5 lite": 197e12,  # Google Cloud TPU v5e documentation
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,  # Google Cloud TPU v5p documentation
    "TPU v5": 459e12,  # what a v5p calls itself
    "TPU v6 lite": 918e12,  # Google Cloud TPU v6e documentation
    "TPU v6e": 918e12,
}


@dataclasses.dataclass(frozen=True)
class Link:
    """What one device sends at most, in bytes/s, and the seconds before the first byte arrives."""

    bandwidth: float
    latency: float


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and what joins it to others.

    `memory_bytes` is the nominal size in GB of 1e9 bytes. The driver shows a little more (an H100: 81,559 MiB = 85.5 GB), which is left
    for its own use, the buffers of the collectives and fragmentation. `power` is the device's own at its limit, in W; None: not published.
    """

    name: str
    peak_flops: float  # dense BF16 (a CPU: FP32) FLOP/s
    memory_bytes: float
    memory_bandwidth: float  # bytes/s
    devices_per_node: int
    inside: Link  # between the devices of a node
    across: Link  # between nodes
    power: float | None
    value_bytes: int = 2  # of the compute dtype
    waits_for_all: bool = False  # devices of one process: an exchange waits for all of them

    def ring(self, size: int, in_node: int) -> Link:
        """Returns what a ring of `size` devices, `in_node` of them in each node, sends at, and the seconds of its size - 1 hops together.

        A ring that spans nodes crosses the network once for each of its devices in a node, all at the same time: so each device is slowed
        the less the more of them there are.
        """
        if in_node == size:
            return Link(self.inside.bandwidth, (size - 1) * self.inside.latency)
        crossings = -(-size // in_node) - 1
        hops = (size - 1 - crossings) * self.inside.latency + crossings * self.across.latency
        return Link(min(self.inside.bandwidth, in_node * self.across.bandwidth), hops)


# Latencies of a hop: the model by which NCCL chooses its algorithms (ring, simple protocol; src/graph/tuning.cc).
_NVLINK_LATENCY, _NETWORK_LATENCY = 3.4e-6, 14e-6

HARDWARE = {
    "h100": Hardware(
        "h100",
        PEAK_FLOPS["H100"],
        80e9,  # NVIDIA H100 datasheet (SXM5), as the next and the power
        3.35e12,
        8,  # section 3.3.1 of the Llama 3 paper: Grand Teton, 8 GPUs
        Link(450e9, _NVLINK_LATENCY),  # NVLink 4, 900 GB/s both ways together
        Link(50e9, _NETWORK_LATENCY),  # section 3.3.1: 400 Gb/s for each GPU
        700.0,
    ),
    "h200": Hardware(
        "h200",
        PEAK_FLOPS["H200"],
        141e9,  # NVIDIA H200 datasheet (SXM), as the next and the power
        4.8e12,
        8,
        Link(450e9, _NVLINK_LATENCY),
        Link(50e9, _NETWORK_LATENCY),  # DGX H200: a ConnectX-7 of 400 Gb/s for each GPU
        700.0,
    ),
    "a100": Hardware(
        "a100",
        PEAK_FLOPS["A100"],
        80e9,  # NVIDIA A100 datasheet (80 GB SXM), as the next and the power
        2.039e12,
        8,
        Link(300e9, _NVLINK_LATENCY),  # NVLink 3, 600 GB/s both ways together
        Link(25e9, _NETWORK_LATENCY),  # DGX A100: a ConnectX-6 of 200 Gb/s for each GPU
        400.0,
    ),
    "b200": Hardware(
        "b200",
        PEAK_FLOPS["B200"],
        180e9,  # NVIDIA HGX B200 data: 180 GB, 7.7 TB/s and up to 1,000 W for each GPU
        7.7e12,
        8,
        Link(900e9, _NVLINK_LATENCY),  # NVLink 5, 1.8 TB/s both ways together
        Link(50e9, _NETWORK_LATENCY),  # DGX B200: a ConnectX-7 of 400 Gb/s for each GPU
        1000.0,
    ),
    "tpu-v5p": Hardware(
        "tpu-v5p",
        PEAK_FLOPS["TPU v5p"],
        95 * 2**30,  # Google Cloud TPU v5p documentation: 95 GiB, 2,765 GB/s, as all but the latencies
        2.765e12,
        6144,  # the largest slice that can be had
        Link(200e9, 1e-6),  # 1,200 GB/s both ways over 6 links, of which an axis of the mesh has 2; a hop of about 1 us is our guess
        Link(6.25e9, 50e-6),  # 50 Gb/s for each chip between slices; the latency is our guess
        None,
    ),
}


def look_up(name: str, num_devices: int = 1) -> Hardware:
    """Finds the hardware of that name, however it is spelled ("TPU v5p", "tpu_v5p"). "cpu" is this host, measured (a second), shared by
    `num_devices` fake devices. Raises UserError for a name that is not known."""
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    if key == "cpu":
        return _this_cpu(max(num_devices, 1))  # fewer are refused with the rest of the job
    if key not in HARDWARE:
        raise UserError(f"hardware '{name}' is not known: choose one of {', '.join(HARDWARE)}, cpu")
    return HARDWARE[key]


def peak_flops(device: jax.Device, num_local_devices: int = 1) -> float | None:
    """Returns the dense BF16 peak of `device` in FLOP/s, which MFU is relative to; None for an accelerator that is not in the table.

    A CPU has no number that would help: there it is what one jitted FP32 matmul of 1024 x 1024 reaches, the best of a few (so
    that MFU can exceed 1), divided by `num_local_devices`, the fake devices that share this host.
    """
    if device.platform == "cpu":
        return _measured_cpu()[0] / num_local_devices
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device.device_kind, re.IGNORECASE)), None)


def _this_cpu(num_devices: int) -> Hardware:
    flops, bandwidth = (rate / num_devices for rate in _measured_cpu())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / num_devices
    link = Link(bandwidth / 2, 50e-6)  # a message is a copy in memory; the latency, of waking a thread, is our guess
    return Hardware("cpu", flops, memory, bandwidth, num_devices, link, link, None, value_bytes=4, waits_for_all=True)


@functools.cache
def _measured_cpu() -> tuple[float, float]:
    """Measures (FLOP/s of a matmul, bytes/s read and written by a copy), the whole host's, the best of a few."""
    size, num_values = 1024, 1 << 24
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x, values = jnp.ones((size, size), jnp.float32), jnp.ones(num_values, jnp.float32)
        return 2 * size**3 / _best_time(jnp.matmul, x, x), 8 * num_values / _best_time(jnp.negative, values)


def _best_time(function, *arrays: jax.Array) -> float:
    compiled, seconds = jax.jit(function).lower(*arrays).compile(), []
    for _ in range(5):
        start = time.perf_counter()
        compiled(*arrays).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
