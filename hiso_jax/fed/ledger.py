"""The ledger: every round of a run, appended to a file before the state that it produced is seen."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from hiso_jax.fed.frames import Altered, FrameWriter, read_frames
from hiso_jax.fed.records import Records, as_records
from hiso_jax.fed.result import Evaluation

LEDGER = "ledger.hiso"
HEADER, ROUND, EVALUATION, SEAL, ENVIRONMENT = b"HEAD", b"RND ", b"EVAL", b"SEAL", b"ENV "


def as_columns(layout: np.dtype) -> list[list[Any]]:
    """A round's layout as JSON holds it: name, dtype and shape of each field."""
    return [
        [name, field.base.str, list(field.shape)] for name, (field, *_) in (layout.fields or {}).items() if field.base
    ]


def as_layout(columns: list[list[Any]]) -> np.dtype:
    """What :func:`as_columns` wrote."""
    return np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in columns])


@dataclass(frozen=True)
class LedgerFile:
    """A ledger as it was read and verified.

    Attributes:
      path: where it is.
      header: what the run is, see ``docs/formats.md``.
      rows: its rounds as the file holds them, [R].
      heads: the digest after each round, the first after the header, R + 1 of them.
      evaluations: those that were made.
      environments: where it was continued elsewhere: {"round": r, ...}.
      seal: how it ended, or None if it has not.
      content: the bytes of its good frames.
      torn: bytes behind them, of a frame that was not written to its end.
    """

    path: Path
    header: dict[str, Any]
    rows: np.ndarray
    heads: list[bytes]
    evaluations: list[Evaluation]
    environments: list[dict[str, Any]]
    seal: dict[str, Any] | None
    content: bytes
    torn: int

    @property
    def seed_key(self) -> Key[Array, ""]:
        """The run's seed key."""
        return seed_key_of(self.header)

    @property
    def records(self) -> Records:
        """Its rounds as columns."""
        return as_records(self.seed_key, self.rows)


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
    rows, heads, evaluations, environments, seal, end = [], [], [], [], None, 0
    what = "the header"
    try:
        for frame in read_frames(content):
            if (frame.kind == HEADER) == bool(header) or seal is not None:
                raise Altered("is followed by what does not belong there", end)
            end = frame.end
            if frame.kind == ROUND:
                rows.append(frame.payload)
                heads.append(frame.digest)
            elif frame.kind == HEADER:
                header = json.loads(bytes(frame.payload))
                heads.append(frame.digest)
            elif frame.kind == EVALUATION:
                evaluations.append(_evaluation(json.loads(bytes(frame.payload))))
            elif frame.kind == ENVIRONMENT:
                environments.append(json.loads(bytes(frame.payload)))
            elif frame.kind == SEAL:
                seal = json.loads(bytes(frame.payload))
            what = f"what follows round {len(rows) - 1}" if rows else "what follows the header"
    except Altered as error:
        raise ValueError(f"{path} is refused: {what} {error} (byte {error.at})") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a ledger that can be read here: {error}") from error
    if not header:
        raise ValueError(f"{path} is not a ledger that can be read here: its header is cut short or altered")
    table = np.frombuffer(b"".join(rows), as_layout(header["columns"]))
    if seal is not None and (seal["rounds"] != len(table) or len(content) > end):
        raise ValueError(f"{path} is refused: its seal is not that of its {len(table)} rounds")
    if seal is None and not unfinished:
        raise ValueError(
            f"{path} is refused: it has no seal, and ends after {len(table)} rounds; its run has not finished, or the "
            "end of the file was lost or altered"
        )
    return LedgerFile(
        path, header, table, heads, evaluations, environments, seal, content[:end], torn=len(content) - end
    )


class Ledger:
    """The growing log of a run, in memory and, if it has a file, on disk."""

    def __init__(self, seed_key: Key[Array, ""], file: LedgerFile | None = None, writer: FrameWriter | None = None):
        """Begin an empty log, or continue that of ``file`` through ``writer``."""
        self.seed_key, self._writer = seed_key, writer
        self._blocks = [] if file is None or not len(file.rows) else [file.rows]
        self.head = b"" if file is None else file.heads[-1]

    def append(self, rows: np.ndarray) -> None:
        """Append a block of rounds, see :func:`hiso_jax.fed.records.as_rows`; on disk once this returns.

        Raises:
          OSError: they cannot be written; neither file nor log has them then.
        """
        if self._writer is not None:
            head = self.head
            for row in rows:
                head = self._writer.add(ROUND, row.tobytes())
            self._writer.sync()
            self.head = head
        self._blocks.append(rows)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Note an evaluation; on disk with the next rounds."""
        if self._writer is not None:
            self._writer.add(EVALUATION, _json(_finite(asdict(evaluation))))

    def continued(self, environment: Mapping[str, Any]) -> None:
        """Note that the run goes on elsewhere than it began."""
        if self._writer is not None:
            self._writer.add(ENVIRONMENT, _json({"round": self.rounds, **environment}))

    def seal(self, **ending: Any) -> None:
        """End the log: the number of rounds, the digest of the last, and what ``ending`` says of the run."""
        if self._writer is not None:
            self._writer.add(SEAL, _json({"rounds": self.rounds, "head": self.head.hex(), **ending}))
            self._writer.sync()

    def close(self) -> None:
        """Sync what is pending and close the file."""
        if self._writer is not None:
            self._writer.close()

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
        return as_records(self.seed_key, np.concatenate(self._blocks))


def create(path: Path, header: Mapping[str, Any]) -> LedgerFile:
    """Make the file of a ledger without rounds."""
    FrameWriter.create(path, HEADER, _json(header))
    return load(path, unfinished=True)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _finite(value: Any) -> Any:
    """``value`` as JSON can hold it: what is not finite as null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _evaluation(written: dict[str, Any]) -> Evaluation:
    """What :meth:`Ledger.evaluated` wrote; what was not finite is NaN."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    metrics = {name: number(value) for name, value in written["metrics"].items()}
    return Evaluation(**{**written, "metrics": metrics, "train_loss": number(written["train_loss"])})
