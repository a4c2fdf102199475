"""Trees of arrays as safetensors files, with each leaf named by its path."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.ledger import read_regular, write_file


def write_tree(tree: PyTree, path: Path) -> None:
    """Write every leaf of ``tree`` under its path, as in ``params/dense/kernel``.

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
        write_file(path, save(named))
    except OSError as error:
        raise ParameterError("out", f"cannot be written: {path} ({error.strerror})") from error


def read_tree(path: Path, option: str) -> PyTree:
    """The tree of dicts that :func:`write_tree` wrote.

    Raises:
      ValueError: the file cannot be read or is no safetensors file; the error names ``option``, which gave the path.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        named = load(read_regular(path))
    except (ValueError, SafetensorError) as error:
        raise ParameterError(
            option, f"must be a safetensors file of the parameters that the run began with: {error}"
        ) from error
    tree: dict[str, Any] = {}
    for name, array in named.items():
        node, parts = tree, name.split("/")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = array
    return tree
