"""What a compiled step would take on a GPU: its kernels at stated shares of the card's rates, its collectives beside them as they were scheduled.

Three streams go through the scheduled program: of kernels, of messages, and of copies that XLA made asynchronous. What is started waits for those
before it in its stream, and what its `done` waits for is not hidden. All figures are estimates; what runs, in which order and how often is what XLA compiled.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

from hlo import Cost, Instruction, Module, num_bytes

from herd_jax.machines.hardware import Hardware

# Shares of the data sheet's rates that good kernels reach on large shapes: cuBLAS, flash attention 3 forward and backward, streaming, NCCL.
SHARES = {"gemm": 0.75, "attention": 0.6, "attention backward": 0.5, "memory": 0.8, "link": 0.8}
LAUNCH = 4e-6  # seconds that no kernel is shorter than
MESSAGE = 10e-6  # seconds that a collective takes beside what it sends
_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all", "ragged-all-to-all", "collective-broadcast")


@dataclasses.dataclass
class Totals:
    """Sums over a step: seconds in all, of kernels by kind, of messages by collective and those that nothing hides; FLOPs of matrix products, and those
    that XLA's rematerialisation added; loops that the host drives, since their trip count is not known; kernels that only move data, by name."""

    seconds: float = 0.0
    kernels: Counter = dataclasses.field(default_factory=Counter)
    messages: Counter = dataclasses.field(default_factory=Counter)
    exposed: Counter = dataclasses.field(default_factory=Counter)
    gemm_flops: float = 0.0
    remat_flops: float = 0.0
    fp8_gemms: int = 0
    num_kernels: float = 0.0
    host_loops: int = 0
    copies: Counter = dataclasses.field(default_factory=Counter)

    def add(self, other: "Totals", times: float) -> None:
        for field in dataclasses.fields(self):
            value = getattr(other, field.name)
            if isinstance(value, Counter):
                getattr(self, field.name).update({key: amount * times for key, amount in value.items()})
            else:
                factor = 1 if field.name in ("fp8_gemms", "host_loops") else times
                setattr(self, field.name, getattr(self, field.name) + value * factor)


class Estimate:
    """`mesh`: sizes of its axes, innermost first. `rounds`: a loop -> how often it runs, where the module does not say."""

    def __init__(self, module: Module, hardware: Hardware, mesh: Mapping[str, int], rounds: Callable[[Instruction], float]):
        self._module, self._hardware, self._mesh, self._rounds = module, hardware, mesh, rounds
        self._known: dict[str, Totals] = {}
        self.totals = self._of(module.entry)

    def _of(self, computation: str) -> Totals:
        if computation not in self._known:
            self._known[computation] = self._simulate(computation)
        return self._known[computation]

    def _simulate(self, computation: str) -> Totals:
        totals, now, link_free, copies_free, ends = Totals(), 0.0, 0.0, 0.0, {}
        for each in self._module.computations[computation]:
            collective = self._collective(each)
            if collective and not each.op.endswith(("-done", "-update")):
                seconds = self._message_seconds(computation, each, collective)
                totals.messages[collective] += seconds
                link_free = max(now, link_free) + seconds
                ends[each.name] = link_free, collective
                if not each.op.endswith("-start") or '"is_sync":true' in each.attributes:
                    now = self._wait(totals, now, ends[each.name])
            elif each.op in ("fusion-start", "copy-start"):
                copies_free = max(now, copies_free) + self._kernel(totals, each, self._module.cost(computation, each))
                ends[each.name] = copies_free, "copy"
            elif each.op.endswith("-done") and each.operands[0] in ends:
                now = self._wait(totals, now, ends[each.operands[0]])
            elif each.op == "while":
                inner = self._of(self._module.called(each)[0])
                count = self._module.rounds(computation, each)
                count = self._rounds(each) if count is None else count
                totals.host_loops += each.trip_count is None
                totals.add(inner, count)
                now += inner.seconds * count
            elif each.op in ("conditional", "call"):
                longest = max((self._of(name) for name in self._module.called(each)), key=lambda branch: branch.seconds)
                totals.add(longest, 1)
                now += longest.seconds
            else:
                now += self._kernel(totals, each, self._module.cost(computation, each))
        totals.seconds = max(now, link_free, copies_free)
        return totals

    def _wait(self, totals: Totals, now: float, end: tuple[float, str]) -> float:
        until, collective = end
        totals.exposed[collective] += max(0.0, until - now)
        return max(now, until)

    def _kernel(self, totals: Totals, each: Instruction, cost: Cost) -> float:
        if not cost.kind:
            return 0.0
        share = SHARES["gemm"]
        if cost.kind == "attention":
            share = SHARES["attention"] if "transpose" not in each.op_name else SHARES["attention backward"]
        kind = "asynchronous copy" if each.op.endswith("-start") else cost.kind.split()[0]
        peak = self._hardware.peak_flops * (2 if "f8" in cost.kind.split(" to ")[0] else 1)
        moving = cost.bytes / (self._hardware.memory_bandwidth * SHARES["memory"])
        seconds = max(cost.flops / (peak * share), moving, LAUNCH)
        totals.kernels[kind] += seconds
        totals.num_kernels += 1
        if kind == "gemm":
            totals.gemm_flops += cost.flops
            totals.remat_flops += cost.flops * (".remat" in each.name)
            totals.fp8_gemms += "f8" in cost.kind
        if kind == "copy":
            totals.copies[re.sub(r"[.\d]*(\.double_buffer_clone)?$", "", each.name) + " " + re.sub(r"\{[^}]*\}", "", each.shape)] += seconds
        return seconds

    def _collective(self, each: Instruction) -> str | None:
        op = each.op
        if op == "async-start":
            root = next(inner for inner in self._module.computations[each.attribute("calls")] if inner.is_root)
            op = root.op
        return next((name for name in _COLLECTIVES if op == name or op.startswith((f"{name}-start", f"{name}-done"))), None)

    def _message_seconds(self, computation: str, each: Instruction, collective: str) -> float:
        sent = sum(num_bytes(operand.shape) for operand in self._module.operands(computation, each))
        source = each
        if each.op == "async-start":
            source = next(inner for inner in self._module.computations[each.attribute("calls")] if inner.is_root)
        size, in_node = self._group(source)
        if size == 1:
            return 0.0
        share = (size - 1) / size
        factor = {"all-gather": size - 1, "all-reduce": 2 * share, "collective-permute": 1, "collective-broadcast": 1}.get(collective, share)
        return factor * sent / (self._hardware.ring(size, in_node).bandwidth * SHARES["link"]) + MESSAGE

    def _group(self, each: Instruction) -> tuple[int, int]:
        """Returns how many devices a collective joins, and how many of them sit in one node."""
        node = self._hardware.devices_per_node
        if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", each.attributes):
            first, second = int(pairs[1]), int(pairs[2])
            return 2, 2 if first // node == second // node else 1
        if named := re.search(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}", each.attributes):
            axes = re.findall(r"'(\w+)'", named[1])
            size, in_node, left = 1, 1, node
            for axis, length in self._mesh.items():
                inside = math.gcd(length, max(left, 1))
                left //= max(inside, 1)
                if axis in axes:
                    size, in_node = size * length, in_node * inside
            return size, in_node
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", each.attributes):
            members = [int(member) for member in listed[1].split(",")]
            nodes = defaultdict(int)
            for member in members:
                nodes[member // node] += 1
            return len(members), max(nodes.values())
        if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", each.attributes):
            return int(iota[2]), min(int(iota[2]), node)
        total = math.prod(self._mesh.values())
        return total, min(total, node)
