"""Advice: changes that make a round fit in memory, by arithmetic, or run faster."""

from collections.abc import Iterator, Mapping
from typing import Any

from hiso_jax.plan.plan import Plan

GB = 1e9
# The largest number of model shards to try.
MOST_SHARDS = 64


def advise(plan: Plan, options: Mapping[str, Any]) -> list[str]:
    """Sentences of advice, the simplest change first; empty if there is no advice.

    Args:
      plan: the plan of a round.
      options: the options of the round: ``directions``, ``param_dtype``, ``curvature_dtype`` and the like, if it has
        them.
    """
    return list(_to_fit(plan, options) if not plan.fits else _to_gain(plan, options))


def _to_fit(plan: Plan, options: Mapping[str, Any]) -> Iterator[str]:
    memory, over = plan.memory, plan.memory.total - plan.memory.usable
    saved = 0
    for option, value, gain in _savings(plan, options):
        saved += gain
        enough = "it fits then" if saved >= over else f"it still lacks {(over - saved) / GB:.1f} GB"
        yield f"{option} {value} saves about {gain / GB:.1f} GB on a device; {enough}"
        if saved >= over:
            return
    devices, shards = plan.mesh["clients"] * plan.mesh["model"], plan.mesh["model"]
    split = memory.parameters + memory.frozen + memory.state + memory.directions
    wanted = shards
    while wanted < min(devices, MOST_SHARDS):
        wanted *= 2
        if split * (1 - shards / wanted) + saved >= over and devices % wanted == 0:
            left = split * shards / wanted / GB
            yield f"--model-shards {wanted} leaves {left:.1f} GB of parameters and the like on a device; it fits then"
            return
    yield f"it does not fit on {devices} such devices: use more devices, or train adapters (--trainable lora)"


def _savings(plan: Plan, options: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    memory = plan.memory
    if options.get("directions") == "keep":
        yield "--directions", "regenerate", memory.directions
    if options.get("curvature_dtype") == "float32" and memory.state > memory.parameters // 4:
        yield "--curvature-dtype", "bfloat16", memory.state // 2
    if options.get("param_dtype") == "float32":
        yield "--param-dtype", "bfloat16", (memory.parameters + memory.frozen) // 2


def _to_gain(plan: Plan, options: Mapping[str, Any]) -> Iterator[str]:
    memory = plan.memory
    room = memory.usable - memory.total
    if (
        options.get("directions") == "regenerate"
        and options.get("sampler") != "hadamard"
        and (options.get("local_steps") or 1) == 1
        and memory.directions < room
    ):
        more = memory.directions / GB
        yield f"--directions keep makes each direction once and takes about {more:.1f} GB more, which fit"
    if plan.mesh["model"] > 1:
        whole = (memory.parameters + memory.frozen + memory.state + memory.directions) * (plan.mesh["model"] - 1)
        if whole < room:
            yield "--model-shards 1 fits, too, and nothing is sent between the devices but scalars"
