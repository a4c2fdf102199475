"""Snapshots: parameters and optimizer state at some rounds (orbax), so that a resumed run replays few rounds."""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from hiso_jax.fed.devices import from_key_data, key_data
from hiso_jax.fed.ledger.fingerprint import fingerprint

SNAPSHOTS = "snapshots"
KEPT = 2
# The bytes that a snapshot takes beside its arrays.
ROOM = 256 * 1024


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of the storage library, for example that a folder is read-only."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Snapshots:
    """The newest snapshots of a run, each with its number of rounds and the ledger's digest after them."""

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        """Open, or create, the folder of snapshots in a run's directory."""
        # Imported here, where it is needed: this import takes as long as all others together.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            create=False,
            read_only=read_only,
            enable_async_checkpointing=False,
            # Only the first process writes; the other processes do not wait for it.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(), active_processes={jax.process_index()}
            ),
        )
        self._folder = (directory / SNAPSHOTS).resolve()
        self._folder.mkdir(exist_ok=True)
        if not read_only:
            # Remove incomplete snapshots of a killed run; the manager's own cleanup thread may outlive the run.
            for half in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half)
        with _quiet():
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def rounds(self) -> list[int]:
        """The numbers of rounds after which snapshots were taken, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, rounds: int, head: bytes, tree: PyTree) -> None:
        """Take a snapshot after ``rounds`` rounds, when the ledger's digest was ``head``; ``tree`` is in host memory.

        Raises:
          OSError: the snapshot cannot be written.
        """
        ocp = self._ocp
        leaves = dict(enumerate(np.asarray(key_data(leaf)) for leaf in jax.tree.leaves(tree)))
        meta = {"rounds": rounds, "head": head.hex(), "sha256": fingerprint(leaves)}
        # The storage library cannot save an empty array, which has no values to save.
        arrays = {str(number): leaf for number, leaf in leaves.items() if leaf.size}
        # Checked beforehand: on a full disk each thread of the storage library prints a long error.
        if shutil.disk_usage(self._folder).free < sum(leaf.nbytes for leaf in leaves.values()) + ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        try:
            self._manager.save(
                rounds, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
            )
        except (ValueError, RuntimeError) as error:
            # The storage library wraps the errors of the file system in its own.
            full = os.strerror(errno.ENOSPC) in str(error)
            number = errno.ENOSPC if full else errno.EIO
            raise OSError(number, os.strerror(number), str(self._folder)) from error

    def head(self, rounds: int) -> bytes | None:
        """The ledger's digest at the snapshot after ``rounds`` rounds; None if it cannot be read."""
        meta = self._meta(rounds)
        return None if meta is None else bytes.fromhex(meta["head"])

    def _meta(self, rounds: int) -> dict[str, Any] | None:
        try:
            return self._manager.restore(rounds, args=self._ocp.args.Composite(meta=self._ocp.args.JsonRestore()))[
                "meta"
            ]
        except Exception:
            # Any error that the library raises for a damaged folder means that there is no snapshot.
            return None

    def restore(self, rounds: int, like: PyTree) -> PyTree | None:
        """The tree at the snapshot after ``rounds`` rounds, in host memory; None if it does not verify.

        Args:
          rounds: the number of rounds of the snapshot.
          like: a tree of the same structure, of arrays or of their shapes.
        """
        ocp, meta = self._ocp, self._meta(rounds)
        if meta is None:
            return None
        leaves, structure = jax.tree.flatten(like)
        shapes = [jax.eval_shape(key_data, leaf) for leaf in leaves]
        every = {str(number): np.zeros(leaf.shape, leaf.dtype) for number, leaf in enumerate(shapes)}
        wanted = {number: leaf for number, leaf in every.items() if leaf.size}
        try:
            arrays = self._manager.restore(rounds, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted)))[
                "arrays"
            ]
        except Exception:
            return None
        found = {number: np.asarray({**every, **arrays}[str(number)]) for number in range(len(leaves))}
        if fingerprint(found) != meta["sha256"]:
            return None
        return jax.tree.unflatten(structure, map(from_key_data, found.values(), leaves))

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()
