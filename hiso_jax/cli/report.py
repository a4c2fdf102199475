"""What a run leaves on disk: its directory, its summary, and the fingerprint of its parameters."""

import hashlib
import json
import math
import os
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from hiso_jax import fed
from hiso_jax.cli.options import Experiment


def params_sha256(params: PyTree) -> str:
    """SHA-256 over every leaf's path, shape, dtype and bytes, in the order of the leaves."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def as_json(value: Any) -> Any:
    """``value`` as JSON can hold it: paths as strings, non-finite numbers as null."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def config_of(options: Experiment) -> dict[str, Any]:
    """The options as they are written to ``config.json``."""
    return {name: value for name, value in as_json(asdict(options)).items() if name != "local_learning_rate"}


def append_evaluation(directory: Path, progress: fed.Progress, **labels: Any) -> None:
    """Append the evaluation of ``progress``, if it has one, to ``metrics.jsonl`` as one flat object.

    ``loss`` and ``accuracy`` are those of the test split.
    """
    if progress.evaluation:
        flat = asdict(progress.evaluation)
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(as_json({**labels, **flat.pop("metrics"), **flat})) + "\n")


def create_directory(options: Experiment, name: str) -> Path:
    """Make the directory of a run: ``--out``, or a fresh time-stamped one under ``runs/``.

    Raises:
      ValueError: it exists, or cannot be made.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    path = options.out or Path("runs") / f"{name}-{stamp}"
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"out must be a directory that does not exist yet; {path} does") from None
    except OSError as error:
        raise ValueError(f"out cannot be made: {path} ({error.strerror})") from error
    return path


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(as_json(value), indent=2) + "\n")
    os.replace(temporary, path)


def reached(result: fed.Result, target: float | None) -> fed.Evaluation | None:
    """The first evaluation at which the run's accuracy has reached ``target`` for good (see ``first_at_target``)."""
    if target is None:
        return None
    index = fed.first_at_target([row.metrics["accuracy"] for row in result.metrics], target)
    return None if index is None else result.metrics[index]


def sharding(result: fed.Result) -> dict[str, Any]:
    """How many devices took part, and how the cohort and the parameters were split over them."""
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


def summarise(
    task: str, algorithm: str, rate: float, seed: int, target: float | None, result: fed.Result, wall: float
) -> dict[str, Any]:
    """The figures of one finished run."""
    last, at_target = result.metrics[-1], reached(result, target)
    return {
        "task": task,
        "algorithm": algorithm,
        "learning_rate": rate,
        "seed": seed,
        "rounds": result.rounds,
        "accuracy": last.metrics["accuracy"],
        "loss": last.metrics["loss"],
        "metrics": last.metrics,
        "initial_accuracy": result.metrics[0].metrics["accuracy"],
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(result.params)),
        "target": target,
        "rounds_to_target": at_target.round if at_target else None,
        "bytes_to_target": at_target.bytes_up + at_target.bytes_down if at_target else None,
        "forward_passes_to_target": at_target.forward_passes if at_target else None,
        "simulated_seconds_to_target": at_target.simulated_seconds if at_target else None,
        "diverged_at_round": result.diverged_at,
        "interrupted": result.interrupted,
        "rounds_per_second": result.rounds / result.run_seconds if result.run_seconds else 0.0,
        "compile_seconds": result.compile_seconds,
        "wall_seconds": wall,
        **result.traffic,
        "forward_passes": result.forward_passes,
        "simulated_seconds": result.simulated_seconds,
        "attendance": {**result.attendance, "invalid": result.invalid},
        "jax_version": jax.__version__,
        "device": jax.devices()[0].device_kind,
        **sharding(result),
        "params_sha256": params_sha256(result.params),
    }
