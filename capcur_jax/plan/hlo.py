"""What a program will send in one run, and read from and write to a device's memory: by the compiled text.

The compilers' own cost analyses count a loop's body once; here loops are multiplied out.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip
_WIDTH = {"pred": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_MOVED = ("memory", 0, "moved")
_INTEGER = re.compile(r"[su]\d+\[\]")
_COMPARISON = {"parameter", "constant", "get-tuple-element", "compare", "copy", "bitcast", "convert", "fusion"}
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
    """Of one device. A turn is one of the loop whose length the caller gave (`traffic`)."""

    collectives: tuple[Collective, ...]
    unknown_loops: int  # loops whose length neither the text nor the caller says, counted once
    moved: int  # bytes read from its memory and written there, turns left out
    moved_a_turn: int
    collectives_a_turn: int
    kernels: tuple[str, ...]  # targets of custom calls

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


def traffic(text: str, turns: int = 0) -> Traffic:
    """What `compiled.as_text()` says that each device sends and moves in one run of the program.

    A loop that may end early counts in full; of a conditional's branches the one that sends most, or moves most.

    Args:
        turns: of a loop whose length the text doesn't say and that lies in no other such loop: decoding, which ends
            with its responses. 0: such a loop counts once, as one of unknown length.
    """
    computations, entry = _parse(text)
    unknown: set[str] = set()
    bodies: set[str] = set()  # of loops that `turns` is for

    @functools.cache
    def inside(computation: str, outside: bool) -> collections.Counter:
        """(kind, group size, "runs" or "bytes") and _MOVED -> number. `outside`: in no loop of unknown length."""
        total: collections.Counter = collections.Counter()
        instructions = computations.get(computation, {})
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            total[_MOVED] += memory_moved(instruction, instructions, computations)
            if kind in KINDS:
                if computation.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # a TPU's: an all-reduce fused with the slice that each device keeps
                devices = _group_size(instruction.attributes)
                total[kind, devices, "runs"] += 1
                total[kind, devices, "bytes"] += _moved(instruction, instructions)
            elif instruction.opcode == "while":
                trips = _trips(instruction, instructions, computations)
                body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)[1]
                known = trips is not None
                if not known and outside and turns:
                    bodies.add(body)
                elif not known:
                    unknown.add(instruction.name)
                times = trips if known else turns if body in bodies else 1
                for key, count in inside(body, outside and known).items():
                    total[key] += times * count
            elif instruction.opcode == "conditional":
                names = [name for pair in _BRANCHES.findall(instruction.attributes) for name in pair if name]
                branches = [inside(name.strip(" %"), outside) for group in names for name in group.split(",")]
                total += max(branches, key=lambda b: (sum(n for k, n in b.items() if k[2] == "bytes"), b[_MOVED]))
            elif not instruction.opcode.endswith(("-done", "-update")):
                for group in _CALLED.findall(instruction.attributes):
                    for name in group.split(","):
                        called = inside(name.strip(" %"), outside)
                        # What a fusion or a reduction does inside stays on the chip; its own arrays are counted above.
                        total.update({k: n for k, n in called.items() if k != _MOVED or instruction.opcode == "call"})
        return total

    found = inside(entry, True)
    turn = sum((inside(body, False) for body in bodies), collections.Counter())
    keys = sorted({key[:2] for key in found if key != _MOVED})
    return Traffic(
        tuple(Collective(*key, found[*key, "runs"], found[*key, "bytes"]) for key in keys),
        len(unknown),
        found[_MOVED] - turns * turn[_MOVED],
        turn[_MOVED],
        sum(count for key, count in turn.items() if key[2] == "runs"),
        tuple(sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))),
    )


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
    if not _compares_alone(condition, computations):
        return None  # it also ends by what it computes
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


def _compares_alone(condition: dict[str, _Instruction], computations: dict[str, dict[str, _Instruction]]) -> bool:
    """Whether a loop's condition is one comparison of numbers."""
    called = [computations.get(name, {}) for i in condition.values() for name in _CALLS.findall(i.attributes)]
    opcodes = [i.opcode for instructions in (condition, *called) for i in instructions.values()]
    return opcodes.count("compare") == 1 and not {*opcodes} - _COMPARISON


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


# ---------------------------------------------------------------------- memory

_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
         "partition-id", "replica-id", "opt-barrier", "add-dependency"}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place, and which operand is what is written
_PAGED, _CUBLAS = "paged_attention", "__cublas"


def memory_moved(
    instruction: _Instruction, around: dict[str, _Instruction], computations: dict[str, dict[str, _Instruction]]
) -> int:
    """Bytes that it reads from a device's memory and writes there, by the sizes of its operands and results. Of a
    slice, and of an update in place, its part alone; of a TPU nothing that lies on the chip (S(1)). Of attention over
    pages the pages do not count: what it reads of them no text says."""
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return 0
    operands = [around[name] for name in _names(instruction) if name in around]
    result = _lying(instruction.type)
    if instruction.opcode in _SLICES:
        return 2 * result
    if instruction.opcode in _UPDATES:
        at = _UPDATES[instruction.opcode]
        return 2 * _lying(operands[at].type) if len(operands) > at else result
    if instruction.opcode == "custom-call":
        sizes = [_lying(operand.type) for operand in operands]
        if _PAGED in instruction.attributes + instruction.name:
            return result + sum(size for size in sizes if size < max(sizes))
        scratch = (
            sum(map(_lying, re.findall(r"\bs8\[\d+\]", instruction.type))) if _CUBLAS in instruction.attributes else 0
        )
        return result - scratch + sum(sizes)
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        return result  # (operands, results, ...)
    name = _CALLS.search(instruction.attributes)
    if instruction.opcode == "fusion" and name and name[1] in computations:
        return _moved_by_fusion(instruction, operands, computations)
    return result + sum(_lying(operand.type) for operand in operands)


def _moved_by_fusion(
    fusion: _Instruction, operands: list[_Instruction], computations: dict[str, dict[str, _Instruction]]
) -> int:
    name = _CALLS.search(fusion.attributes)[1]
    inside = computations[name]

    def written(instruction: _Instruction | None, size: int) -> int:
        while instruction is not None and instruction.opcode in ("bitcast", "reshape", "convert", "copy"):
            instruction = inside.get(next(iter(_names(instruction)), ""))
        if instruction is None or instruction.opcode not in _UPDATES:
            return size
        update = inside.get(_names(instruction)[_UPDATES[instruction.opcode]])
        return min(size, sum(_arrays(update.type)) if update else size)

    total = sum(_read(name, at, _lying(operand.type), computations) for at, operand in enumerate(operands))
    root = next((i for i in inside.values() if i.root), None)
    if root is not None and root.opcode == "tuple":
        roots = [inside.get(name) for name in _names(root)]
        return total + sum(written(one, _lying(one.type)) for one in roots if one)
    return total + written(root, _lying(fusion.type))


def _read(computation: str, at: int, size: int, computations: dict[str, dict[str, _Instruction]]) -> int:
    """Bytes that a fusion reads of operand number `at`, of that size: its slices, where they are all that is used, also
    by a fusion inside of it (a TPU's); nothing of an array that is updated in place."""
    inside = computations.get(computation, {})

    def used(name: str) -> int:
        if inside[name].root:
            return size  # it is handed on
        total = 0
        for user in inside.values():
            for place, operand in enumerate(_names(user)):
                if operand != name:
                    continue
                if user.opcode in ("bitcast", "reshape"):
                    total += used(user.name)
                elif user.opcode in _SLICES and place == 0:
                    total += sum(_arrays(user.type))
                elif user.opcode == "fusion" and (called := _CALLS.search(user.attributes)):
                    total += _read(called[1], place, size, computations)
                elif user.opcode not in _UPDATES or place:
                    return size
        return total

    whose = (i.name for i in inside.values() if i.opcode == "parameter" and i.operands.strip("()") == str(at))
    return min(sum(map(used, whose)), size) if inside else size


def _lying(type_: str) -> int:
    """Bytes of a type's arrays that lie in the device's memory."""
    shown = re.findall(r"\b[a-z]+\d*[a-z0-9]*\[[\d,]*\](?:\{[^}]*\})?", type_)
    return sum(sum(_arrays(array)) for array in shown if not re.search(r"S\([1-9]\d*\)\}", array))
