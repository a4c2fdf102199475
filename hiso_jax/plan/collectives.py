"""The collectives of a compiled program: how often they run, how many bytes they send, along which axes of the mesh."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from hiso_jax.plan.hlo import Program, Shape, shapes_in

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


class Collective(NamedTuple):
    """An instruction that sends data between devices.

    Attributes:
      kind: XLA's name for it.
      axes: the axes of the mesh along which it joins devices.
      times: how often it runs.
      shapes: the shapes of its result.
      scope: the scope in which it was traced.
    """

    kind: str
    axes: tuple[str, ...]
    times: int
    shapes: tuple[Shape, ...]
    scope: str

    @property
    def bytes(self) -> int:
        """The bytes of its result on one device, each time it runs."""
        return sum(shape.bytes for shape in self.shapes)


def collectives(program: Program, mesh: Mesh) -> Iterator[Collective]:
    """Every collective that joins more than one device.

    Raises:
      ValueError: a collective is in a loop with an unknown trip count, or its devices have an unknown notation.
    """
    for run in program:
        instruction = run.instruction
        kind = instruction.operation.removesuffix("-start")
        if kind in KINDS:
            axes = _axes(groups_of(instruction.attributes, mesh.size), mesh)
            if axes:
                if not run.is_counted:
                    raise ValueError(f"a collective stands in a loop of unknown length: {instruction.name}")
                shapes = _result(instruction.type, kind, instruction.operation != kind)
                yield Collective(kind, axes, run.times, tuple(shapes), instruction.scope)


def _result(text: str, kind: str, started: bool) -> list[Shape]:
    """The arrays that a collective returns; if it starts asynchronously, its type is (operands, results, …)."""
    shapes = shapes_in(text)
    if not started or kind == "all-reduce" or not text.startswith("("):
        return shapes
    parts = _parts(text[1:-1])
    return shapes_in(parts[1]) if len(parts) > 1 else shapes


def _parts(text: str) -> list[str]:
    depth, begin, parts = 0, 0, []
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and not depth:
            parts.append(text[begin:place])
            begin = place + 1
    return [*parts, text[begin:]]


def _axes(groups: list[tuple[int, ...]], mesh: Mesh) -> tuple[str, ...]:
    """The axes along which the devices of some group differ."""
    places = np.unravel_index(np.arange(mesh.size), mesh.devices.shape)
    differ = {
        name
        for group in groups
        for name, own in zip(mesh.axis_names, places, strict=True)
        if len(set(own[list(group)])) > 1
    }
    return tuple(name for name in mesh.axis_names if name in differ)


def groups_of(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """The devices of each instance of a collective, from any of XLA's notations.

    Raises:
      ValueError: the notation is unknown.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return [(int(source), int(target)) for source, target in re.findall(r"(\d+),(\d+)", pairs[1] + "}")]
    found = re.search(r"replica_groups=(.*)", attributes)
    text = found[1] if found else "{}"
    if text.startswith("{}"):
        return [tuple(range(devices))]
    if axes := re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))?\s*\{(.*?)\}", text):
        named = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])]
        if "(" in axes[3]:
            raise ValueError(f"a collective along a part of an axis is not read: {text[:80]}")
        joined = [i for i, (name, _) in enumerate(named) if f"'{name}'" in axes[3]]
        kept = [i for i in range(len(named)) if i not in joined]
        order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", axes[2] or "")
        grid = (_iota(devices, order[1], order[2]) if order else np.arange(devices)).reshape([n for _, n in named])
        rows = grid.transpose(kept + joined).reshape(-1, math.prod(named[i][1] for i in joined))
    elif iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        rows = _iota(devices, iota[2], iota[3]).reshape([int(n) for n in iota[1].split(",")])
    elif text.startswith("{{"):
        listed = text[: text.index("}}") + 2]
        return [tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed)]
    else:
        raise ValueError(f"an unknown notation of groups of devices: {text[:80]}")
    return [tuple(int(n) for n in row) for row in rows]


def _iota(devices: int, dims: str, order: str | None) -> np.ndarray:
    """All devices in a shape with permuted axes: XLA's ``[4,2]T(1,0)``."""
    shape = [int(n) for n in dims.split(",")]
    return np.arange(devices).reshape(shape).transpose([int(n) for n in order.split(",")] if order else None)
