"""What keeps a run while it goes: its ledger, its snapshots, and the way back into a run that was ended."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import optax
from filelock import FileLock
from jaxtyping import PyTree

from hiso_jax.fed.devices import Placement, agree, all_processes
from hiso_jax.fed.ledger import ledger as ledgers
from hiso_jax.fed.ledger.files import sync_directory
from hiso_jax.fed.ledger.fingerprint import fingerprint
from hiso_jax.fed.ledger.frames import FrameWriter
from hiso_jax.fed.ledger.header import EXECUTION
from hiso_jax.fed.ledger.ledger import LEDGER, Ledger, LedgerFile, json_bytes
from hiso_jax.fed.ledger.replay import replay
from hiso_jax.fed.ledger.snapshots import KEPT, SNAPSHOTS, Snapshots
from hiso_jax.fed.ledger.storage import Storage, differences, lock

logger = logging.getLogger("hiso_jax")
SNAPSHOT_SECONDS = 600.0
# What a run that is continued must have in common with its beginning, and how to say so.
SAME = {
    "columns": "the numbers of a round",
    "seed": "the seed",
    "prng_impl": "the random number generator",
    "config": "the configuration",
    "flags": "jax's flags",
    "params": "the parameters' paths, shapes or dtypes",
    "state": "the optimizer",
    "base": "the initial parameters",
    "data": "the training data, their partition or who shows up",
}


def _comparable(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a header says of a run's numbers, without how they are computed."""
    config = {name: value for name, value in header["config"].items() if name not in EXECUTION}
    return {**header, "config": config, "flags": header["environment"]["flags"]}


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
        self._differs: list[str] = []
        self._lock: FileLock | None = None
        self._snapshots: Snapshots | None = None
        if storage is None or not (primary or storage.resume):
            return
        if primary:
            if not storage.directory.exists():
                storage.directory.mkdir(parents=True)
                sync_directory(storage.directory.parent)
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

    @property
    def rounds(self) -> int:
        """How many rounds were found; -1 if there was no ledger."""
        return -1 if self.found is None else len(self.found.rows)

    @property
    def timed(self) -> int:
        """How many of them were timed: those before the last evaluation."""
        return self.found.evaluations[-1].round if self.found and self.found.evaluations else 0

    @property
    def seconds(self) -> float:
        """How long those took."""
        return self.found.evaluations[-1].seconds if self.found and self.found.evaluations else 0.0

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
        assert self.storage is not None
        if self._snapshots is None:
            self._snapshots = Snapshots(self.storage.directory, read_only=not self.primary)
        return self._snapshots

    def begin(self, header: Mapping[str, Any], rounds: int) -> None:
        """Create the ledger, or check that the run found is the one of ``header`` and continue its ledger.

        Args:
          header: what the ledger is to say of the run.
          rounds: :attr:`rounds` of the first process.

        Raises:
          ValueError: it is not, naming what differs; or the first process found another ledger.
          OSError: the ledger cannot be written.
        """
        assert self.storage is not None
        directory = self.storage.directory
        if rounds >= 0 and rounds != self.rounds:
            raise ValueError(f"{directory} must be a folder that every process sees: the first finds {rounds} rounds")
        if self.found is None:
            if self.primary:
                file = ledgers.create(directory / LEDGER, header)
                self.ledger = Ledger(self._seed_key, file, FrameWriter(file.path, file.size))
            return
        now = _comparable(json.loads(json_bytes(header)))
        before = _comparable(self.found.header)
        for name, meaning in SAME.items():
            if before[name] != now[name]:
                raise ValueError(f"{directory} cannot be continued so: {meaning} differ from the run's")
        environments = self.found.all_environments
        self._differs = next((differs for each in environments if (differs := differences(each))), [])
        self._last_seconds = self.seconds
        if self.found.seal is not None or not self.primary:
            self.ledger = Ledger(self._seed_key, self.found)
            return
        if self.found.torn:
            logger.warning(
                "%s: %d bytes behind its %d rounds, of a frame that was not written to its end, are dropped",
                self.found.path,
                self.found.torn,
                self.rounds,
            )
        self.ledger = Ledger(self._seed_key, self.found, FrameWriter(self.found.path, self.found.size))
        if differences(environments[-1]):
            self.ledger.continued(header["environment"])

    def restore(
        self,
        beginning: tuple[PyTree, optax.OptState],
        tx: optax.GradientTransformationExtraArgs,
        placement: Placement,
    ) -> tuple[PyTree, optax.OptState]:
        """Parameters and optimizer state after the rounds found: the newest snapshot that verifies, and a replay.

        Args:
          beginning: both before the first round.
          tx: the optimizer.
          placement: where they live.

        Raises:
          ValueError: the rounds lead to other parameters than those that the run had, made where it was made.
        """
        found = self.found
        assert found is not None
        current, start = beginning, 0
        for candidate in self._candidates(placement):
            # Every process the same, or none.
            tree = self._open_snapshots().restore(candidate, beginning)
            if all_processes(tree is not None):
                current, start = placement.like(tree, beginning), candidate
                break
        self._last = start
        known = max((rounds for rounds in found.checks if rounds > start), default=start)
        mesh, updates = placement.mesh, found.records.updates
        current = replay(current[0], tx, updates.between(start, known), state=current[1], mesh=mesh)
        if known > start and fingerprint(placement.whole(current[0])) != found.checks[known]:
            other = f"its first {known} rounds lead to other parameters here"
            if not self._differs:
                raise ValueError(
                    f"{found.path.parent} cannot be continued so: {other}; its optimizer or its processor was another"
                )
            if self.primary:
                logger.warning("%s goes on, but %s: %s", found.path.parent, other, "; ".join(self._differs))
        return replay(current[0], tx, updates.between(known), state=current[1], mesh=mesh)

    def _candidates(self, placement: Placement) -> list[int]:
        """After how many rounds the first process has snapshots, the newest first."""
        assert self.found is not None
        has = (self.found.path.parent / SNAPSHOTS).is_dir()
        rounds = self._open_snapshots().rounds()[:KEPT] if has else []
        return [number for number in agree(placement.mesh, *rounds, *[0] * (KEPT - len(rounds))) if number]

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
            self._open_snapshots().save(rounds, self.ledger.head, tree)

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
