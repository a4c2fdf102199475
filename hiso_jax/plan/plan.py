"""The plan of a round on any devices: its memory, its messages, its work, and a lower bound of its time."""

import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from hiso_jax import fed
from hiso_jax.checks import ParameterError, first_line
from hiso_jax.fed.devices import CLIENTS, MODEL
from hiso_jax.fed.run import DescribedRun, RunSpec, describe
from hiso_jax.fed.task import bind, frozen_of
from hiso_jax.plan.collectives import Collective, collectives
from hiso_jax.plan.hlo import flops_of_function, read
from hiso_jax.plan.targets import Target
from hiso_jax.plan.work import Work, work_of
from hiso_jax.zo import PIN, working_dtype

# The trip count of the loop over rounds in the compiled program: XLA makes no loop of one turn.
ROUNDS = 2
# The share of a device's memory that a cohort may take, as in a run.
BUDGET_SHARE = 0.25


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters: the trained parameters.
      frozen: the parameters that are not trained.
      state: the optimizer state, including the curvature.
      data: training and test examples, the population.
      directions: a direction and Δ, or all directions that are kept; a part of ``temporaries``, estimated by
        arithmetic.
      temporaries: those of the compiled program, including ``directions``; the rest is activations, batches and the
        like.
      total: the peak, as the compiler reports it.
      usable: the memory of the device that a program may take.
    """

    parameters: int
    frozen: int
    state: int
    data: int
    directions: int
    temporaries: int
    total: int
    usable: int

    @property
    def fits(self) -> bool:
        """Whether the round fits."""
        return self.total <= self.usable


@dataclass(frozen=True)
class Messages:
    """The data that devices send each other along the same axes of the mesh in a round.

    Attributes:
      axes: the axes of the mesh.
      kind: XLA's name for the collective.
      count: how often it runs.
      bytes: the bytes of all results on one device.
      largest: the bytes of the largest result.
    """

    axes: str
    kind: str
    count: int
    bytes: int
    largest: int


@dataclass(frozen=True)
class Plan:
    """The resources of a round, for one device unless stated otherwise.

    Attributes:
      target: the name of the devices.
      mesh: clients × model.
      memory: bytes of memory.
      messages: the data sent between devices.
      flops: floating-point operations of matrix products and convolutions, as compiled.
      floor_flops: those of the passes that the measure counts, for each batch of the device's clients: K·(P + 1) for
        forward differences, 3·K for projections, of which the forward passes are a third.
      bytes_moved: bytes read from and written to the device's memory.
      seconds: seconds of products, memory and links at the published rates; the longest of the three is the round's.
        This is a lower bound: one H200 took 1.4 to 3.4 times the seconds of the plan for an H100.
      pins: the number of pins in the lowered program, and in the compiled program.
      copies: the bytes of each copied array that is larger than the largest parameter on the device.
      compile_seconds: the seconds of compilation on this machine.
    """

    target: str
    mesh: dict[str, int]
    memory: Memory
    messages: tuple[Messages, ...]
    flops: int
    floor_flops: int
    bytes_moved: int
    seconds: dict[str, float]
    pins: tuple[int, int]
    copies: tuple[int, ...]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the round fits the device's memory."""
        return self.memory.fits

    def as_dict(self) -> dict[str, Any]:
        """The plan in the form that JSON holds."""
        memory = asdict(self.memory) | {"fits": self.memory.fits}
        return asdict(self) | {"memory": memory, "floor_ratio": self.flops / max(self.floor_flops, 1)}


def plan(
    given: RunSpec,
    tx: fed.Algorithm | optax.GradientTransformation,
    config: fed.SimulationConfig,
    target: Target,
    *,
    model_shards: int = 1,
    rate: str = "high",
) -> Plan:
    """Compile a round for any devices from shapes alone, present or not, and read the program.

    Args:
      given: the task, its initial parameters, the population and the participation; only their shapes are read.
      tx: the method.
      config: the configuration of the run; a dispatch of two rounds is compiled.
      target: the devices.
      model_shards: the number of devices over which the parameters are split.
      rate: the rate of the chip that times products: ``"bfloat16"``, or a precision of float32.

    Raises:
      ValueError: a simulation or :func:`hiso_jax.fed.make_mesh` would raise it, or XLA cannot compile the round.
    """
    mesh = fed.make_mesh(list(target.devices), model_shards=model_shards)
    begin = time.perf_counter()
    config = replace(config, rounds=ROUNDS, eval_every=ROUNDS, rounds_per_dispatch=ROUNDS)
    run = describe(given, tx, config, mesh, memory_budget=int(BUDGET_SHARE * target.usable))
    with run.prepared.on_mesh():
        lowered = run.dispatch.lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            reason = first_line(error)[:200]
            raise ParameterError(
                "target", f"{target.name}: XLA cannot compile this round for it from here: {reason}"
            ) from error
    seconds = time.perf_counter() - begin
    program = read(compiled.as_text())
    rounds = run.prepared.length
    work, found = work_of(program), list(collectives(program, mesh))
    floor = _floor(run, mesh)
    own_largest = max((_on_one(leaf) for leaf in jax.tree.leaves(run.state.server.params)), default=0)
    return Plan(
        target=target.name,
        mesh=dict(mesh.shape),
        memory=_memory(run, compiled.memory_analysis(), target),
        messages=_messages(found, rounds),
        flops=work.flops // rounds,
        floor_flops=floor,
        bytes_moved=work.bytes // rounds,
        seconds=_seconds(work, found, target, rate, rounds),
        pins=(_lowered_pins(lowered.as_text(debug_info=True)), work.pins),
        copies=tuple(size for size in work.copies if size > own_largest),
        compile_seconds=seconds,
    )


def _on_one(leaf: Any) -> int:
    """Bytes of an array on one device."""
    shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf.sharding, NamedSharding) else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def _bytes(tree: PyTree) -> int:
    return sum(_on_one(leaf) for leaf in jax.tree.leaves(tree))


def _memory(run: DescribedRun, said: Any, target: Target) -> Memory:
    server, inputs = run.state.server, run.prepared.inputs
    total = (
        said.argument_size_in_bytes
        + said.output_size_in_bytes
        - said.alias_size_in_bytes
        + said.temp_size_in_bytes
        + said.generated_code_size_in_bytes
    )
    one = sum(
        _on_one(leaf) // leaf.dtype.itemsize * working_dtype(leaf).itemsize for leaf in jax.tree.leaves(server.params)
    )
    return Memory(
        parameters=_bytes(server.params),
        frozen=_bytes(inputs.frozen),
        state=_bytes(server.state),
        data=_bytes((inputs.train, inputs.population, run.prepared.test)),
        directions=min(one, said.temp_size_in_bytes),
        temporaries=said.temp_size_in_bytes,
        total=total,
        usable=target.usable,
    )


def _messages(found: list[Collective], rounds: int) -> tuple[Messages, ...]:
    kinds = sorted({(own.axes, own.kind) for own in found})
    grouped: Mapping[Any, list[Collective]] = {
        kind: [own for own in found if (own.axes, own.kind) == kind] for kind in kinds
    }
    return tuple(
        Messages(
            axes="×".join(axes),
            kind=kind,
            count=sum(own.times for own in group) // rounds,
            bytes=sum(own.times * own.bytes for own in group) // rounds,
            largest=max(own.bytes for own in group),
        )
        for (axes, kind), group in grouped.items()
    )


def _floor(run: DescribedRun, mesh: Mesh) -> int:
    """Floating-point operations of the forward passes of one device's clients."""
    prepared, config = run.prepared, run.prepared.config
    clients = -(-config.answers // mesh.shape[CLIENTS])
    rows = clients * config.batch_size
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), prepared.task.train)
    params, frozen = run.state.server.params, frozen_of(prepared.task)
    one = flops_of_function(lambda p, f, b: bind(prepared.task.loss, f)(p, b), params, frozen, batch)
    evaluations = prepared.estimator.measure.passes(
        prepared.estimator.local_steps, prepared.estimator.num_perturbations
    )
    return one * evaluations // mesh.shape[MODEL]


def _seconds(work: Work, found: list[Collective], target: Target, rate: str, rounds: int) -> dict[str, float]:
    chip = target.chip
    sent = sum(own.times * own.bytes for own in found)
    parts = {
        "products": work.flops / getattr(chip, rate) / rounds,
        "memory": work.bytes / chip.bandwidth / rounds,
        "links": sent / chip.links / rounds,
    }
    return parts | {"round": max(parts.values())}


def _lowered_pins(text: str) -> int:
    """The number of pins in the text of a lowered program, printed with its locations."""
    places = dict(re.findall(r'^(#loc\d+) = loc\("([^"]*)"', text, re.MULTILINE))
    walls = re.findall(r"stablehlo\.(?:reduce_precision|minimum)\b.*loc\((#loc\d+)\)", text)
    return Counter(PIN in places.get(place, "").split("/") for place in walls)[True]
