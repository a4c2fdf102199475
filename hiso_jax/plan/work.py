"""The work of a compiled program: products, bytes, pins and copies."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hiso_jax.plan.hlo import Computation, Instruction, Program, Run, Shape
from hiso_jax.zo import PIN

# Operations that only name or relabel memory, or whose called computations are counted.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-done", "copy-done", "domain", "iota",
)  # fmt: skip


SLICES = ("dynamic-slice", "gather")
UPDATE = "dynamic-update-slice"


class Work(NamedTuple):
    """The work of one device in one run of a program.

    Attributes:
      flops: floating-point operations of its matrix products and convolutions, a multiplication and an addition two.
      bytes: bytes read from and written to the device's own memory by every instruction that is not inside a fusion.
      pins: the number of pins in the program.
      copies: the bytes of each copied array, the largest first.
    """

    flops: int
    bytes: int
    pins: int
    copies: tuple[int, ...]


def work_of(program: Program) -> Work:
    """The work of ``program``."""
    flops, moved, pins, copies = 0, 0, 0, []
    for run in program:
        instruction = run.instruction
        flops += run.times * flops_of(run)
        pins += _is_pin(run)
        if run.is_fused or instruction.operation in FREE:
            continue
        moved += run.times * _moved(run, program)
        if instruction.operation in ("copy", "copy-start"):
            copies.append(max((shape.bytes for shape in instruction.shapes), default=0))
    return Work(flops, moved, pins, tuple(sorted(copies, reverse=True)))


def _is_pin(run: Run) -> bool:
    """Whether an instruction is a pin: ``reduce_precision``, or a minimum where XLA would remove that."""
    inside = f"/{PIN}/" in f"/{run.instruction.scope}"
    return inside and run.instruction.operation in ("reduce-precision", "minimum")


def _far(shapes: Iterable[Shape]) -> int:
    return sum(shape.bytes for shape in shapes if not shape.is_near)


def _moved(run: Run, program: Program) -> int:
    """Bytes that an instruction reads and writes; of an array that it reads or writes in part, only that part."""
    instruction, computation = run.instruction, run.computation
    if instruction.operation in SLICES:
        return 2 * _far(instruction.shapes)
    if instruction.operation == UPDATE:
        return 2 * _far(computation[instruction.operands[1]].shapes) if len(instruction.operands) > 1 else 0
    if instruction.operation != "fusion":
        return _far(instruction.shapes) + _far(run.operand_shapes())
    inside = program.computations[program.called(instruction)]
    read = sum(
        _read(inside, number, _far(computation[name].shapes))
        for number, name in enumerate(instruction.operands)
        if name in computation
    )
    return read + _written(inside, _far(instruction.shapes))


def _users(inside: Computation, name: str) -> Iterator[Instruction]:
    """The instructions that read a value in a fusion, looking through those that only relabel it."""
    for instruction in inside.values():
        if name in instruction.operands:
            if instruction.operation in ("bitcast", "reshape"):
                yield from _users(inside, instruction.name)
            else:
                yield instruction


def _read(inside: Computation, number: int, whole: int) -> int:
    """Bytes that a fusion reads of its operand ``number``, whose size is ``whole``."""
    own = next((i for i in inside.values() if i.operation == "parameter" and i.operands == (str(number),)), None)
    users = [] if own is None else list(_users(inside, own.name))
    if users and all(user.operation in (*SLICES, UPDATE) for user in users):
        return min(whole, sum(_far(user.shapes) for user in users if user.operation in SLICES))
    return whole


def _written(inside: Computation, whole: int) -> int:
    """Bytes that a fusion writes of its result, whose size is ``whole``."""
    root = next(instruction for instruction in inside.values() if instruction.is_root)
    ends = [inside[name] for name in root.operands if name in inside] if root.operation == "tuple" else [root]
    updates = [end for end in ends if end.operation == UPDATE]
    in_part = sum(_far(inside[end.operands[1]].shapes) - _far(end.shapes) for end in updates)
    return max(0, whole + in_part)


def flops_of(run: Run) -> int:
    """The operations of a matrix product or a convolution; 0 for other instructions."""
    instruction = run.instruction
    if instruction.product is None:
        return 0
    size, operands = math.prod(instruction.shapes[0].dims), run.operand_shapes()
    if instruction.product == "dot":
        axes = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]', instruction.attributes)
        contracted = re.findall(r"\d+", axes[1]) if axes else []
        return 2 * size * math.prod(operands[0].dims[int(axis)] for axis in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0
    window = re.search(r"window=\{size=([\dx]+)", instruction.attributes)
    sizes = [int(n) for n in window[1].split("x")] if window else []
    return 2 * size * operands[1].dims[labels[2].index("i")] * math.prod(_touched(instruction.attributes, sizes))


def _touched(attributes: str, sizes: list[int]) -> list[int]:
    """The number of window positions that a result sums, along each axis."""
    dilated = re.search(r"lhs_dilate=([\dx]+)", attributes)
    factors = [int(n) for n in dilated[1].split("x")] if dilated else [1] * len(sizes)
    # A batch dimension written as a window over a dilated axis meets only one position.
    return [max(1, math.ceil(size / factor)) for size, factor in zip(sizes, factors, strict=True)]
