"""A reader of a compiled program's text: which instructions run, how often, and the size of its products.

XLA's own cost analysis counts the body of a loop once, but a round consists of loops. Here, every instruction runs as
often as the product of the trip counts of the loops around it. A conditional runs the branch with the most matrix
products, or else the longest branch.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from hiso_jax.fed.devices import inner_jaxprs
from hiso_jax.stacked import ONE_TURN

ITEM_BYTES = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
PRODUCTS = ("dot", "convolution")
# Prefixes of XLA's calls to GPU libraries → the operation.
LIBRARIES = {"__cublas$": "dot", "__cudnn$conv": "convolution"}
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b(pred|bf16|c64|f8e4m3fn|f8e5m2|[suf]\d+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:to_apply|calls|called_computations=\{)=?%?([\w.\-]+)")


class Shape(NamedTuple):
    """The shape of an array in a program.

    Attributes:
      kind: XLA's name for the type of its items.
      dims: its dimensions.
      is_near: whether it is in the fast memory beside the processor (TPU's VMEM) and not in the device's own memory.
    """

    kind: str
    dims: tuple[int, ...]
    is_near: bool = False

    @property
    def bytes(self) -> int:
        """Its bytes without padding."""
        return ITEM_BYTES[self.kind] * math.prod(self.dims)


def shapes_in(text: str) -> list[Shape]:
    """The shapes of all arrays in a type, those of a tuple in order."""
    return [
        Shape(kind, tuple(int(n) for n in dims.split(",") if n), re.search(r"S\(\d", layout) is not None)
        for kind, dims, layout in _ARRAY.findall(text)
    ]


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: its name in its computation.
      type: the type of its result, as the program's text has it.
      operation: ``dot``, ``while``, …
      operands: the names of its operands.
      attributes: the rest of its line.
      is_root: whether its result is the result of its computation.
    """

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of its result."""
        return shapes_in(self.type)

    @property
    def product(self) -> str | None:
        """``dot`` or ``convolution`` if the instruction or its library call is one; else None."""
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
      instruction: the instruction.
      times: how often it runs.
      computation: the computation that contains it.
      is_fused: whether it is inside a fusion, where only the fusion's own operands and result are in memory.
      is_counted: whether the trip counts of all loops around it are known; an unknown trip count is taken as 1.
    """

    instruction: Instruction
    times: int
    computation: Computation
    is_fused: bool
    is_counted: bool

    def operand_shapes(self) -> list[Shape]:
        """The shapes of its operands."""
        known = [self.computation[name] for name in self.instruction.operands if name in self.computation]
        return [shape for operand in known for shape in operand.shapes]


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: the computations by name.
      entry: the name of the computation that runs first.
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
            # Reductions and sorts are not entered: the computation for each pair is part of the instruction.
            elif instruction.operation in ("fusion", "call", "async-start", "custom-call"):
                for called in _CALLED.findall(instruction.attributes):
                    if called in self.computations:
                        fused = is_fused or instruction.operation == "fusion"
                        yield from self._walk(called, times, fused, is_counted)

    def trip_count(self, loop: Instruction) -> int | None:
        """The trip count of a loop: from XLA, from its condition ``counter < constant``, or 1 if its scope says so.

        None if it is unknown.
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
        """The name of the computation of a fusion."""
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
    """The program in the text that ``jax.stages.Compiled.as_text`` returns."""
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
    """The text in the parentheses that open before ``begin``, and the text after them."""
    depth = 1
    for place in range(begin, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if not depth:
            return line[begin:place], line[place + 1 :]
    return line[begin:], ""


def flops_of_function(function: Callable[..., Any], *arguments: Any) -> int:
    """The operations of one call with arguments of these shapes; a conditional counts its most expensive branch."""
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    result: Any = equation.outvars[0].aval if equation.outvars else None
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(result.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(result.shape) * math.prod(kernel) // kernel[outputs]
    inner = inner_jaxprs(equation)
    if name == "cond":
        return max(map(_of, inner))
    return sum(map(_of, inner)) * (params["length"] if name == "scan" else 1)
