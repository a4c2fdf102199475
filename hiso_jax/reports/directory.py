"""Files of a command: its directory, its metrics line by line, and JSON."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.fed.ledger import exists, sync_directory, write_file

SAMPLES = "samples.jsonl"


def as_json(value: Any) -> Any:
    """``value`` in a form that JSON can hold: paths as strings, NumPy's numbers as Python's, non-finite as null."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def number(value: float | None) -> float:
    """A number of a JSON file, in which null stands for a number that is not finite."""
    return math.nan if value is None else float(value)


def evaluation_line(row: fed.Evaluation, **labels: Any) -> str:
    """An evaluation as a line of ``metrics.jsonl``, one flat object; the task's metrics are those of its test split."""
    flat = asdict(row)
    return json.dumps(as_json({**labels, **flat.pop("metrics"), **flat})) + "\n"


def write_metrics(directory: Path, rows: Sequence[fed.Evaluation]) -> None:
    """Rewrite ``metrics.jsonl``: a reader finds the old file or the new one."""
    write_file(directory / "metrics.jsonl", "".join(map(evaluation_line, rows)).encode())


def append_evaluation(directory: Path, row: fed.Evaluation) -> None:
    """Append an evaluation to ``metrics.jsonl``."""
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(evaluation_line(row))


def append_samples(directory: Path, rounds: int, samples: Sequence[Mapping[str, str]]) -> None:
    """Append what the model does after ``rounds`` rounds to ``samples.jsonl``."""
    with (directory / SAMPLES).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"round": rounds, **each}, ensure_ascii=False) + "\n" for each in samples)


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """The lines of ``samples.jsonl``; without a torn last line, and empty without the file."""
    rows = []
    try:
        for line in (directory / SAMPLES).read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    except (OSError, ValueError):
        return rows
    return rows


def cut_samples(directory: Path, rounds: int) -> None:
    """Drop the lines of ``samples.jsonl`` that a resumed run will write again: those after ``rounds`` rounds."""
    if exists(directory / SAMPLES):
        kept = [row for row in read_samples(directory) if row["round"] <= rounds]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_file(directory / SAMPLES, text.encode())


def create_directory(out: Path | None, name: str, config: Mapping[str, Any] | None = None) -> Path:
    """Make a new directory, ``out`` or a time-stamped one under ``runs/``.

    With ``config``, the directory gets its name only once it has ``config.json``, so that it can always be continued.

    Raises:
      ValueError: the directory exists, or cannot be made.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    path = out or Path("runs") / f"{name}-{stamp}"
    if exists(path):
        hint = "; `resume` continues what it holds" if exists(path / "config.json") else ""
        raise ParameterError("out", f"must be a directory that does not exist yet; {path} does{hint}")
    new = path.parent / f".{path.name}.{os.getpid()}"
    try:
        new.mkdir(parents=True)
        if config is not None:
            write_json(new / "config.json", {**config, "out": path.resolve()})
        os.rename(new, path)
        sync_directory(path.parent)
    except OSError as error:
        raise ParameterError("out", f"cannot be made: {path} ({error.strerror})") from error
    return path


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    write_file(path, f"{json.dumps(as_json(value), indent=2)}\n".encode())
