"""Fingerprints of trees of arrays (64 hexadecimal digits), samples of their values, and lists of their leaves."""

import hashlib
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from hiso_jax.fed.devices import key_data

# The number of values of a model that a ledger and a delta hold.
SAMPLED = 64


def fingerprint(tree: PyTree) -> str:
    """SHA-256 over every leaf's path, shape, dtype and bytes, in the order of ``jax.tree.leaves``."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(key_data(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {np.shape(leaf)} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def sample(tree: PyTree) -> list[float]:
    """At most ``SAMPLED`` values of a tree, evenly spaced, to estimate how far apart two trees of one structure are."""
    leaves = [np.asarray(key_data(leaf)).reshape(-1) for leaf in jax.tree.leaves(tree)]
    ends = np.cumsum([0, *(leaf.size for leaf in leaves)])
    places = np.unique(np.linspace(0, ends[-1] - 1, min(SAMPLED, int(ends[-1]))).astype(np.int64))
    owners = np.searchsorted(ends, places, "right") - 1
    return [float(leaves[owner][place - ends[owner]]) for owner, place in zip(owners, places, strict=True)]


def base_fingerprints(trained: PyTree, frozen: PyTree | None) -> dict[str, str | None]:
    """The fingerprints of a model before its first round, by which a delta identifies its base checkpoint."""
    return {"trained": fingerprint(trained), "frozen": None if frozen is None else fingerprint(frozen)}


def contents(tree: PyTree) -> list[list[Any]]:
    """The path, shape and dtype of every leaf, in the order of ``jax.tree.leaves``; a leaf may be a shape only."""
    return [
        [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
