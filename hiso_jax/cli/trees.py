"""Trees of arrays as safetensors files, each leaf under its path."""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from hiso_jax.fed.ledger import write_whole


def write_tree(tree: PyTree, path: Path) -> None:
    """Write every leaf of ``tree`` by its path, ``params/dense/kernel``.

    Raises:
      ValueError: the file cannot be written.
    """
    from safetensors.numpy import save

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {
        jax.tree_util.keystr(where, simple=True, separator="/"): np.ascontiguousarray(leaf) for where, leaf in leaves
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(named))
    except OSError as error:
        raise ValueError(f"out cannot be written: {path} ({error.strerror})") from error
