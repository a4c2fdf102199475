"""Rows of text tasks, from the ``datasets`` hub or from local files with the same columns."""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from hiso_jax.checks import ParameterError, kind_of
from hiso_jax.extras import import_extra
from hiso_jax.tasks.text.files import read_rows, split_files
from hiso_jax.tasks.text.prompts import Row, Source

SPLITS = {"train": ("train",), "test": ("validation", "valid", "val", "dev", "test")}
# The most file names in the error about a folder without usable files.
NAMED = 5


def load_rows(
    source: Source | None, data_dir: str | Path | None, columns: Sequence[str], splits: Collection[str] = tuple(SPLITS)
) -> dict[str, list[Row]]:
    """The rows of the splits ``train`` and ``test``, in their original order.

    Args:
      source: the location of the data on the hub; None for data that is not on the hub.
      data_dir: a folder with ``train`` and ``validation`` (or ``valid``, ``val``, ``dev``, ``test``) files, jsonl, csv,
        tsv or parquet, compressed or in parts, as the hub and other tools write them; None loads from the hub.
      columns: the columns that the task needs.
      splits: the splits to read.

    Raises:
      ValueError: the data cannot be found or read, has no rows, or lacks a column.
    """
    if data_dir is not None:
        rows = _from_files(Path(data_dir), splits)
    elif not splits:
        rows = {}
    elif source is not None:
        rows = {split: rows for split, rows in _from_hub(source).items() if split in splits}
    else:
        raise ParameterError("data_dir", "must name a folder with train and validation files for text-classification")
    _check_columns(rows, columns, "data_dir")
    return rows


def _check_columns(rows: Mapping[str, Sequence[Row]], columns: Sequence[str], option: str) -> None:
    """Refuse splits without rows, and rows that lack a column.

    Raises:
      ValueError: a split has no rows, or a row lacks a column; the message names the split and the row.
    """
    for split, split_rows in rows.items():
        if not len(split_rows):
            raise ParameterError(option, f"must hold at least one row of each split; {split} has none")
        missing = [name for name in columns if name not in split_rows[0]]
        if missing:
            raise ParameterError(
                option,
                f"must hold the columns {', '.join(columns)}; {split} lacks {', '.join(missing)} and has "
                f"{', '.join(split_rows[0])}",
            )
        for number, row in enumerate(split_rows, 1):
            empty = [name for name in columns if row.get(name) is None]
            if empty:
                raise ValueError(f"row {number} of {split} has no {empty[0]}")


def _from_files(folder: Path, splits: Collection[str]) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for split, names in SPLITS.items():
        if split not in splits:
            continue
        paths = split_files(folder, names)
        if not paths:
            there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            more = f" and {len(there) - NAMED} more" if len(there) > NAMED else ""
            has = f"has {', '.join(there[:NAMED])}{more}" if there else "has none"
            if {"dataset_dict.json", "state.json"} & set(there):
                has = "was written by save_to_disk: load it with load_from_disk and write each split with to_parquet"
            others = "" if len(names) == 1 else f" (or of the names {', '.join(names[1:])})"
            raise ParameterError(
                "data_dir",
                f"must hold a file {names[0]}.jsonl, .csv, .tsv or .parquet{others}, as it is or as .gz, or "
                f"{names[0]}-00000-of-00001.parquet and so on, in data/ or not; {folder} {has}",
            )
        rows[split] = [row for path in paths for row in read_rows(path)]
        if not rows[split]:
            raise ParameterError("data_dir", f"must hold at least one row of each split; {paths[0]} is empty")
    return rows


def _from_hub(source: Source) -> dict[str, list[Row]]:
    datasets = import_extra("datasets", "data_dir", "must name a folder with train and validation files")
    datasets.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        try:
            loaded = datasets.load_dataset(source.name, source.config)
        except RuntimeError:
            # The data set is a script on its main branch, which is never run. The hub also keeps it as parquet, with
            # a folder for each configuration.
            loaded = datasets.load_dataset(source.name, data_dir=source.config, revision="refs/convert/parquet")
        return {"train": loaded["train"].to_list(), "test": loaded[source.test].to_list()}
    except Exception as error:
        # Every error of the hub's client (no network, no such name, a damaged cache) means the same here.
        raise ParameterError(
            "data_dir",
            "must name a folder with train and validation files where the hub is out of reach; "
            f"loading {source.name} gave {type(error).__name__}",
        ) from error


def sample_rows(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """At most ``limit`` random rows, in their original order; None means all rows."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])
    return [rows[i] for i in chosen]


def given_rows(rows: Mapping[str, Iterable[Row]], columns: Sequence[str]) -> dict[str, list[Row]]:
    """Rows in memory, checked and in the form that :func:`load_rows` returns.

    Raises:
      ValueError: a split is missing, a row is not a dict, or a split lacks a column.
    """
    taken: dict[str, list[Row]] = {}
    for split, names in {"train": ("train",), "test": ("test", *SPLITS["test"])}.items():
        name = next((name for name in names if isinstance(rows, Mapping) and name in rows), None)
        if name is None:
            raise ParameterError(
                "rows",
                'must be {"train": rows, "test": rows}, of lists of dicts or datasets of the datasets library; '
                f"there is no {split}",
            )
        taken[split] = _rows_of(rows[name], name)
        for number, row in enumerate(taken[split], 1):
            if not isinstance(row, Mapping):
                raise ParameterError(
                    "rows", f"must be dicts of columns; row {number} of {name} is a {type(row).__name__}"
                )
    _check_columns(taken, columns, "rows")
    return taken


def _rows_of(given: Any, name: str) -> list[Row]:
    """The rows of a list, a ``datasets.Dataset``, a DataFrame or a dict of columns.

    Raises:
      ParameterError: it is none of these, or its columns differ in length.
    """
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        return given.to_dict("records")
    if isinstance(given, Mapping):
        columns = {column: list(values) for column, values in given.items()}
        if len({len(values) for values in columns.values()}) > 1:
            raise ParameterError("rows", f"must have columns of one length; those of {name} differ")
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ParameterError("rows", f"must be dicts of columns for each split; {name} is {kind_of(given)}")
    return list(given)


def with_text(rows: Mapping[str, Sequence[Row]], columns: Sequence[str]) -> dict[str, list[Row]]:
    """The same rows with bytes decoded to text in the columns of the prompts; numbers are unchanged.

    Raises:
      ValueError: a cell is missing, or is neither text nor a number.
    """

    def cell(value: Any, name: str, row: str) -> Any:
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{row} has a {name} that is no text: its bytes are not UTF-8") from error
        value = value.item() if isinstance(value, np.generic) else value
        if _is_missing(value):
            raise ValueError(f"{row} has no {name}")
        if not isinstance(value, str | int | float):
            raise ValueError(f"{row} has a {name} that is neither text nor a number, but a {type(value).__name__}")
        return value

    return {
        split: [
            {**row, **{name: cell(row[name], name, f"row {number} of {split}") for name in columns}}
            for number, row in enumerate(split_rows, 1)
        ]
        for split, split_rows in rows.items()
    }


def _is_missing(value: Any) -> bool:
    """Whether a cell is missing; pandas and parquet files also write NaN for a missing cell."""
    value = value.item() if isinstance(value, np.generic) else value
    # NAType and NaTType are pandas' missing value and missing date.
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def plain_label(value: Any) -> Any:
    """A label or a client's name as a Python value: bytes become text, bools and floats without fractions integers."""
    value = value.item() if isinstance(value, np.generic) else value
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    return int(value) if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()) else value


def with_labels(rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """The same rows with labels as Python numbers or text.

    Raises:
      ValueError: a row has no label.
    """
    found: dict[str, list[Row]] = {}
    for split, split_rows in rows.items():
        found[split] = []
        for number, row in enumerate(split_rows, 1):
            label = row["label"]
            if _is_missing(label) or (isinstance(label, str) and not label.strip()):
                raise ValueError(f"row {number} of {split} has no label")
            found[split].append({**row, "label": plain_label(label)})
    return found


def _in_order(texts: Iterable[str]) -> list[str]:
    """Text labels in alphabetical order; if all are numbers in quotes, in numerical order."""
    listed = sorted(texts)
    try:
        return sorted(listed, key=float)
    except ValueError:
        return listed


def _by_words(texts: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
    """Text labels in the order of the answer words: by their names if words are names, else alphabetically.

    Raises:
      ParameterError: some words are the names of labels that they would not stand for.
    """
    named = {text.casefold(): text for text in texts}
    plain = [word.strip().casefold() for word in words]
    if sorted(plain) == sorted(named):
        return tuple(named[word] for word in plain)
    for text, word in zip(texts, plain, strict=True):
        if word in named and named[word] != text:
            raise ParameterError(
                "labels",
                f"must be given, one for each word of the verbalizer: in alphabetical order {text!r} would be answered "
                f"by {word!r}, which is the name of another label",
            )
    logging.getLogger("hiso_jax").warning(
        "the words of the verbalizer do not name the labels, so they are matched in alphabetical order: %s; "
        "give `labels` for another order",
        ", ".join(f"{text} is {word!r}" for text, word in zip(texts, words, strict=True)),
    )
    return tuple(texts)


def label_names(
    rows: Mapping[str, Sequence[Row]], words: Sequence[str], given: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The label of each answer word, in the order of the words.

    Args:
      rows: the rows of every split.
      words: the answer words.
      given: the labels in that order; without it, text labels are those that the words name, else in alphabetical
        order, numbers in quotes in numerical order, and numbers are 0, 1, …

    Raises:
      ValueError: there are more or fewer labels than words, ``given`` repeats a label, or the labels of the rows are
        not all text or all numbers.
    """
    classes = len(words)
    if given is not None:
        if len(given) != classes or len(set(given)) != classes:
            raise ParameterError(
                "labels",
                f"must be {classes} different ones, one for each word of the verbalizer; got {','.join(given)}",
            )
        return tuple(given)
    for split, split_rows in rows.items():
        for number, row in enumerate(split_rows, 1):
            if not isinstance(row["label"], int | str):
                raise ValueError(f"row {number} of {split} has label {row['label']!r}; labels must be numbers or text")
    found = {row["label"] for split in rows.values() for row in split}
    texts = _in_order(label for label in found if isinstance(label, str))
    if texts and len(texts) != len(found):
        other = next(label for label in found if not isinstance(label, str))
        raise ParameterError("labels", f"must be all text or all numbers; the data have {texts[0]!r} and {other!r}")
    if texts and len(texts) != classes:
        raise ParameterError(
            "verbalizer",
            f"must have one word for each of the {len(texts)} labels {', '.join(texts[:8])}, not {classes}",
        )
    return _by_words(texts, words) if texts else tuple(map(str, range(classes)))


def number_labels(rows: Mapping[str, Sequence[Row]], names: Sequence[str]) -> dict[str, list[Row]]:
    """The same rows, with each label replaced by the index of its name in ``names``.

    Raises:
      ValueError: a label is not in ``names``.
    """
    place = {name: number for number, name in enumerate(names)}
    numbered: dict[str, list[Row]] = {}
    for split, split_rows in rows.items():
        numbered[split] = []
        for number, row in enumerate(split_rows, 1):
            label = row["label"]
            if isinstance(label, bool) or not isinstance(label, int | str) or str(label) not in place:
                raise ValueError(f"row {number} of {split} has label {label!r}; it must be one of {', '.join(names)}")
            numbered[split].append({**row, "label": place[str(label)]})
    return numbered


def numbered_clients(rows: Sequence[Row], column: str) -> Int[np.ndarray, "n"]:
    """The client id of each row: the index of its client's name among the sorted names of the column.

    Raises:
      ValueError: a row lacks the column, or the names are not all text or all integers.
    """
    for number, row in enumerate(rows, 1):
        if row.get(column) is None:
            raise ParameterError(
                "client_column", f"must be one of the training data; row {number} of train has no {column}"
            )
    if any(isinstance(row[column], bool | np.bool_) for row in rows):
        raise ParameterError("client_column", f"must name clients by text or by numbers; {column} has truth values")
    names = [plain_label(row[column]) for row in rows]
    for number, name in enumerate(names, 1):
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise ValueError(f"row {number} of train has {column} {name!r}; it must be text or an integer")
    if len(set(map(type, names))) > 1:
        raise ParameterError("client_column", f"must name clients by text or by numbers, not both; {column} has both")
    return np.unique(names, return_inverse=True)[1].reshape(-1).astype(np.int32)
