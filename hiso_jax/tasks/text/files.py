"""Rows of text from one local file: JSON lines, CSV or Parquet, typed as the file writes them.

Not by a data-frame library, which guesses: dates and numbers in a column of text would be rewritten, and words such as
"NA" lost.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from hiso_jax.tasks.text.prompts import Row


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _json(path: Path) -> list[Row]:
    """An object a line, or one array of objects."""
    text = _text(path)
    if text.lstrip().startswith("["):
        rows = json.loads(text)
        places = [f"entry {number}" for number in range(1, len(rows) + 1)]
    else:
        rows, places = [], []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                places.append(f"line {number}")
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON ({error})") from None
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, dict):
            raise ValueError(f"{place} must be an object with the columns as names, got a {type(row).__name__}")
    return rows


def _csv(path: Path) -> list[Row]:
    """Cells are text; a column ``label`` that holds whole numbers only is read as numbers."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    names = reader.fieldnames or []
    if len(set(names)) != len(names):
        raise ValueError(f"its first line must name each column once, got {', '.join(names)}")
    rows: list[Row] = []
    for row in reader:
        if None in row or None in row.values():
            cells = sum(value is not None for name, value in row.items() if name is not None)
            raise ValueError(
                f"line {reader.line_num} must have {len(names)} cells, as the first line has, and has "
                f"{'more' if None in row else cells}"
            )
        rows.append(dict(row))
    if rows and all(re.fullmatch(r"-?\d+", row.get("label") or "") for row in rows):
        rows = [{**row, "label": int(row["label"])} for row in rows]
    return rows


def _parquet(path: Path) -> list[Row]:
    # Imported where it is needed: it is large.
    import pyarrow.parquet

    # An open file, not a path: folders named "column=value" on the way would become columns.
    with path.open("rb") as file:
        return pyarrow.parquet.ParquetFile(file).read().to_pylist()


READERS: dict[str, Callable[[Path], list[Row]]] = {".jsonl": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in their order; what it is, its ending says.

    Raises:
      ValueError: it cannot be read, or is damaged; the line is named where there are lines.
    """
    try:
        return READERS[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: it is not UTF-8 text (byte {error.start})") from error
    except (ValueError, csv.Error) as error:
        # What Arrow raises is a ValueError, too.
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(f"{path} cannot be read: its JSON is nested too deeply") from None
