"""The ledger: every round of a run, appended to a file before the resulting state is visible."""

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Key

from hiso_jax.fed.ledger.files import write_file
from hiso_jax.fed.ledger.frames import FrameWriter
from hiso_jax.fed.ledger.reading import ENVIRONMENT, EVALUATION, EXTENSION, HEADER, ROUNDS, SEAL, LedgerFile, load
from hiso_jax.fed.ledger.records import Evaluation, Layout, Records, as_records, as_rows, layout


class Ledger:
    """The ledger of a run, in memory."""

    def __init__(self, seed_key: Key[Array, ""]) -> None:
        """Begin an empty ledger."""
        self.seed_key, self.head = seed_key, b""
        self._blocks: list[np.ndarray] = []
        self._layout = Layout(())

    def append(self, records: Records) -> None:
        """Append some rounds."""
        self._layout = layout(records)
        self._blocks.append(as_rows(records))

    def evaluated(self, evaluation: Evaluation, params_sha256: str | None) -> None:
        """Record an evaluation and the SHA-256 of the parameters."""

    def seal(self, **ending: Any) -> None:
        """End the ledger; ``ending`` describes how the run ended."""

    def close(self) -> None:
        """Release the file, if there is one."""

    @property
    def rounds(self) -> int:
        """The number of rounds in the ledger."""
        return sum(map(len, self._blocks))

    @property
    def records(self) -> Records:
        """All rounds so far.

        Raises:
          ValueError: the ledger is empty.
        """
        if not self._blocks:
            raise ValueError("the ledger is empty: no round has been run")
        return as_records(self.seed_key, np.concatenate(self._blocks), self._layout)

    def since(self, first: int) -> Records:
        """The rounds from ``first`` on, without a copy of those before.

        Raises:
          ValueError: there is none.
        """
        wanted = self.rounds - first
        blocks: list[np.ndarray] = []
        for block in reversed(self._blocks):
            if wanted <= sum(len(each) for each in blocks):
                break
            blocks.append(block)
        if wanted < 1:
            raise ValueError(f"the ledger has no round from {first} on")
        return as_records(self.seed_key, np.concatenate(blocks[::-1])[-wanted:], self._layout)


class FileLedger(Ledger):
    """The ledger of a run, in memory and on disk."""

    def __init__(self, file: LedgerFile, *, read_only: bool = False) -> None:
        """Continue the ledger of ``file``; with ``read_only`` it does not write to the file."""
        super().__init__(file.seed_key)
        self._blocks = [file.rows] if len(file.rows) else []
        self._layout = file.layout
        self.head = list(file.heads.values())[-1]
        self._writer = None if read_only else FrameWriter(file.path, file.size, file.length)

    def _write(self, kind: bytes, payload: bytes) -> None:
        if self._writer is not None:
            digest = self._writer.append(kind, payload)
            self.head = digest if kind == ROUNDS else self.head

    def append(self, records: Records) -> None:
        """Append some rounds; they are on disk once this returns.

        Raises:
          OSError: the rounds cannot be written; they are then neither on disk nor in memory.
        """
        rows = as_rows(records)
        self._write(ROUNDS, rows.tobytes())
        self._blocks.append(rows)

    def evaluated(self, evaluation: Evaluation, params_sha256: str | None) -> None:
        """Record an evaluation and the SHA-256 of the parameters."""
        self._write(EVALUATION, json_bytes({**asdict(evaluation), "params_sha256": params_sha256}))

    def continued(self, environment: Mapping[str, Any]) -> None:
        """Record that the run is continued in another environment."""
        self._write(ENVIRONMENT, json_bytes({"round": self.rounds, **environment}))

    def extended(self, rounds: int) -> None:
        """Record that the run is extended to ``rounds`` rounds."""
        self._write(EXTENSION, json_bytes({"round": self.rounds, "rounds": rounds}))

    def seal(self, **ending: Any) -> None:
        """End the ledger with the number of rounds, the digest of the last frame of rounds, and ``ending``."""
        self._write(SEAL, json_bytes({"rounds": self.rounds, "head": self.head.hex(), **ending}))

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def salvage(found: LedgerFile, path: Path) -> None:
    """Write the good frames of a ledger as a new ledger without a seal, from which a run can continue.

    Raises:
      FileExistsError: a file exists at ``path``.
      OSError: the file cannot be written.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    write_file(path, found.path.read_bytes()[: found.ends[len(found.rows)]])


def create(path: Path, header: Mapping[str, Any]) -> LedgerFile:
    """Create the file of a ledger without rounds."""
    FrameWriter.create(path, HEADER, json_bytes(header))
    return load(path, unfinished=True)


def json_bytes(value: Any) -> bytes:
    """``value`` as JSON: non-finite floats as null, NumPy scalars as numbers, objects unknown to JSON as their text."""

    def plain(item: Any) -> Any:
        return _finite(item.item()) if isinstance(item, np.generic) else str(item)

    return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False, default=plain).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
