"""What a run leaves on disk: its directory, its summary, and the fingerprint of its parameters."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from hiso_jax import fed
from hiso_jax.cli.options import Experiment
from hiso_jax.fed.ledger import sync_directory, write_whole


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
    """The options as they are written down; what is on this machine by its whole path, for whoever continues."""
    given = {name: value for name, value in asdict(options).items() if name != "local_learning_rate"}
    for name in ("data_dir", "out", "resume", "trace"):
        if given.get(name) is not None:
            given[name] = Path(given[name]).resolve()
    if given["model"] is not None and Path(given["model"]).exists():
        given["model"] = Path(given["model"]).resolve()
    return as_json(given)


def evaluation_line(row: fed.Evaluation, **labels: Any) -> str:
    """An evaluation as a line of ``metrics.jsonl``, one flat object; ``loss`` and ``accuracy`` are the test split's."""
    flat = asdict(row)
    return json.dumps(as_json({**labels, **flat.pop("metrics"), **flat})) + "\n"


def write_metrics(directory: Path, rows: Sequence[fed.Evaluation]) -> None:
    """Write ``metrics.jsonl`` anew: a reader finds the old file or the new one."""
    write_whole(directory / "metrics.jsonl", "".join(map(evaluation_line, rows)).encode())


def append_evaluation(directory: Path, progress: fed.Progress, **labels: Any) -> None:
    """Append the evaluation of ``progress``, if it has one, to ``metrics.jsonl``."""
    if progress.evaluation:
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(evaluation_line(progress.evaluation, **labels))


def create_directory(options: Experiment, name: str, config: Mapping[str, Any] | None = None) -> Path:
    """Make a new directory, ``--out`` or a time-stamped one under ``runs/``.

    With ``config`` it appears under its name with ``config.json`` in it, so that what is found can be continued.

    Raises:
      ValueError: it exists, or cannot be made.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    path = options.out or Path("runs") / f"{name}-{stamp}"
    if path.exists():
        raise ValueError(f"out must be a directory that does not exist yet; {path} does")
    new = path.parent / f".{path.name}.{os.getpid()}"
    try:
        new.mkdir(parents=True)
        if config is not None:
            write_json(new / "config.json", {**config, "out": path.resolve()})
        os.rename(new, path)
        sync_directory(path.parent)
    except OSError as error:
        raise ValueError(f"out cannot be made: {path} ({error.strerror})") from error
    return path


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    write_whole(path, f"{json.dumps(as_json(value), indent=2)}\n".encode())


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
        "rounds_per_second": result.timed_rounds / result.run_seconds if result.run_seconds else 0.0,
        "compile_seconds": result.compile_seconds,
        "wall_seconds": wall,
        **result.traffic,
        "forward_passes": result.forward_passes,
        "simulated_seconds": result.simulated_seconds,
        "attendance": {**result.attendance, "invalid": result.invalid},
        "jax_version": jax.__version__,
        "device": jax.devices()[0].device_kind,
        **sharding(result),
        "params_sha256": fed.fingerprint(result.params),
    }


def print_rows(console: Console, rows: Mapping[str, str]) -> None:
    """Names and values in two columns."""
    width = max(map(len, rows))
    for name, value in rows.items():
        console.print(f"  {name:<{width}}  {value}", soft_wrap=True, highlight=False, markup=False)
