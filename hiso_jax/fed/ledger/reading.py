"""The reader of ledgers: it verifies every byte and validates every entry."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from hiso_jax.fed.ledger.files import is_folder, read_regular
from hiso_jax.fed.ledger.frames import Altered, Frame, read_frames
from hiso_jax.fed.ledger.records import Evaluation, Layout, Records, as_records
from hiso_jax.fed.ledger.schema import (
    EnvironmentFrame,
    EvaluationFrame,
    ExtensionFrame,
    Header,
    SealFrame,
    check_columns,
    check_key,
    read_json,
)
from hiso_jax.fed.population import REPORTED
from hiso_jax.paths import as_path

LEDGER = "ledger.hiso"
HEADER, ROUNDS, EVALUATION, SEAL = b"HEAD", b"RNDS", b"EVAL", b"SEAL"
ENVIRONMENT, EXTENSION = b"ENV ", b"MORE"
# The schema of each kind of frame; None for rounds, which are not JSON.
KINDS: dict[bytes, Any] = {
    HEADER: Header,
    ROUNDS: None,
    EVALUATION: EvaluationFrame,
    SEAL: SealFrame,
    ENVIRONMENT: EnvironmentFrame,
    EXTENSION: ExtensionFrame,
}


@dataclass(frozen=True)
class LedgerFile:
    """A ledger that was read and verified.

    Attributes:
      path: the file.
      header: the description of the run, see ``docs/reference/formats.md``.
      rows: the rounds as rows of the file, [R].
      heads: the digests of the header and of every frame of rounds, by the number of rounds up to the frame's end.
      ends: the byte offset of the end of the last frame written after a number of rounds, by that number.
      evaluations: the run's evaluations.
      checks: SHA-256 of the parameters, by the number of rounds, where it was recorded: at evaluations and at the end.
      environments: the other environments in which the run was continued: {"round": r, ...}.
      seal: how the run ended, or None if the ledger has no seal.
      size: bytes of the good frames.
      torn: bytes after the good frames, of a frame that was not completely written.
      length: the length of the file when it was read.
      extended: the extensions of the run, in order: {"round": r, "rounds": n} after round r to n rounds.
      unsealed: bytes of the frames before the seal.
    """

    path: Path
    header: dict[str, Any]
    rows: np.ndarray
    heads: dict[int, bytes]
    ends: dict[int, int]
    evaluations: list[Evaluation]
    checks: dict[int, str]
    environments: list[dict[str, Any]]
    seal: dict[str, Any] | None
    size: int
    torn: int
    length: int
    extended: list[dict[str, Any]]
    unsealed: int

    @property
    def planned(self) -> int:
        """The number of rounds that the run is to have."""
        return self.extended[-1]["rounds"] if self.extended else self.header["config"]["rounds"]

    @property
    def about(self) -> dict[str, Any]:
        """The options of the run's experiment, with the rounds that it has by now; of a program's run its notes."""
        about = self.header["about"]
        return about | {"rounds": self.planned} if "rounds" in about else about

    def without_seal(self) -> "LedgerFile":
        """The ledger without its seal, so that the run can continue."""
        return replace(self, seal=None, size=self.unsealed)

    @property
    def seed_key(self) -> Key[Array, ""]:
        """The run's seed key."""
        return seed_key_of(self.header)

    @property
    def all_environments(self) -> list[dict[str, Any]]:
        """The environments in which the rounds were computed."""
        return [self.header["environment"], *self.environments]

    @property
    def records(self) -> Records:
        """The rounds as columns."""
        return as_records(self.seed_key, self.rows, self.layout)

    @property
    def layout(self) -> Layout:
        """The layout of a round in the file."""
        return layout_of(self.header)

    def cut(self, rounds: int) -> "LedgerFile":
        """The ledger as it was after ``rounds`` rounds, which is a key of ``ends``."""
        kept = {number: head for number, head in self.heads.items() if number <= rounds}
        return replace(
            self,
            rows=self.rows[:rounds],
            heads=kept,
            ends={number: end for number, end in self.ends.items() if number <= rounds},
            evaluations=[row for row in self.evaluations if row.round <= rounds],
            checks={number: check for number, check in self.checks.items() if number <= rounds},
            environments=[each for each in self.environments if each["round"] <= rounds],
            extended=[each for each in self.extended if each["round"] <= rounds],
            unsealed=self.ends[rounds],
            seal=None,
            size=self.ends[rounds],
            torn=0,
        )


def layout_of(header: Mapping[str, Any]) -> Layout:
    """The layout of a round in a ledger with this header."""
    return Layout(tuple((name, kind, tuple(shape)) for name, kind, shape in header["columns"]))


def seed_key_of(header: Mapping[str, Any]) -> Key[Array, ""]:
    """The seed key in the header of a ledger or a delta."""
    return jax.random.wrap_key_data(jnp.array(header["seed"], jnp.uint32), impl=header["prng_impl"])


def load(path: Path | str, *, unfinished: bool = False, salvage: bool = False) -> LedgerFile:
    """Read a ledger and verify every byte of it.

    Args:
      path: the file, or the directory of its run.
      unfinished: whether to accept a ledger without a seal, of a run that goes on or was killed. An incomplete last
        frame, which a kill leaves, is dropped. A ledger that lost its end looks the same: only a seal or a snapshot
        shows the loss.
      salvage: whether to read the complete frames before the damage of an altered ledger, as a ledger without a seal.

    Raises:
      ValueError: there is no ledger, it was altered (the round is named), it has no seal and ``unfinished`` is not
        set, or its header does not describe a valid run.
    """
    path = as_path("path", path)
    path = path / LEDGER if is_folder(path) else path
    content = read_regular(path)
    reader = _Reader(length=len(content))
    try:
        for frame in read_frames(content):
            reader.take(frame)
    except Altered as error:
        if not (salvage and reader.header):
            hint = " (hiso-jax show --salvage FOLDER keeps the rounds before it)" if reader.done else ""
            raise ValueError(f"{path} is refused: {reader.place(error)} {error} (byte {error.at}){hint}") from None
        reader.drop_seal()
    except (ValueError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(f"{path} is not a ledger that can be read here: {error}") from error
    if not reader.header:
        raise ValueError(f"{path} is not a ledger that can be read here: its header is cut short or altered")
    found = reader.found(path)
    _check_rows(path, found.rows)
    if found.seal is not None and found.torn:
        raise ValueError(f"{path} is refused: its seal is followed by bytes that do not belong there")
    if found.seal is None and not (unfinished or salvage):
        raise ValueError(
            f"{path} is refused: it has no seal, and ends after {len(found.rows)} rounds; its run has not finished, or "
            "the end of the file was lost or altered"
        )
    return found


@dataclass
class _Reader:
    """The part of a ledger that was read so far, see :class:`LedgerFile`."""

    length: int
    header: dict[str, Any] = field(default_factory=dict)
    row: np.dtype = field(default_factory=lambda: np.dtype([]))
    blocks: list[np.ndarray] = field(default_factory=list)
    heads: dict[int, bytes] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    checks: dict[int, str] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)
    extended: list[dict[str, Any]] = field(default_factory=list)
    seal: dict[str, Any] | None = None
    done: int = 0
    end: int = 0
    unsealed: int = 0

    def take(self, frame: Frame) -> None:
        """Add the next frame.

        Raises:
          Altered: the frame does not belong at this place.
          ValueError: the payload does not fit the frame's kind.
        """
        begin = self.end
        if frame.kind not in KINDS:
            raise Altered("is of a kind that this release does not know", begin)
        if (frame.kind == HEADER) == bool(self.header) or self.seal is not None:
            raise Altered("is followed by bytes that do not belong there", begin)
        if frame.kind == ROUNDS:
            self.blocks.append(np.frombuffer(frame.payload, self.row))
            self.done += len(self.blocks[-1])
            self.heads[self.done] = frame.digest
        else:
            self._take_json(frame, read_json(bytes(frame.payload), KINDS[frame.kind]), begin)
        self.unsealed = begin if frame.kind == SEAL else frame.end
        self.end = self.ends[self.done] = frame.end

    def _take_json(self, frame: Frame, written: dict[str, Any], begin: int) -> None:
        if frame.kind == HEADER:
            check_key(written)
            check_columns(written["columns"], written["config"])
            self.header, self.row, self.heads[0] = written, layout_of(written).dtype, frame.digest
            return
        if written["rounds" if frame.kind == SEAL else "round"] != self.done:
            raise Altered("does not match the rounds before it", begin)
        if frame.kind == EVALUATION:
            self.checks[self.done] = written.pop("params_sha256")
            self.evaluations.append(_evaluation(written))
        elif frame.kind == ENVIRONMENT:
            self.environments.append(written)
        elif frame.kind == EXTENSION:
            self.extended.append(written)
        elif written["head"] != self.heads[self.done].hex():
            raise Altered("is a seal that does not match the rounds before it", begin)
        else:
            self.seal = written
            self.checks[self.done] = written["params_sha256"]

    def drop_seal(self) -> None:
        """Drop the seal, so that the result is the ledger of a run that has not ended."""
        self.seal, self.end = None, self.unsealed

    def place(self, error: Altered) -> str:
        """The name of the damaged part of the ledger."""
        counted = error.length // self.row.itemsize if error.kind == ROUNDS and self.header else 0
        return _place(self.done, counted, bool(self.header))

    def found(self, path: Path) -> LedgerFile:
        """The ledger of all frames that were read."""
        return LedgerFile(
            path,
            self.header,
            np.concatenate([np.empty(0, self.row), *self.blocks]),
            self.heads,
            self.ends,
            self.evaluations,
            self.checks,
            self.environments,
            self.seal,
            size=self.end,
            torn=self.length - self.end,
            length=self.length,
            extended=self.extended,
            unsealed=self.unsealed,
        )


def _check_rows(path: Path, rows: np.ndarray) -> None:
    """Refuse rounds that no run can have.

    Raises:
      ValueError: the rounds are not numbered from 0, clip more messages than they have, or name an invalid client or
        attendance.
    """
    if (rows["round"] != np.arange(len(rows))).any():
        raise ValueError(f"{path} is refused: its rounds are not numbered 0, 1, …")
    counted = rows["clipped"] if "clipped" in (rows.dtype.names or ()) else np.zeros(1)
    if (counted < 0).any() or (counted > rows["cohort"].shape[1]).any():
        raise ValueError(f"{path} is refused: its rounds clip more messages than they have")
    if (rows["cohort"] < 0).any() or not np.isin(rows["attendance"], range(REPORTED + 1)).all():
        raise ValueError(f"{path} is refused: its rounds contain invalid client ids or attendances")

    if "version" in (rows.dtype.names or ()):
        version = rows["version"]
        if (version < 0).any() or (version > rows["round"][:, None]).any() or (rows["place"] < 0).any():
            raise ValueError(f"{path} is refused: its visits begin in rounds that had not come, or in no place")


def _place(done: int, rounds: int, has_header: bool) -> str:
    """The name of the damaged part after ``done`` good rounds; its frame has ``rounds`` rounds, 0 if unknown."""
    if rounds:
        return f"round {done}" if rounds == 1 else f"its frame of rounds {done} to {done + rounds - 1}"
    if not has_header:
        return "its header"
    return f"what follows round {done - 1}" if done else "what follows the header"


def _evaluation(written: dict[str, Any]) -> Evaluation:
    """The evaluation that :meth:`Ledger.evaluated` wrote; values that were not finite are NaN."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    metrics = {name: number(value) for name, value in written["metrics"].items()}
    return Evaluation(**{**written, "metrics": metrics, "train_loss": number(written["train_loss"])})
