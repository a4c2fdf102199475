"""``hiso-jax plan``: the cost of a round on devices that are not attached."""

import json
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np
from rich.console import Console

from hiso_jax import algorithms, fed, plan
from hiso_jax.checks import ParameterError, integer
from hiso_jax.cli import errors
from hiso_jax.cli.progress import working
from hiso_jax.experiment import (
    Settings,
    choice_of,
    given_to,
    participation_of,
    recorded_algorithm,
    simulation_config,
    with_training_gb,
)
from hiso_jax.reports import human_bytes, human_count, print_rows

# Any learning rate does, since a rate changes no shape.
RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Plan(Settings):
    """Compile a round for devices that are not attached, and tell what it takes: memory, messages, work, time.

    Attributes:
      target: devices by name and shape: v5e:2x4 for that many chips (v4, v5e, v5p, v6e; needs the extra tpu), or
        h100:1x1x8 for partitions x hosts x GPUs of a host (a100, h100, h200; needs the extra cuda).
      algorithm: method, as for run. The model of a text task is an architecture by name (opt-125m to opt-66b, llama-7b,
        llama-13b, smollm2-135m), a folder with a config.json, or a hub name; no weights are read.
      model_shards: devices that the parameters are split over.
      json: print one JSON object.
    """

    # In the other commands ``target`` is a value of the metric, which a round does not need.
    target: str = ""  # type: ignore[assignment]
    algorithm: str = "hiso"
    model_shards: int = 1
    json: bool = False

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
          ValueError: naming the first option out of range.
        """
        super().__post_init__()
        integer("model_shards", self.model_shards, 1)

    def _check_target(self) -> None:
        if not self.target:
            raise ParameterError("target", f"must be given: {plan.EXAMPLES}")
        plan.chip_of(self.target)


def plan_round(options: Plan, console: Console) -> int:
    """Print the cost of a round, and return the exit code.

    Raises:
      UsageError: the round cannot be compiled for the target.
    """
    with errors.refusing():
        # The target's devices are not attached: the host's processor compiles.
        jax.config.update("jax_platforms", "cpu")
        # A program for absent devices cannot be loaded from the cache of compiled programs.
        jax.config.update("jax_enable_compilation_cache", False)
        method = algorithms.load(options.algorithm)
        algorithm = recorded_algorithm(options, method, RATE)
        given = described(options)
        found = plan.target(options.target)
        config = simulation_config(options, options.seed, algorithm)
        if (config.local_steps or algorithm.local_steps or 1) > 1:
            config = replace(config, local_learning_rate=RATE)
        with working(console, f"compiling for {options.target}"):
            made = plan.plan(given, algorithm, config, found, model_shards=options.model_shards, rate=_rate(options))
    own = {own.name: getattr(options, own.name) for own in fields(options)} | given_to(method, options)
    advice = plan.advise(made, own)
    if options.json:
        print(json.dumps(made.as_dict() | {"advice": advice}))
    else:
        measure = algorithm.measure
        print_rows(console, _rows(made, measure is None or isinstance(measure, fed.Probes)))
        for sentence in advice:
            console.print(sentence, soft_wrap=True, highlight=False)
    return errors.DONE


def _rate(options: Plan) -> str:
    """The precision or dtype by whose rate on the chip matrix products are timed."""
    dtype = getattr(options, "dtype", "float32")
    return options.matmul_precision if dtype == "float32" else dtype


def described(options: Settings) -> fed.RunSpec:
    """The parts of a run with these options, as shapes.

    Raises:
      ValueError: the options name no model.
    """
    chosen = choice_of("task", options)
    shapes = getattr(chosen.factory, "shapes", None)
    if shapes is not None:
        task, params = shapes(**given_to(chosen, options))
    else:
        task = chosen.build(given_to(chosen, options), options.seed)
        params = jax.eval_shape(task.init, jax.random.key(0))
    examples = len(jax.tree.leaves(task.train)[0])
    clients = options.clients
    if getattr(options, "virtual", False) or clients > examples:
        alpha = getattr(options, "alpha", None)
        population: Any = fed.virtual(np.arange(examples, dtype=np.int32) % 2, clients, alpha=alpha)
    else:
        offsets = jax.ShapeDtypeStruct((clients + 1,), np.int32)
        population = fed.Population(jax.ShapeDtypeStruct((examples,), np.int32), offsets)
    return fed.RunSpec(task, params, population, participation_of(with_training_gb(options, task)))


def _rows(made: plan.Plan, runs_forward: bool) -> dict[str, str]:
    memory, mesh = made.memory, made.mesh
    devices = mesh["clients"] * mesh["model"]
    rest = memory.temporaries - memory.directions
    rows = {
        "target": f"{made.target}: {devices} devices, {mesh['clients']} × {mesh['model']} (clients × model)",
        "fits": f"{'yes' if made.fits else 'no'}: {human_bytes(memory.total)} of {human_bytes(memory.usable)} a device",
        "  trained parameters": human_bytes(memory.parameters),
        "  frozen parameters": human_bytes(memory.frozen),
        "  optimizer, curvature": human_bytes(memory.state),
        "  data": human_bytes(memory.data),
        "  directions, Δ": f"{human_bytes(memory.directions)} at most, by arithmetic",
        "  activations, batches": f"{human_bytes(rest)}, the rest of what is temporary",
    }
    for axes in dict.fromkeys(own.axes for own in made.messages):
        group = [own for own in made.messages if own.axes == axes]
        kinds = " and ".join(f"{own.count:,} {own.kind}" for own in group)
        sizes = human_bytes(sum(own.bytes for own in group)), human_bytes(max(own.largest for own in group))
        rows[f"across {axes}"] = f"{kinds} a round, {sizes[0]}, the largest {sizes[1]}"
    if not made.messages:
        rows["across devices"] = "nothing"
    ratio = made.flops / max(made.floor_flops, 1)
    floor = "the forward passes alone" if runs_forward else "the forward passes, of which a training step makes three"
    rows["products"] = f"{human_count(made.flops)}FLOP a round and device, {ratio:.3f} of {floor}"
    rows["memory traffic"] = f"{human_bytes(made.bytes_moved)} a round and device"
    seconds = made.seconds
    limit = max(("products", "memory", "links"), key=lambda part: seconds[part])
    parts = ", ".join(f"{part} {_duration(seconds[part])}" for part in ("products", "memory", "links"))
    rows["time"] = f"from {_duration(seconds['round'])} a round, at published rates, held by {limit} ({parts})"
    rows["walls"] = f"{made.pins[1]} in the program, {made.pins[0]} as lowered"
    rows["large copies"] = ", ".join(map(human_bytes, made.copies)) or "none larger than the largest parameter"
    rows["compiled in"] = f"{made.compile_seconds:.0f} s"
    return rows


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
