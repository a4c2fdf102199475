"""Reading compiled programs: which collectives run, how often, among which devices, and how many bytes they carry."""

import math
import re
from dataclasses import dataclass

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}


@dataclass(frozen=True)
class Collective:
    """One collective instruction: how often it runs, the groups of devices it joins, the bytes of its result."""

    kind: str
    count: int
    groups: tuple[tuple[int, ...], ...]
    bytes: int
    shapes: tuple[tuple[int, ...], ...]


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Device groups in any of HLO's notations."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return tuple(tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs[1]))
    text = re.search(r"replica_groups=(.*)", attributes)[1]
    if axes := re.match(r"mesh\[(.*?)\]\s*\{(.*?)\}", text):
        named = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])]
        assert "(" not in axes[2], f"a part of an axis, which is not read here: {text[:80]}"
        joined = [i for i, (name, _) in enumerate(named) if f"'{name}'" in axes[2]]
        grid = np.arange(devices).reshape([size for _, size in named])
        kept = [i for i in range(len(named)) if i not in joined]
        rows = grid.transpose(kept + joined).reshape(-1, math.prod(named[i][1] for i in joined))
    elif iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(source))
        rows = np.arange(devices).reshape(source).transpose(order).reshape(shape)
    elif re.match(r"\{\{", text):
        rows = [map(int, group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text[: text.index("}}") + 2])]
    else:
        raise AssertionError(f"unknown notation of device groups: {text[:80]}")
    return tuple(tuple(int(x) for x in row) for row in rows)


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", text)
    ]


def collectives(text: str, devices: int) -> list[Collective]:
    """Every collective that a program runs, weighted by the trip counts of the loops around it."""
    computations: dict[str, list[str]] = {}
    entry = name = None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name and line.startswith(" "):
            computations[name].append(line)
    found = []

    def walk(name: str, count: int) -> None:
        for line in computations[name]:
            operation = re.search(r"= (.*?) ([\w\-]+)\(", line)
            if operation is None:
                continue
            kind = operation[2].removesuffix("-start")
            if kind in COLLECTIVES:
                shapes = _shapes(operation[1])
                size = sum(ITEM_BYTES[item] * math.prod(shape) for item, shape in shapes)
                groups = _groups(line[operation.end() :], devices)
                found.append(Collective(kind, count, groups, size, tuple(shape for _, shape in shapes)))
            trips = 1
            if kind == "while":
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                # A loop of unknown length may not communicate: its weight could not be told.
                trips = int(known[1]) if known else None
            for called in re.findall(
                r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line
            ):
                before = len(found)
                walk(called, count * (trips or 1))
                assert trips is not None or len(found) == before, f"a collective in a loop of unknown length: {line}"
            if branches := re.search(r"branch_computations=\{(.*?)\}", line):
                for called in re.findall(r"%?([\w.\-]+)", branches[1]):
                    walk(called, count)

    walk(entry, 1)
    return found
