"""Collectives of a compiled program, read from its text: which, how often, how many bytes.

A loop's body counts as often as XLA knows the loop to run (layers, chunks of the head); a loop whose count it
does not know counts once and is named.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\})")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\(\d+\)(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind over groups of one size, summed over a program."""

    kind: str
    group: int
    """Devices that take part."""
    count: int
    received: float
    """Bytes that each device gets from the others, by the ring algorithms."""


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """All of a program."""

    found: tuple[Collective, ...]
    open_loops: int
    """Loops with collectives whose number of turns is not known; each was counted once."""

    @property
    def received(self) -> float:
        """Bytes that each device gets."""
        return sum(one.received for one in self.found)


def collectives(text: str) -> Collectives:
    """Of one program's optimised HLO text (``compiled.as_text()``)."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            bodies[current] = []
            entry = current if header[1] else entry
        elif current and (instruction := _INSTRUCTION.match(line)):
            bodies[current].append((instruction[1], instruction[2], line))
    memo: dict[str, tuple[Mapping[tuple[str, int], tuple[int, float]], int]] = {}

    def totals(name: str):
        if name in memo:
            return memo[name]
        sums: defaultdict[tuple[str, int], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        loops = 0
        for shape, op, line in bodies.get(name, ()):
            kind = op.removesuffix("-start")
            if kind in KINDS:
                group = _group_size(line)
                count, size = sums[kind, group]
                sums[kind, group] = (count + 1, size + _received(kind, group, shape, op))
            for inner in _called(line):
                trips = _TRIPS.search(line)
                times = int(trips[1]) if trips and op == "while" else 1
                found, inside = totals(inner)
                loops += inside + (1 if found and op == "while" and not trips else 0)
                for key, (count, size) in found.items():
                    before = sums[key]
                    sums[key] = (before[0] + times * count, before[1] + times * size)
        memo[name] = (dict(sums), loops)
        return memo[name]

    found, loops = totals(entry)
    lines = [
        Collective(kind=kind, group=group, count=count, received=size)
        for (kind, group), (count, size) in sorted(found.items())
    ]
    return Collectives(found=tuple(lines), open_loops=loops)


def _called(line: str) -> list[str]:
    names = []
    for match in _CALLED.finditer(line):
        names += [name.strip().lstrip("%") for name in match[1].strip("{}").split(",")]
    return names


def _group_size(line: str) -> int:
    if named := _MESH_GROUPS.search(line):
        sizes = {name: int(size or 1) for name, size, _ in _AXIS.findall(named[1])}
        # An axis, or a part of one as 'axis':(before)size.
        return math.prod(int(part or sizes[name]) for name, _, part in _AXIS.findall(named[2]))
    match = _GROUPS.search(line)
    if match is None:
        return 2 if "source_target_pairs" in line else 1
    return int(match[2]) if match[2] else len(match[3].split(","))


def _received(kind: str, group: int, shape: str, op: str) -> float:
    sizes = [
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _SHAPE.findall(shape)
    ]
    if (
        op.endswith("-start")
        and kind in ("all-gather", "reduce-scatter", "collective-permute")
        and len(sizes) > 1
    ):
        # Its result names the operands too, first.
        sizes = sizes[len(sizes) // 2 :]
    size = float(sum(sizes))
    others = (group - 1) / group
    return size * {
        "all-gather": others, "all-to-all": others, "all-reduce": 2 * others, "reduce-scatter": group - 1.0,
        "collective-permute": 1.0,
    }[kind]  # fmt: skip
