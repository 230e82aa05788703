"""An optimized, scheduled HLO module of XLA's GPU backend, read from its text: its instructions, what each computes and moves, and its loops."""

import dataclasses
import functools
import json
import math
import re
from collections import defaultdict

_BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "bf16": 16}  # of types whose name does not say it
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_VIEWS = {"bitcast", "reshape", "copy", "convert", "transpose"}
_ELEMENTWISE = _VIEWS | set("add subtract multiply divide maximum minimum exponential log negate select compare and or clamp rsqrt tanh logistic".split())
_MOVES = _VIEWS | {"slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "broadcast", "constant", "parameter", "tuple", "pad", "iota"}
_MOVES |= {"get-tuple-element", "reverse", "gather", "clamp"}


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line: `%name = shape op(operands), attributes`."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    inside: str  # what stands between the parentheses
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @functools.cached_property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def target(self) -> str:
        """Returns what a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def trip_count(self) -> int | None:
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one execution of an instruction computes and moves. `kind`: gemm (with its types), attention, memory, copy (nothing but data
    movement), or "" for what takes no time."""

    kind: str
    flops: float = 0.0
    bytes: float = 0.0


def arrays(shape: str) -> list[tuple[str, list[int]]]:
    """Returns (type, sizes) of the arrays in a shape."""
    plain = re.sub(r"/\*.*?\*/|\{[^}]*\}", "", shape)
    return [(kind, [int(size) for size in sizes.split(",") if size]) for kind, sizes in _ARRAY.findall(plain)]


def num_bytes(shape: str) -> float:
    return sum(math.prod(sizes) * _bits(kind) / 8 for kind, sizes in arrays(shape))


def _bits(kind: str) -> int:
    return _BITS[kind] if kind in _BITS else int(re.search(r"\d+", kind)[0])


class Module:
    """The computations of a module by name: `computations` and `entry`."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        current = None
        for line in text.splitlines():
            if (match := _COMPUTATION.match(line)) and not line.startswith(" "):
                current = self.computations.setdefault(match[2], [])
                self.entry = match[2] if match[1] else getattr(self, "entry", match[2])
            elif line.startswith("}"):
                current = None
            elif current is not None and (match := _INSTRUCTION.match(line)):
                current.append(_instruction(match[2], match[3], bool(match[1])))
        self._by_name = {name: {each.name: each for each in found} for name, found in self.computations.items()}

    def operands(self, computation: str, instruction: Instruction) -> list[Instruction]:
        known = self._by_name[computation]
        return [known[name] for name in instruction.operands if name in known]

    def called(self, instruction: Instruction) -> list[str]:
        """Returns the computations that an instruction runs: the body of a loop, the branches of a conditional, what a call calls."""
        match instruction.op:
            case "while":
                return [instruction.attribute("body")]
            case "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                names = listed[1].split(",") if listed else [instruction.attribute(f"{side}_computation") for side in ("true", "false")]
                return [name.strip(" %") for name in names]
            case "call":
                return [instruction.attribute("to_apply")]
        return []

    def rounds(self, computation: str, loop: Instruction) -> int | None:
        """Returns how often a loop runs, as XLA has found out, or from the constants that its counter begins and ends with."""
        if loop.trip_count is not None:
            return loop.trip_count
        start = self.operands(computation, self.operands(computation, loop)[0])[:1]
        while start and start[0].op == "copy":
            start = self.operands(computation, start[0])
        condition = loop.attribute("condition")
        called = [each.attribute("calls") for each in self.computations[condition] if each.op == "fusion"]
        bodies = [condition, *filter(None, called)]
        ends = [int(each.inside) for name in bodies for each in self.computations[name] if each.op == "constant" and each.shape.startswith("s32")]
        if len(ends) != 1 or not start or start[0].op != "constant":
            return None
        return max(0, ends[0] - int(start[0].inside))

    def cost(self, computation: str, instruction: Instruction) -> Cost:
        operands = self.operands(computation, instruction)
        match instruction.op:
            case "custom-call":
                return self._custom_call(instruction, operands)
            case "fusion" | "fusion-start":
                return self._fusion(instruction.attribute("calls"))
            case "copy" | "copy-start" | "transpose" | "concatenate" | "broadcast" | "slice" | "dynamic-slice" | "pad":
                moved = num_bytes(arrays_text(instruction.shape))
                return Cost("copy", 0, moved if instruction.op == "broadcast" else 2 * moved)
            case "dynamic-update-slice":
                return Cost("copy", 0, 2 * num_bytes(operands[1].shape))
            case "reduce" | "convert" | "iota" | "sort" | "scatter" | "gather" | "reduce-window" | "select-and-scatter" | "rng-bit-generator":
                return Cost("memory", 0, num_bytes(instruction.shape) + sum(num_bytes(each.shape) for each in operands))
        return Cost("")

    def _custom_call(self, instruction: Instruction, operands: list[Instruction]) -> Cost:
        moved = sum(num_bytes(each.shape) for each in operands) + num_bytes(instruction.shape)
        if "cublas" in instruction.target:
            config = json.loads(re.search(r"backend_config=(\{.*\})\s*$", instruction.attributes)[1])
            dims = config["gemm_backend_config"]["dot_dimension_numbers"]["lhs_contracting_dimensions"]
            (left, sizes), (out, out_sizes) = arrays(operands[0].shape)[0], arrays(instruction.shape)[0]
            workspace = sum(math.prod(size) for kind, size in arrays(instruction.shape)[1:] if kind == "s8")
            flops = 2 * math.prod(out_sizes) * math.prod(sizes[int(dim)] for dim in dims)
            return Cost(f"gemm {left} to {out}", flops, moved - workspace)
        if "paged_attention" in instruction.op_name:
            return self._paged_attention(operands)
        if "flash" in instruction.op_name or "attention" in instruction.op_name or "mosaic" in instruction.target or "cudnn" in instruction.target:
            return self._attention(instruction, operands, moved)
        return Cost("" if instruction.target == "AllocateBuffer" else "memory", 0, moved)

    def _attention(self, instruction: Instruction, operands: list[Instruction], moved: float) -> Cost:
        """Counts the products of a causal flash kernel: two forward, five backward of which a kernel for the queries' gradient does three and one
        for those of keys and values four, each of T x S / 2 x N x H."""
        shapes = [sizes for each in operands for kind, sizes in arrays(each.shape) if len(sizes) >= 3 and kind in ("bf16", "f16", "f32")]
        if len(shapes) < 2:
            return Cost("memory", 0, moved)
        queries, keys = shapes[0], shapes[1]
        products = 2 if len([1 for each in operands if len(arrays(each.shape)[0][1]) >= 3]) == 3 else 3.5
        return Cost("attention", 2 * products * math.prod(queries) * keys[-3] / 2, moved)

    def _paged_attention(self, operands: list[Instruction]) -> Cost:
        """Counts attention over pages (queries, keys, values, tables, ...), as if all rows were as long as their tables: each page is read once."""
        (kind, queries), (_, pool), (_, _), (_, table), *_ = (arrays(each.shape)[0] for each in operands)
        num_keys = math.prod(table) * pool[2]
        return Cost("attention", 4 * math.prod(queries[1:]) * num_keys, 2 * num_keys * pool[1] * pool[3] * _bits(kind) / 8)

    @functools.cache  # noqa: B019  (a module lives as long as its process)
    def _fusion(self, name: str) -> Cost:
        body = self.computations[name]
        flops, kind, fixed = 0.0, "", 0.0
        for each in body:
            if each.op == "custom-call":
                inner = self._custom_call(each, self.operands(name, each))
                flops, kind, fixed = flops + inner.flops, inner.kind, fixed + sum(math.prod(s) for k, s in arrays(each.shape)[1:] if k == "s8")
            elif each.op == "dot":
                left = self.operands(name, each)[0]
                (kind_of_left, sizes), (out, out_sizes) = arrays(left.shape)[0], arrays(each.shape)[0]
                dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)[1]
                flops += 2 * math.prod(out_sizes) * math.prod(sizes[int(dim)] for dim in dims.split(",") if dim)
                kind = f"gemm {kind_of_left} to {out}"
        moved = sum(self._read(name).values()) + self._written(name) - fixed
        return Cost(kind or ("copy" if all(each.op in _MOVES for each in body) else "memory"), flops, moved)

    def _read(self, name: str) -> dict[str, float]:
        """Returns the bytes that a fused computation reads of each parameter: of one that is only sliced, the slice."""
        users = defaultdict(list)
        for each in self.computations[name]:
            for operand in each.operands:
                users[operand].append(each)

        def read(operand: str, whole: float, depth: int = 0) -> float:
            most = 0.0
            for user in users[operand]:
                if user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == operand:
                    size = num_bytes(user.shape)
                elif user.op in _ELEMENTWISE and depth < 16 and not user.is_root:
                    size = read(user.name, whole, depth + 1)
                elif user.op in ("dynamic-update-slice", "scatter") and user.operands[0] == operand:
                    size = 0.0
                else:
                    size = whole
                most = max(most, size)
            return min(most, whole)

        return {each.name: read(each.name, num_bytes(each.shape)) for each in self.computations[name] if each.op == "parameter"}

    def _written(self, name: str) -> float:
        by_name = self._by_name[name]

        def written(each: Instruction, depth: int = 0) -> float:
            if each.op in ("bitcast", "reshape") and depth < 8 and each.operands[0] in by_name:
                return written(by_name[each.operands[0]], depth + 1)
            update = {"dynamic-update-slice": 1, "scatter": 2}.get(each.op)
            return num_bytes(each.shape if update is None else by_name[each.operands[update]].shape)

        root = next(each for each in self.computations[name] if each.is_root)
        return sum(written(by_name[operand]) for operand in root.operands) if root.op == "tuple" else written(root)


def arrays_text(shape: str) -> str:
    """Returns the first array of a shape, also of a tuple's."""
    return _ARRAY.search(re.sub(r"/\*.*?\*/", "", shape))[0]


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
        shape, rest = rest[:end], rest[end + 1 :]
    else:
        shape, _, rest = rest.partition(" ")
    op = re.match(r"[\w\-]+", rest)[0]
    end = _closing(rest, len(op))
    inside = rest[len(op) + 1 : end]
    return Instruction(name, shape, op, tuple(re.findall(r"%([\w.\-]+)", inside)), inside, rest[end + 1 :], is_root)


def _closing(text: str, begin: int) -> int:
    """Returns the index of the parenthesis that closes the one at `begin`."""
    depth = 0
    for at in range(begin, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"no closing parenthesis in {text[:80]}")
