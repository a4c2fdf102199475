"""A compiled program's text, read: which instructions run, and how often.

XLA's own cost analysis counts the body of a loop once, and a round is loops. Here every instruction has the number of
times that it runs, the trip counts of the loops around it multiplied; of a conditional the branch with the most matrix
products, or else the longer one, is taken to run.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hiso_jax.stacked import ONE_TURN

ITEM_BYTES = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
PRODUCTS = ("dot", "convolution")
# What XLA hands to the libraries of a GPU.
LIBRARIES = {"__cublas$": "dot", "__cudnn$conv": "convolution"}
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b(pred|bf16|c64|f8e4m3fn|f8e5m2|[suf]\d+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:to_apply|calls|called_computations=\{)=?%?([\w.\-]+)")


class Shape(NamedTuple):
    """An array of a program.

    Attributes:
      kind: of its items, as XLA names it.
      dims: its lengths.
      is_near: whether it lives in the fast memory beside the processor (TPU's VMEM) and not in the device's own.
    """

    kind: str
    dims: tuple[int, ...]
    is_near: bool = False

    @property
    def bytes(self) -> int:
        """Without any padding."""
        return ITEM_BYTES[self.kind] * math.prod(self.dims)


def shapes_in(text: str) -> list[Shape]:
    """Every array of a type, a tuple's one after the other."""
    return [
        Shape(kind, tuple(int(n) for n in dims.split(",") if n), re.search(r"S\(\d", layout) is not None)
        for kind, dims, layout in _ARRAY.findall(text)
    ]


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: in its computation.
      type: of its result, as the program has it.
      operation: ``dot``, ``while``, …
      operands: the names of what it reads.
      attributes: the rest of its line.
      is_root: whether its result is its computation's.
    """

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def shapes(self) -> list[Shape]:
        """Of its result."""
        return shapes_in(self.type)

    @property
    def product(self) -> str | None:
        """Whether it is a ``dot`` or a ``convolution``, by itself or by a library; None of anything else."""
        if self.operation in PRODUCTS:
            return self.operation
        if self.operation != "custom-call":
            return None
        found = (kind for name, kind in LIBRARIES.items() if f'custom_call_target="{name}' in self.attributes)
        return next(found, None)

    @property
    def scope(self) -> str:
        """The path of JAX's scopes in which it was traced."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


class Run(NamedTuple):
    """An instruction that runs.

    Attributes:
      instruction: itself.
      times: how often it runs.
      computation: in which it stands.
      is_fused: whether it is inside a fusion, where nothing but the fusion's own operands and result is in memory.
      is_counted: whether the turns of all loops around it are known; those of others count as one.
    """

    instruction: Instruction
    times: int
    computation: Computation
    is_fused: bool
    is_counted: bool

    def operand_shapes(self) -> list[Shape]:
        """Of what it reads."""
        known = [self.computation[name] for name in self.instruction.operands if name in self.computation]
        return [shape for operand in known for shape in operand.shapes]


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the name of the one that runs first.
    """

    computations: Mapping[str, Computation]
    entry: str

    def __iter__(self) -> Iterator[Run]:
        """Every instruction that runs, in no particular order."""
        yield from self._walk(self.entry, 1, False, True)

    def _walk(self, name: str, times: int, is_fused: bool, is_counted: bool) -> Iterator[Run]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Run(instruction, times, computation, is_fused, is_counted)
            if instruction.operation == "while":
                turns = self.trip_count(instruction)
                inside = times * (1 if turns is None else turns), is_fused, is_counted and turns is not None
                for part in ("body", "condition"):
                    yield from self._walk(self._named(instruction, part), *inside)
            elif instruction.operation == "conditional":
                chosen = max(self._branches(instruction), key=self._weight)
                yield from self._walk(chosen, times, is_fused, is_counted)
            # What a reduction or a sort applies to each pair is part of it.
            elif instruction.operation in ("fusion", "call", "async-start", "custom-call"):
                for called in _CALLED.findall(instruction.attributes):
                    if called in self.computations:
                        fused = is_fused or instruction.operation == "fusion"
                        yield from self._walk(called, times, fused, is_counted)

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a loop turns: as XLA says, by its condition ``counter < constant``, or once if its scope says so.

        None where nothing tells.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self.computations[self._named(loop, "condition")]
        root = next(instruction for instruction in condition.values() if instruction.is_root)
        bound = condition.get(root.operands[1]) if root.operation == "compare" else None
        if bound is not None and bound.operation == "constant" and bound.operands and "direction=LT" in root.attributes:
            return int(bound.operands[0])
        return 1 if ONE_TURN in loop.scope.split("/") else None

    def called(self, fusion: Instruction) -> str:
        """The name of what a fusion computes."""
        return self._named(fusion, "calls")

    def _named(self, instruction: Instruction, part: str) -> str:
        found = re.search(rf"\b{part}=%?([\w.\-]+)", instruction.attributes)
        assert found is not None, f"{instruction.name} has no {part}"
        return found[1]

    def _branches(self, instruction: Instruction) -> list[str]:
        if listed := re.search(r"branch_computations=\{(.*?)\}", instruction.attributes):
            return re.findall(r"%?([\w.\-]+)", listed[1])
        return [self._named(instruction, part) for part in ("true_computation", "false_computation")]

    def _weight(self, name: str) -> tuple[int, int]:
        runs = list(self._walk(name, 1, False, True))
        return sum(run.times for run in runs if run.instruction.product), len(runs)


def read(text: str) -> Program:
    """A compiled program's text, as ``jax.stages.Compiled.as_text`` gives it."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            inside, attributes = _split(line, found.end())
            operands = re.findall(r"%([\w.\-]+)", inside)
            if found[4] in ("constant", "parameter"):
                operands = re.findall(r"^-?\d+$", inside.strip())
            instruction = Instruction(found[2], found[3], found[4], tuple(operands), attributes, bool(found[1]))
            computations[name][instruction.name] = instruction
    return Program(computations, entry)


def _split(line: str, begin: int) -> tuple[str, str]:
    """What stands in the parentheses that open before ``begin``, and after they close."""
    depth = 1
    for place in range(begin, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if not depth:
            return line[begin:place], line[place + 1 :]
    return line[begin:], ""
