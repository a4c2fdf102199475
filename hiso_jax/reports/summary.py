"""The figures of a finished run."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from hiso_jax import fed


def reached(result: fed.Result, metric: fed.Metric, target: float | None) -> fed.Evaluation | None:
    """The first evaluation at which the run's metric has reached ``target`` for good (see ``first_at_target``)."""
    if target is None:
        return None
    values = [metric.sign * row.metrics[metric.name] for row in result.metrics]
    index = fed.first_at_target(values, metric.sign * target)
    return None if index is None else result.metrics[index]


def sharding(result: fed.Result) -> dict[str, Any]:
    """The number of devices, and how the cohort and the parameters were split over them."""
    shards = result.mesh_shape.get("clients", 1)
    cohort = sum(result.attendance.values()) // max(result.rounds, 1)
    each = -(-cohort // shards)
    return {
        "device_count": math.prod(result.mesh_shape.values()),
        "process_count": jax.process_count(),
        "mesh": {"clients": shards, "model": result.mesh_shape.get("model", 1)},
        "cohort_per_device": each,
        "cohort_padding": each * shards - cohort,
    }


class Asked(NamedTuple):
    """The description of a run for its summary.

    Attributes:
      task, algorithm: their names.
      learning_rate: η, or None if it is not recorded.
      seed: the seed of the run.
      metric: the metric that counts.
      target: the value of the metric at which methods are compared, or None.
      attacked_by: a description of the hostile clients, or None.
      clipped_by: the names of the server's steps that clip messages.
    """

    task: str
    algorithm: str
    learning_rate: float | None
    seed: int
    metric: fed.Metric
    target: float | None
    attacked_by: str | None = None
    clipped_by: Sequence[str] = ()


def run_summary(asked: Asked, result: fed.Result, wall: float) -> dict[str, Any]:
    """The figures of one finished run, which took ``wall`` seconds in total."""
    last, at_target = result.metrics[-1], reached(result, asked.metric, asked.target)
    name = asked.metric.name
    return {
        **last.metrics,
        **asked._asdict(),
        "metric": name,
        "rounds": result.rounds,
        "metrics": last.metrics,
        f"initial_{name}": result.metrics[0].metrics[name],
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(result.params)),
        "rounds_to_target": at_target.round if at_target else None,
        "bytes_up_to_target": at_target.bytes_up if at_target else None,
        "bytes_to_target": at_target.bytes_up + at_target.bytes_down if at_target else None,
        "forward_passes_to_target": at_target.forward_passes if at_target else None,
        "simulated_seconds_to_target": at_target.simulated_seconds if at_target else None,
        "diverged_at_round": result.diverged_at,
        "interrupted": result.interrupted,
        "rounds_per_second": result.timed_rounds / result.run_seconds if result.run_seconds else 0.0,
        "compile_seconds": result.compile_seconds,
        "wall_seconds": wall,
        # Data, models, files and pictures are the rest.
        "seconds_spent": {**result.spent, "the rest": max(0.0, wall - sum(result.spent.values()))},
        **result.traffic,
        "forward_passes": result.forward_passes,
        "simulated_seconds": result.simulated_seconds,
        "scalar_offset": result.offset,
        "clipped": result.clipped,
        "staleness": result.staleness,
        "zero_scalars": result.zeros,
        "attacked_by": asked.attacked_by,
        "privacy": None if result.privacy is None else result.privacy._asdict(),
        "concerns": list(result.health_warnings),
        "attendance": {**result.attendance, "invalid": result.invalid},
        "jax_version": jax.__version__,
        "device": jax.devices()[0].device_kind,
        **sharding(result),
        "params_sha256": fed.fingerprint(result.params),
    }
