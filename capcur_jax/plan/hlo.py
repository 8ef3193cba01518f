"""What a program will send and compute in one run: collectives from the compiled text, FLOPs from the jaxpr.

The compilers' own cost analyses count a loop's body once; here loops are multiplied out.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip
_WIDTH = {"pred": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_INTEGER = re.compile(r"[su]\d+\[\]")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")


class Collective(NamedTuple):
    """What one device does of one kind in groups of one size. `bytes`: the larger of what goes in and what comes out,
    that is the gathered array of an all-gather, the whole array of a reduce-scatter or all-reduce."""

    kind: str
    devices: int  # in a group; 0: the text doesn't say (collective-permute)
    runs: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a ring, the least that any algorithm needs for arrays this large."""
        share = 1 - 1 / self.devices if self.devices else 1.0
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


class Traffic(NamedTuple):
    collectives: tuple[Collective, ...]
    unknown_loops: int  # loops whose length the text doesn't say, counted once

    @property
    def sent(self) -> float:
        return sum(collective.sent for collective in self.collectives)


class _Instruction(NamedTuple):
    name: str
    root: bool  # its computation's result
    type: str
    opcode: str
    operands: str
    attributes: str


def collectives(text: str) -> Traffic:
    """What `compiled.as_text()` says that each device sends and receives in one run of the program.

    A loop that may end early counts in full; of a conditional's branches the one that moves most.
    """
    computations, entry = _parse(text)
    unknown: set[str] = set()

    @functools.cache
    def inside(computation: str) -> collections.Counter:
        """(kind, group size, "runs" or "bytes") -> number."""
        total: collections.Counter = collections.Counter()
        instructions = computations.get(computation, {})
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                if computation.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # a TPU's: an all-reduce fused with the slice that each device keeps
                devices = _group_size(instruction.attributes)
                total[kind, devices, "runs"] += 1
                total[kind, devices, "bytes"] += _moved(instruction, instructions)
            elif instruction.opcode == "while":
                trips = _trips(instruction, instructions, computations)
                if trips is None:
                    unknown.add(instruction.name)
                body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)[1]
                for key, count in inside(body).items():
                    total[key] += (trips or 1) * count
            elif instruction.opcode == "conditional":
                names = [name for pair in _BRANCHES.findall(instruction.attributes) for name in pair if name]
                branches = [inside(name.strip(" %")) for group in names for name in group.split(",")]
                total += max(branches, key=lambda b: sum(n for key, n in b.items() if key[2] == "bytes"))
            elif not instruction.opcode.endswith(("-done", "-update")):
                for group in _CALLED.findall(instruction.attributes):
                    for name in group.split(","):
                        total += inside(name.strip(" %"))
        return total

    found = inside(entry)
    keys = sorted({key[:2] for key in found})
    return Traffic(tuple(Collective(*key, found[*key, "runs"], found[*key, "bytes"]) for key in keys), len(unknown))


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None  # what a kernel's metadata spreads over further lines belongs to nobody
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, rest = match.groups()
            type_, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1) if " " in rest else (rest, "")
            if opcode := re.match(r"\s*([\w\-]+)(?=\()", rest):
                operands, attributes = _split(rest[opcode.end() :])
                current[name] = _Instruction(name, bool(root), type_, opcode[1], operands, attributes)
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """ "(a (b) c) d" -> "(a (b) c)", " d"."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: at + 1], text[at + 1 :]
    return text, ""


def _arrays(type_: str) -> Iterator[int]:
    """Bytes of each array of a type."""
    for kind, shape in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", type_):
        bits = re.search(r"\d+", kind)
        width = _WIDTH.get(kind) or (int(bits[0]) / 8 if bits else 0)
        yield math.ceil(width * math.prod(int(n) for n in shape.split(",") if n))


def _moved(instruction: _Instruction, around: dict[str, _Instruction]) -> int:
    result = sum(_arrays(instruction.type))
    names = _names(instruction)
    operands = sum(sum(_arrays(around[name].type)) for name in names if name in around)
    if instruction.opcode.endswith("-start") and not instruction.opcode.startswith("all-reduce"):
        # (operands, results and, of a permute, two numbers)
        result -= operands + sum(size for size in _arrays(instruction.type) if size <= 4)
    return max(result, operands)


def _group_size(attributes: str) -> int:
    if groups := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(groups[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(groups[1].split(","))
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", groups[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", groups[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 0


def _trips(
    loop: _Instruction, around: dict[str, _Instruction], computations: dict[str, dict[str, _Instruction]]
) -> int | None:
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    # A TPU's text leaves it out: the number that the condition compares the counter with, and how the body counts.
    condition, body = (
        computations.get(re.search(rf"{part}=%?([\w.\-]+)", loop.attributes)[1], {}) for part in ("condition", "body")
    )
    limit = max(_constants(condition.values(), computations), default=None)
    counters = [i for i in condition.values() if i.opcode == "get-tuple-element" and _INTEGER.match(i.type)]
    if limit is None or len(counters) != 1:
        return limit
    place = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
    first = _element(around.get(next(iter(_names(loop)), "")), place, around)
    last = _element(next((i for i in body.values() if i.root), None), place, body)
    start = max(_constants([first], computations, around), default=0)
    step = max(_constants([last], computations, body), default=1)
    return max(-(-(limit - start) // max(step, 1)), 0)


def _element(tuple_: _Instruction | None, place: int, around: dict[str, _Instruction]) -> _Instruction | None:
    names = _names(tuple_) if tuple_ is not None and tuple_.opcode == "tuple" else []
    return around.get(names[place]) if place < len(names) else None


def _names(instruction: _Instruction) -> list[str]:
    """Of its operands."""
    return re.findall(r"%([\w.\-]+)", instruction.operands)


def _constants(
    instructions: Iterable[_Instruction | None],
    computations: dict[str, dict[str, _Instruction]],
    around: dict[str, _Instruction] | None = None,
) -> list[int]:
    """Whole numbers among these instructions, inside what they call and, given what is around, among their operands."""
    found, more = [], []
    for instruction in filter(None, instructions):
        if instruction.opcode == "constant" and _INTEGER.match(instruction.type):
            found.append(int(instruction.operands.strip("()")))
        more += [i for name in _CALLS.findall(instruction.attributes) for i in computations.get(name, {}).values()]
        more += [around[name] for name in _names(instruction) if name in around] if around else []
    return found + [int(i.operands.strip("()")) for i in more if i.opcode == "constant" and _INTEGER.match(i.type)]


# ---------------------------------------------------------------------- FLOPs


def jaxpr_flops(jaxpr: Any, trips: int = 1) -> int:
    """FLOPs of the matrix products and convolutions in one run of a traced program (`jax.jit(f).trace(...).jaxpr`), all
    devices together; what is recomputed backwards counts again.

    Where a function has kernels of its own for some platforms (attention), its plain form is counted: every product of
    a query with a key, as is usual, though kernels skip blocks that a mask leaves empty.

    Args:
        trips: how often a loop without a known length runs.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_flops(equation, trips) for equation in jaxpr.eqns)


def _flops(equation: Any, trips: int) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, parameters["dimension_numbers"].rhs_spec
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[spec[0]]
    if name == "cond":
        platforms = parameters.get("branches_platforms") or [None] * len(parameters["branches"])
        plain = [b for b, of in zip(parameters["branches"], platforms, strict=True) if not of]
        return max(jaxpr_flops(branch, trips) for branch in plain or parameters["branches"])
    if name == "while":
        return trips * jaxpr_flops(parameters["body_jaxpr"], trips)
    inner = sum(jaxpr_flops(jaxpr, trips) for jaxpr in _jaxprs(parameters.values()))
    if name == "scan":
        return parameters["length"] * inner
    if name == "shard_map":  # shapes inside are those of a device
        return math.prod(parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"]) * inner
    if name == "pallas_call":
        return math.prod(parameters["grid_mapping"].grid) * inner
    return inner


def _jaxprs(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _jaxprs(value)
        elif hasattr(getattr(value, "jaxpr", value), "eqns"):
            yield value
