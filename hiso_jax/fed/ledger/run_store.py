"""The store of a run: its ledger and snapshots while it runs, and how an interrupted run is continued from them."""

import logging
from collections.abc import Mapping
from typing import Any

from filelock import FileLock
from jaxtyping import PyTree

from hiso_jax.fed.devices import Placement, agree, all_processes
from hiso_jax.fed.ledger import ledger as ledgers
from hiso_jax.fed.ledger.files import sync_directory
from hiso_jax.fed.ledger.ledger import FileLedger, Ledger
from hiso_jax.fed.ledger.reading import LEDGER, LedgerFile, load
from hiso_jax.fed.ledger.same import check_same, more_rounds
from hiso_jax.fed.ledger.snapshots import KEPT, SNAPSHOTS, Snapshots
from hiso_jax.fed.ledger.storage import Storage, differences, lock

logger = logging.getLogger("hiso_jax")
SNAPSHOT_SECONDS = 600.0


class RunStore:
    """The store of a run, in memory only.

    Attributes:
      ledger: the run's rounds.
      found: the ledger of a run that is continued; None for a new run.
      differs: how this environment differs from an environment in which the run's rounds were computed.
      elsewhere: whether the initial parameters computed here differ from the run's.
    """

    ledger: Ledger
    found: LedgerFile | None = None
    rounds = -1
    differs: tuple[str, ...] = ()
    elsewhere: bool = False

    def __init__(self, seed_key: Any) -> None:
        """Begin an empty ledger."""
        self.ledger = Ledger(seed_key)

    def begin(self, header: Mapping[str, Any], rounds: int, *, like: PyTree | None = None) -> None:
        """Record the description of the run, see :meth:`FileRunStore.begin`."""

    def snapshots(self, placement: Placement) -> list[int]:
        """The numbers of rounds after which snapshots were taken, newest first."""
        return []

    def restore(self, rounds: int, like: PyTree) -> PyTree | None:
        """The tree of the snapshot after ``rounds`` rounds, in host memory; None if any process fails to verify it."""
        return None

    def wants_snapshot(self, rounds: int, seconds: float, *, evaluated: bool) -> bool:
        """Whether a snapshot is due after ``rounds`` rounds, which took ``seconds``."""
        return False

    def snapshot(self, rounds: int, seconds: float, tree: PyTree) -> None:
        """Take a snapshot of ``tree``, which is in host memory."""

    def close(self) -> None:
        """Close the files."""


class FileRunStore(RunStore):
    """The store of a run in its directory; among several processes only the primary one writes."""

    def __init__(self, storage: Storage, seed_key: Any, *, primary: bool = True) -> None:
        """Lock the directory and read the ledger in it.

        Raises:
          ValueError: another process writes to the directory, it holds a run and ``storage.resume`` is not set, or its
            ledger is altered or shorter than its newest snapshot.
        """
        super().__init__(seed_key)
        self.storage, self.primary = storage, primary
        self._last, self._last_seconds, self._replayable = 0, 0.0, True
        self._lock: FileLock | None = None
        self._snapshots: Snapshots | None = None
        if not (primary or storage.resume):
            return
        if primary:
            if not storage.folder.exists():
                storage.folder.mkdir(parents=True)
                sync_directory(storage.folder.parent)
            self._lock = lock(storage.folder)
        path = storage.folder / LEDGER
        try:
            if path.exists():
                if not storage.resume:
                    raise ValueError(
                        f"{storage.folder} has a ledger already: `resume` continues it, or name another directory"
                    )
                self.found = load(path, unfinished=True)
                self.rounds = len(self.found.rows)
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
            if head != found.heads.get(rounds):
                raise ValueError(f"{found.path} is refused: its snapshot after {rounds} rounds is of another run")

    def _open_snapshots(self) -> Snapshots:
        if self._snapshots is None:
            self._snapshots = Snapshots(self.storage.folder, read_only=not self.primary)
        return self._snapshots

    def begin(self, header: Mapping[str, Any], rounds: int, *, like: PyTree | None = None) -> None:
        """Create the ledger, or check that the run in the directory matches ``header`` and continue its ledger.

        Args:
          header: the ledger's header.
          rounds: :attr:`rounds` of the first process.
          like: a tree like those in the snapshots, for a run that cannot be replayed from its ledger: its rounds are
            cut back to the newest snapshot that verifies, and a snapshot is taken at every evaluation. None for a run
            that can be replayed.

        Raises:
          ValueError: the run does not match (the difference is named), or the first process found another ledger.
          OSError: the ledger cannot be written.
        """
        directory, self._replayable = self.storage.folder, like is None
        if rounds >= 0 and rounds != self.rounds:
            raise ValueError(f"{directory} must be a folder that every process sees: the first finds {rounds} rounds")
        if self.found is None:
            if self.primary:
                self.ledger = FileLedger(ledgers.create(directory / LEDGER, header))
            return
        more = more_rounds(self.found, header["config"]["rounds"])
        self.elsewhere = check_same(self.found, header, from_snapshot=self.storage.from_snapshot)
        environments = self.found.all_environments
        self.differs = next((tuple(differs) for each in environments if (differs := differences(each))), ())
        if like is not None:
            self._cut_back(like)
        self._last_seconds = self.found.evaluations[-1].seconds if self.found.evaluations else 0.0
        if more:
            self.found = self.found.without_seal()
        if self.found.seal is not None or not self.primary:
            self.ledger = FileLedger(self.found, read_only=True)
            return
        if self.found.torn:
            logger.warning(
                "%s: %d bytes behind its %d rounds, of a frame that was not written to its end, are dropped",
                self.found.path,
                self.found.torn,
                self.rounds,
            )
        ledger = FileLedger(self.found)
        self.ledger = ledger
        if more:
            ledger.extended(more)
        if differences(environments[-1]):
            ledger.continued(header["environment"])

    def _cut_back(self, like: PyTree) -> None:
        """Drop the rounds after the newest snapshot that verifies."""
        found = self.found
        assert found is not None
        has = (found.path.parent / SNAPSHOTS).is_dir()
        taken = self._open_snapshots().rounds() if has else []
        last = next((rounds for rounds in taken if self._open_snapshots().restore(rounds, like) is not None), 0)
        if last == len(found.rows):
            return
        if self.primary:
            logger.warning(
                "%s: its %d rounds behind the newest snapshot, after %d rounds, are dropped and run again: only "
                "a snapshot holds what continues this run",
                found.path,
                len(found.rows) - last,
                last,
            )
        self.found, self.rounds = found.cut(last), last

    def snapshots(self, placement: Placement) -> list[int]:
        """The numbers of rounds after which the first process has snapshots, newest first."""
        has = (self.storage.folder / SNAPSHOTS).is_dir()
        rounds = self._open_snapshots().rounds()[:KEPT] if has else []
        return [number for number in agree(placement.mesh, *rounds, *[0] * (KEPT - len(rounds))) if number]

    def restore(self, rounds: int, like: PyTree) -> PyTree | None:
        """The tree of the snapshot after ``rounds`` rounds, in host memory; None if any process fails to verify it."""
        tree = self._open_snapshots().restore(rounds, like)
        if not all_processes(tree is not None):
            return None
        self._last = rounds
        return tree

    def wants_snapshot(self, rounds: int, seconds: float, *, evaluated: bool) -> bool:
        """Whether a snapshot is due after ``rounds`` rounds, which took ``seconds``."""
        every = self.storage.snapshot_every
        if not self._replayable:
            return evaluated and rounds > self._last
        if every is None:
            return seconds - self._last_seconds >= SNAPSHOT_SECONDS
        return bool(every) and rounds - self._last >= every

    def snapshot(self, rounds: int, seconds: float, tree: PyTree) -> None:
        """Take a snapshot of ``tree``, which is in host memory.

        Raises:
          OSError: the snapshot cannot be written.
        """
        self._last, self._last_seconds = rounds, seconds
        if self.primary:
            self._open_snapshots().save(rounds, self.ledger.head, tree)

    def close(self) -> None:
        """Close the files and release the lock of the directory."""
        try:
            self.ledger.close()
        finally:
            if self._snapshots is not None:
                self._snapshots.close()
                self._snapshots = None
            if self._lock is not None:
                self._lock.release()
                self._lock = None


def run_store_of(storage: Storage | None, seed_key: Any, *, primary: bool) -> RunStore:
    """The store of a run in ``storage``, or in memory if ``storage`` is None.

    Raises:
      ValueError: as :class:`FileRunStore` does.
    """
    return RunStore(seed_key) if storage is None else FileRunStore(storage, seed_key, primary=primary)
