"""A run's directory: one writer, its ledger, its snapshots, and the way back into a run that was ended."""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from filelock import FileLock, Timeout
from jax.sharding import Mesh
from jaxtyping import PyTree

from hiso_jax.fed import ledger as ledgers
from hiso_jax.fed.frames import FrameWriter
from hiso_jax.fed.ledger import LEDGER, Ledger, LedgerFile
from hiso_jax.fed.replay import replay
from hiso_jax.fed.snapshots import SNAPSHOTS, Snapshots

LOCK = ".lock"
SNAPSHOT_SECONDS = 600.0
PACKAGES = ("hiso-jax", "jax", "jaxlib", "optax", "numpy")
FLAGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_matmul_precision")
# What a run that is continued must have in common with its beginning, and how to say so.
SAME = {
    "columns": "the numbers of a round",
    "seed": "the seed",
    "prng_impl": "the random number generator",
    "config": "the configuration",
    "params": "the parameters' paths, shapes or dtypes",
    "state": "the optimizer",
    "base": "the initial parameters",
    "data": "the training data, their partition or who shows up",
}


@dataclass(frozen=True)
class Storage:
    """Where a run is kept, so that it survives its process.

    Attributes:
      directory: the run's own; made if there is none.
      about: what a reader should know of the run beside its numbers, as JSON: the command's options, say.
      snapshot_every: rounds between snapshots, which bound how many a resumed run replays; 0 takes none; None takes
        one every ten minutes of rounds.
      resume: continue the run that is there; if it had not begun, begin it.
    """

    directory: Path
    about: Mapping[str, Any] = field(default_factory=dict)
    snapshot_every: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked.

        Raises:
          ValueError: a negative ``snapshot_every``.
        """
        if self.snapshot_every is not None and self.snapshot_every < 0:
            raise ValueError(f"snapshot_every must be at least 0, got {self.snapshot_every}")


def release() -> str:
    """The version of this package."""
    return version("hiso-jax")


def environment() -> dict[str, Any]:
    """What a replay must have in common with a run to rebuild it to the last bit, and versions to trace it by."""
    return {
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "flags": {name: getattr(jax.config, name) for name in FLAGS},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def lock(directory: Path) -> FileLock:
    """Enter it to be the run's one writer; the lock goes with its process, however that ends.

    Raises:
      ValueError: another process is, or the directory cannot be written.
    """
    held = FileLock(directory / LOCK, is_singleton=True)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{directory} is being written by another process, and a run has one writer") from None
    except OSError as error:
        raise ValueError(f"{directory} cannot be written ({error.strerror})") from error
    return held


class Keeper:
    """What keeps a run while it goes: in memory alone, or in its directory, too."""

    def __init__(self, storage: Storage | None, seed_key: Any, *, primary: bool = True) -> None:
        """Take the directory, if there is one, and read what is there.

        Of several processes only the ``primary`` one writes.

        Raises:
          ValueError: another process writes there, there is a run that is not to be continued, or its ledger is
            altered or shorter than its newest snapshot.
        """
        self.storage, self.primary = storage, primary
        self.found: LedgerFile | None = None
        self.ledger = Ledger(seed_key)
        self._seed_key, self._last, self._last_seconds = seed_key, 0, 0.0
        self._lock: FileLock | None = None
        self._snapshots: Snapshots | None = None
        if storage is None or not (primary or storage.resume):
            return
        if primary:
            storage.directory.mkdir(parents=True, exist_ok=True)
            self._lock = lock(storage.directory)
        path = storage.directory / LEDGER
        try:
            if path.exists():
                if not storage.resume:
                    raise ValueError(f"{storage.directory} has a ledger already; resume it, or name another directory")
                self.found = ledgers.load(path, unfinished=True)
                self._check_snapshots(self.found)
        except BaseException:
            self.close()
            raise

    def _check_snapshots(self, found: LedgerFile) -> None:
        if not (found.path.parent / SNAPSHOTS).is_dir():
            return
        snapshots = self._open_snapshots()
        for rounds in snapshots.rounds():
            head = snapshots.head(rounds)
            if head is None:
                continue
            if rounds > len(found.rows):
                raise ValueError(
                    f"{found.path} is refused: it ends after {len(found.rows)} rounds, and a snapshot was taken after "
                    f"{rounds}"
                )
            if head != found.heads[rounds]:
                raise ValueError(f"{found.path} is refused: its snapshot after {rounds} rounds is of another run")

    def _open_snapshots(self) -> Snapshots:
        assert self.storage is not None
        if self._snapshots is None:
            self._snapshots = Snapshots(self.storage.directory, read_only=not self.primary)
        return self._snapshots

    def begin(self, header: Mapping[str, Any]) -> None:
        """Create the ledger, or check that the run found is the one of ``header`` and continue its ledger.

        Raises:
          ValueError: it is not, naming what differs.
          OSError: the ledger cannot be written.
        """
        if self.storage is None:
            return
        if self.found is None:
            if self.primary:
                self.found = ledgers.create(self.storage.directory / LEDGER, header)
                writer = FrameWriter(self.found.path, self.found.content)
                self.ledger, self.found = Ledger(self._seed_key, self.found, writer), None
            return
        for name, meaning in SAME.items():
            if self.found.header[name] != header[name]:
                raise ValueError(f"{self.storage.directory} cannot be continued so: {meaning} differ from the run's")
        if self.found.seal is not None or not self.primary:
            self.ledger = Ledger(self._seed_key, self.found)
            return
        self.ledger = Ledger(self._seed_key, self.found, FrameWriter(self.found.path, self.found.content))
        before = [self.found.header["environment"], *self.found.environments][-1]
        if any(before[name] != value for name, value in header["environment"].items()):
            self.ledger.continued(header["environment"])

    def restore(
        self,
        beginning: tuple[PyTree, optax.OptState],
        tx: optax.GradientTransformationExtraArgs,
        place: Callable[[PyTree], PyTree],
        mesh: Mesh | None,
    ) -> tuple[PyTree, optax.OptState]:
        """Parameters and optimizer state after the rounds found: the newest snapshot that verifies, and a replay.

        Args:
          beginning: both before the first round.
          tx: the optimizer.
          place: puts both from host memory where they live.
          mesh: the devices that they are split over.
        """
        assert self.found is not None
        updates, rounds, current = self.found.records.updates, 0, beginning
        if (self.found.path.parent / SNAPSHOTS).is_dir():
            snapshots = self._open_snapshots()
            for candidate in snapshots.rounds():
                tree = snapshots.restore(candidate, beginning)
                if tree is not None:
                    current, rounds = place(tree), candidate
                    break
        self._last = rounds
        return replay(current[0], tx, updates.between(rounds), state=current[1], mesh=mesh)

    def wants_snapshot(self, rounds: int, seconds: float) -> bool:
        """Whether it is time for a snapshot after ``rounds`` rounds, which took ``seconds``."""
        if self.storage is None:
            return False
        every = self.storage.snapshot_every
        if every is None:
            return seconds - self._last_seconds >= SNAPSHOT_SECONDS
        return bool(every) and rounds - self._last >= every

    def snapshot(self, rounds: int, seconds: float, tree: PyTree) -> None:
        """Take a snapshot of ``tree``, which is in host memory.

        Raises:
          OSError: it cannot be written.
        """
        self._last, self._last_seconds = rounds, seconds
        if self.primary:
            self._open_snapshots().save(rounds, self.ledger.head, jax.tree.map(np.asarray, tree))

    def close(self) -> None:
        """Close the files and give the directory back."""
        try:
            self.ledger.close()
        finally:
            if self._snapshots is not None:
                self._snapshots.close()
                self._snapshots = None
            if self._lock is not None:
                self._lock.release()
                self._lock = None
