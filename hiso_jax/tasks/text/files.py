"""Rows of text from local files: JSON lines, CSV, TSV or Parquet, with the types of the files.

No data-frame library is used, because it guesses types: it would rewrite dates and numbers in a column of text, and
lose words such as "NA".
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hiso_jax.checks import ParameterError
from hiso_jax.extras import import_extra
from hiso_jax.tasks.text.prompts import Row


def _text(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix.lower() == ".gz" else content).decode("utf-8-sig")


def _json(path: Path) -> list[Row]:
    """The rows of a JSON file: one object per line, or one array of objects."""
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
            raise ParameterError(place, f"must be an object with the columns as names, got a {type(row).__name__}")
    return rows


def _csv(path: Path) -> list[Row]:
    return _cells(_text(path))


def _tsv(path: Path) -> list[Row]:
    """The rows of a TSV file; quotes are text, as in GLUE's files, unless the file was written with quotes.

    A file was written with quotes if it can only be parsed so, or if its quotes surround entire cells, and either all
    cells are quoted or a quoted cell holds doubled quotes.
    """
    text = _text(path)
    try:
        rows = _cells(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    except (ValueError, csv.Error):
        return _cells(text, delimiter="\t")
    cells = [cell for row in rows for cell in (*row, *row.values()) if isinstance(cell, str)]
    quoted = [cell for cell in cells if cell.startswith('"')]
    are_whole = all(len(cell) > 1 and cell.endswith('"') and '"' not in cell[1:-1].replace('""', "") for cell in quoted)
    if quoted and are_whole and (len(quoted) == len(cells) or any('""' in cell[1:-1] for cell in quoted)):
        return _cells(text, delimiter="\t")
    return rows


def _cells(text: str, **form: Any) -> list[Row]:
    """The rows of a delimited text. Cells are text; a column ``label`` that holds only integers is read as numbers."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, **form)
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
    parquet = import_extra("pyarrow.parquet", "data_dir", "must hold .jsonl, .csv or .tsv files")
    # Given a path, pyarrow would make columns of folders named "column=value"; an open file has no folders.
    with path.open("rb") as file:
        return parquet.ParquetFile(file).read().to_pylist()


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".tsv": _tsv,
}
# Text files may be compressed; Parquet has its own compression.
ENDINGS = (*READERS, *(f"{ending}.gz" for ending in READERS if ending != ".parquet"))
# Older exports of the hub have a digest after the part numbers.
PART = re.compile(r"-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")


def _parted(path: Path) -> tuple[str, str]:
    """A file's name without its ending, and its ending, in lower case; two empty strings for files of other types."""
    name = path.name.lower()
    ending = next((ending for ending in sorted(ENDINGS, key=len, reverse=True) if name.endswith(ending)), "")
    return (name.removesuffix(ending), ending) if ending else ("", "")


def split_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of a split: a single file or all its parts, for the first name that has files.

    Args:
      folder: the folder of the files; its subfolder ``data``, where the hub keeps them, is searched, too.
      names: the possible names of the split, in lower case; file names may have capitals.

    Raises:
      ValueError: a part is missing.
    """
    for name in names:
        for place in (folder, folder / "data"):
            files = [path for path in sorted(place.iterdir()) if path.is_file()] if place.is_dir() else []
            exact = [path for path in files if _parted(path)[0] == name]
            if exact:
                return [min(exact, key=lambda path: (ENDINGS.index(_parted(path)[1]), path.name))]
            parts = [
                path
                for path in files
                if (stem := _parted(path)[0]).startswith(name) and PART.fullmatch(stem[len(name) :])
            ]
            if parts:
                _check_parts(parts)
                return parts
    return []


def _check_parts(parts: Sequence[Path]) -> None:
    found = [PART.search(path.name) for path in parts]
    numbers, counts = ([int(each[group]) for each in found if each is not None] for group in (1, 2))
    if len(set(counts)) != 1 or numbers != list(range(counts[0])):
        raise ParameterError(
            "data_dir", f"must hold all {counts[0]:,} parts of {parts[0].name}; {parts[0].parent} has {len(parts):,}"
        )


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in their order; the ending of its name gives the format.

    Raises:
      ValueError: the file cannot be read or is damaged; for formats with lines, the message names the line.
    """
    try:
        return READERS[_parted(path)[1].removesuffix(".gz")](path)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: it is not UTF-8 text (byte {error.start})") from error
    except ParameterError as error:
        # Of a missing extra; others name a line or an entry of the file.
        if error.parameter == "data_dir":
            raise
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (ValueError, csv.Error) as error:
        # Arrow's errors are ValueErrors, too.
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(f"{path} cannot be read: its JSON is nested too deeply") from None
