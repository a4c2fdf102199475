"""The ledger: every round of a run, appended to a file before the state that it produced is seen."""

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
    """The growing log of a run, in memory."""

    def __init__(self, seed_key: Key[Array, ""]) -> None:
        """Begin an empty log."""
        self.seed_key, self.head = seed_key, b""
        self._blocks: list[np.ndarray] = []
        self._layout = Layout(())

    def append(self, records: Records) -> None:
        """Append some rounds."""
        self._layout = layout(records)
        self._blocks.append(as_rows(records))

    def evaluated(self, evaluation: Evaluation, params_sha256: str | None) -> None:
        """Note an evaluation, and what the parameters were."""

    def seal(self, **ending: Any) -> None:
        """End the log; ``ending`` is what there is to say of the run."""

    def close(self) -> None:
        """Let go of what it is written to."""

    @property
    def rounds(self) -> int:
        """How many rounds it holds."""
        return sum(map(len, self._blocks))

    @property
    def records(self) -> Records:
        """All rounds so far.

        Raises:
          ValueError: there is none.
        """
        if not self._blocks:
            raise ValueError("the ledger is empty: no round has been run")
        return as_records(self.seed_key, np.concatenate(self._blocks), self._layout)


class FileLedger(Ledger):
    """The growing log of a run, in memory and on disk."""

    def __init__(self, file: LedgerFile, *, read_only: bool = False) -> None:
        """Continue the log of ``file``; one that is ``read_only`` leaves the file to another process."""
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
        """Append some rounds; on disk once this returns.

        Raises:
          OSError: they cannot be written; neither file nor log has them then.
        """
        rows = as_rows(records)
        self._write(ROUNDS, rows.tobytes())
        self._blocks.append(rows)

    def evaluated(self, evaluation: Evaluation, params_sha256: str | None) -> None:
        """Note an evaluation, and what the parameters were."""
        self._write(EVALUATION, json_bytes({**asdict(evaluation), "params_sha256": params_sha256}))

    def continued(self, environment: Mapping[str, Any]) -> None:
        """Note that the run goes on elsewhere than it began."""
        self._write(ENVIRONMENT, json_bytes({"round": self.rounds, **environment}))

    def extended(self, rounds: int) -> None:
        """Note that the run is to have so many rounds."""
        self._write(EXTENSION, json_bytes({"round": self.rounds, "rounds": rounds}))

    def seal(self, **ending: Any) -> None:
        """End the log: the number of rounds, the digest of the last, and what ``ending`` says of the run."""
        self._write(SEAL, json_bytes({"rounds": self.rounds, "head": self.head.hex(), **ending}))

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def salvage(found: LedgerFile, path: Path) -> None:
    """Write the good frames of a ledger as a new one without a seal, which a run can go on from.

    Raises:
      FileExistsError: there is a file at ``path``.
      OSError: it cannot be written.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    write_file(path, found.path.read_bytes()[: found.ends[len(found.rows)]])


def create(path: Path, header: Mapping[str, Any]) -> LedgerFile:
    """Make the file of a ledger without rounds."""
    FrameWriter.create(path, HEADER, json_bytes(header))
    return load(path, unfinished=True)


def json_bytes(value: Any) -> bytes:
    """``value`` as JSON: what is not finite as null, NumPy's scalars as numbers, what JSON cannot hold as its text."""

    def plain(item: Any) -> Any:
        return _finite(item.item()) if isinstance(item, np.generic) else str(item)

    return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False, default=plain).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
