"""Snapshots: parameters and optimizer state at some rounds, by orbax, so that a resumed run replays few rounds."""

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
# What a snapshot takes beside its arrays, in bytes.
ROOM = 256 * 1024


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the storage library's warnings, of a folder that is only read, say."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Snapshots:
    """The newest snapshots of a run, each of a round and of the ledger's digest after it."""

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        """Open, or make, the folder of snapshots in a run's directory."""
        # Imported where it is needed: it takes as long as everything else.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            create=False,
            read_only=read_only,
            enable_async_checkpointing=False,
            # Only the first process writes, without the others' waiting.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(), active_processes={jax.process_index()}
            ),
        )
        self._folder = (directory / SNAPSHOTS).resolve()
        self._folder.mkdir(exist_ok=True)
        if not read_only:
            # What a kill left half-way; the manager's own cleaning is a thread that may outlive the run.
            for half in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half)
        with _quiet():
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def rounds(self) -> list[int]:
        """After how many rounds snapshots were taken, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, rounds: int, head: bytes, tree: PyTree) -> None:
        """Take one after ``rounds`` rounds, when the ledger's digest was ``head``; ``tree`` is in host memory.

        Raises:
          OSError: it cannot be written.
        """
        ocp = self._ocp
        leaves = dict(enumerate(np.asarray(key_data(leaf)) for leaf in jax.tree.leaves(tree)))
        meta = {"rounds": rounds, "head": head.hex(), "sha256": fingerprint(leaves)}
        # The storage library keeps no array of no elements, and there is nothing to keep of one.
        arrays = {str(number): leaf for number, leaf in leaves.items() if leaf.size}
        # Asked beforehand: half-way through, the storage library's threads each tell of it at length.
        if shutil.disk_usage(self._folder).free < sum(leaf.nbytes for leaf in leaves.values()) + ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        try:
            self._manager.save(
                rounds, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
            )
        except (ValueError, RuntimeError) as error:
            # The storage library's own wrapping of what the file system said.
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
            # Whatever its readers raise of a damaged folder means that there is no snapshot.
            return None

    def restore(self, rounds: int, like: PyTree) -> PyTree | None:
        """The tree at the snapshot after ``rounds`` rounds, in host memory; None if it does not verify.

        Args:
          rounds: which.
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
        """Let go of the folder."""
        self._manager.close()
