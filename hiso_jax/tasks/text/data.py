"""Rows of text tasks: from the ``datasets`` hub, or from local files with the same columns."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hiso_jax.tasks.text.files import READERS, read_rows
from hiso_jax.tasks.text.prompts import Row, Source

SPLITS = {"train": ("train",), "test": ("validation", "dev", "test")}


def load_rows(source: Source | None, data_dir: str | Path | None, columns: Sequence[str]) -> dict[str, list[Row]]:
    """The rows of the splits ``train`` and ``test``, in their order.

    Args:
      source: where the data is on the hub; None for data that is on no hub.
      data_dir: a folder with ``train`` and ``validation`` (or ``dev``, or ``test``) files, jsonl, csv or parquet;
        None asks the hub.
      columns: those that the task needs.

    Raises:
      ValueError: the data cannot be found or read, has no rows, or lacks a column.
    """
    if data_dir is not None:
        rows = _from_files(Path(data_dir))
    elif source is not None:
        rows = _from_hub(source)
    else:
        raise ValueError("data_dir must name a folder with train and validation files for text-classification")
    for split, split_rows in rows.items():
        if not len(split_rows):
            raise ValueError(f"data_dir must hold at least one row of each split; {split} has none")
        missing = [name for name in columns if name not in split_rows[0]]
        if missing:
            raise ValueError(
                f"data_dir must hold the columns {', '.join(columns)}; {split} lacks {', '.join(missing)} and has "
                f"{', '.join(split_rows[0])}"
            )
        for number, row in enumerate(split_rows):
            empty = [name for name in columns if row[name] is None]
            if empty:
                raise ValueError(f"row {number} of {split} has no {empty[0]}")
    return rows


def _from_files(folder: Path) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for split, names in SPLITS.items():
        paths = [folder / f"{name}{ending}" for name in names for ending in READERS]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(
                f"data_dir must hold a file {names[0]}.jsonl, .csv or .parquet; {folder} has none"
                f"{'' if len(names) == 1 else f' (nor of the names {chr(44).join(names[1:])})'}"
            )
        rows[split] = read_rows(path)
    return rows


def _from_hub(source: Source) -> dict[str, list[Row]]:
    import datasets

    datasets.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        try:
            loaded = datasets.load_dataset(source.name, source.config)
        except RuntimeError:
            # A data set that is a script on its main branch, which is never run; the hub keeps it as parquet, too.
            # There every configuration is a folder.
            loaded = datasets.load_dataset(source.name, data_dir=source.config, revision="refs/convert/parquet")
        return {"train": loaded["train"].to_list(), "test": loaded[source.test].to_list()}
    except Exception as error:
        # Whatever the hub's client raises (no network, no such name, a damaged cache) means the same here.
        raise ValueError(
            "data_dir must name a folder with train and validation files where the hub is out of reach; "
            f"loading {source.name} gave {type(error).__name__}"
        ) from error


def sample_rows(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """``limit`` random rows in their order, or all."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])
    return [rows[i] for i in chosen]


def number_labels(rows: Mapping[str, Sequence[Row]], classes: int) -> dict[str, list[Row]]:
    """The same rows with every label a number; label names are numbered in alphabetical order over all splits.

    Raises:
      ValueError: a label that is none of the classes, or more or fewer names than classes.
    """
    names = sorted({row["label"] for split in rows.values() for row in split if isinstance(row["label"], str)})
    if names and len(names) != classes:
        raise ValueError(f"verbalizer must have one word for each of the {len(names)} labels {', '.join(names)}")
    number = {name: place for place, name in enumerate(names)}
    numbered: dict[str, list[Row]] = {}
    for split, split_rows in rows.items():
        numbered[split] = []
        for place, row in enumerate(split_rows):
            label = number.get(row["label"], row["label"])
            if not isinstance(label, int) or not 0 <= label < classes:
                raise ValueError(f"row {place} of {split} has label {label}; labels must be 0 to {classes - 1}")
            numbered[split].append({**row, "label": label})
    return numbered
