"""The ledger: every round of a run, appended to a file before the state that it produced is seen."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from hiso_jax.fed.ledger.frames import Altered, FrameWriter, read_frames
from hiso_jax.fed.ledger.records import Evaluation, Layout, Records, as_records, as_rows, layout

LEDGER = "ledger.hiso"
HEADER, ROUNDS, EVALUATION, SEAL, ENVIRONMENT = b"HEAD", b"RNDS", b"EVAL", b"SEAL", b"ENV "


@dataclass(frozen=True)
class LedgerFile:
    """A ledger as it was read and verified.

    Attributes:
      path: where it is.
      header: what the run is, see ``docs/formats.md``.
      rows: its rounds as the file holds them, [R].
      heads: the digest of the header, and of every frame of rounds, by the number of rounds up to its end.
      ends: where in the file what was written of so many rounds ends, by the same numbers.
      evaluations: those that were made.
      checks: SHA-256 of the parameters, by the number of rounds, where it was noted: at evaluations and at the end.
      environments: where it was continued elsewhere: {"round": r, ...}.
      seal: how it ended, or None if it has not.
      size: bytes of its good frames.
      torn: bytes behind them, of a frame that was not written to its end.
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

    @property
    def seed_key(self) -> Key[Array, ""]:
        """The run's seed key."""
        return seed_key_of(self.header)

    @property
    def all_environments(self) -> list[dict[str, Any]]:
        """Where its rounds were made."""
        return [self.header["environment"], *self.environments]

    @property
    def records(self) -> Records:
        """Its rounds as columns."""
        return as_records(self.seed_key, self.rows, self.layout)

    @property
    def layout(self) -> Layout:
        """How a round stands in it."""
        return layout_of(self.header)

    def cut(self, rounds: int) -> "LedgerFile":
        """As it was after so many rounds, an entry of ``ends``."""
        kept = {number: head for number, head in self.heads.items() if number <= rounds}
        return replace(
            self,
            rows=self.rows[:rounds],
            heads=kept,
            ends={number: end for number, end in self.ends.items() if number <= rounds},
            evaluations=[row for row in self.evaluations if row.round <= rounds],
            checks={number: check for number, check in self.checks.items() if number <= rounds},
            environments=[each for each in self.environments if each["round"] <= rounds],
            seal=None,
            size=self.ends[rounds],
            torn=0,
        )


def layout_of(header: Mapping[str, Any]) -> Layout:
    """How a round stands in a ledger of this header."""
    return Layout(tuple((name, kind, tuple(shape)) for name, kind, shape in header["columns"]))


def seed_key_of(header: Mapping[str, Any]) -> Key[Array, ""]:
    """The seed key that a header or a delta names."""
    return jax.random.wrap_key_data(jnp.array(header["seed"], jnp.uint32), impl=header["prng_impl"])


def load(path: Path | str, *, unfinished: bool = False) -> LedgerFile:
    """Read a ledger and verify every byte of it.

    Args:
      path: the file, or the directory of its run.
      unfinished: whether to read one without a seal, of a run that goes on or was ended. What a kill left of its last
        frame is dropped. A ledger that lost its end looks the same: only a seal, or a snapshot, tells.

    Raises:
      ValueError: there is no ledger, it was altered (the round is named), or it has no seal and ``unfinished`` is not
        set.
    """
    path = Path(path)
    path = path / LEDGER if path.is_dir() else path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    header: dict[str, Any] = {}
    blocks: list[np.ndarray] = []
    row, seal, done, end = np.dtype([]), None, 0, 0
    heads: dict[int, bytes] = {}
    ends: dict[int, int] = {}
    checks: dict[int, str] = {}
    evaluations, environments = [], []
    try:
        for frame in read_frames(content):
            if (frame.kind == HEADER) == bool(header) or seal is not None:
                raise Altered("is followed by what does not belong there", end)
            end = frame.end
            if frame.kind == ROUNDS:
                blocks.append(np.frombuffer(frame.payload, row))
                done += len(blocks[-1])
                heads[done], ends[done] = frame.digest, end
                continue
            ends[done] = end
            written = json.loads(bytes(frame.payload))
            if frame.kind == HEADER:
                header, row = written, layout_of(written).dtype
                heads[0] = frame.digest
            elif frame.kind == EVALUATION:
                checks[written["round"]] = written.pop("params_sha256")
                evaluations.append(_evaluation(written))
            elif frame.kind == ENVIRONMENT:
                environments.append(written)
            elif frame.kind == SEAL:
                seal = written
                checks[seal["rounds"]] = seal["params_sha256"]
    except Altered as error:
        what = _place(done, error.length // row.itemsize if error.kind == ROUNDS and header else 0, bool(header))
        raise ValueError(f"{path} is refused: {what} {error} (byte {error.at})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a ledger that can be read here: {error}") from error
    if not header:
        raise ValueError(f"{path} is not a ledger that can be read here: its header is cut short or altered")
    table, torn = np.concatenate([np.empty(0, row), *blocks]), len(content) - end
    if seal is not None and (seal["rounds"] != done or torn):
        raise ValueError(f"{path} is refused: its seal is not that of its {done} rounds")
    if seal is None and not unfinished:
        raise ValueError(
            f"{path} is refused: it has no seal, and ends after {done} rounds; its run has not finished, or the end of "
            "the file was lost or altered"
        )
    return LedgerFile(path, header, table, heads, ends, evaluations, checks, environments, seal, size=end, torn=torn)


def _place(done: int, rounds: int, has_header: bool) -> str:
    """What of a ledger of ``done`` good rounds is damaged; ``rounds`` are in its frame, if that is known."""
    if rounds:
        return f"round {done}" if rounds == 1 else f"its frame of rounds {done} to {done + rounds - 1}"
    if not has_header:
        return "its header"
    return f"what follows round {done - 1}" if done else "what follows the header"


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
        self._writer = None if read_only else FrameWriter(file.path, file.size)

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

    def seal(self, **ending: Any) -> None:
        """End the log: the number of rounds, the digest of the last, and what ``ending`` says of the run."""
        self._write(SEAL, json_bytes({"rounds": self.rounds, "head": self.head.hex(), **ending}))

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


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


def _evaluation(written: dict[str, Any]) -> Evaluation:
    """What :meth:`Ledger.evaluated` wrote; what was not finite is NaN."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    metrics = {name: number(value) for name, value in written["metrics"].items()}
    return Evaluation(**{**written, "metrics": metrics, "train_loss": number(written["train_loss"])})
