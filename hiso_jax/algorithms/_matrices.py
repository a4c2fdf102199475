"""Separate rules for matrices and other leaves, and Muon's five Newton-Schulz steps (K. Jordan et al. 2024)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from hiso_jax.stacked import is_stacked

STEPS, COEFFICIENTS, EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7
# The seed of the held bases, the same in every run.
BASES = 0x5B5B
# The number of a power iteration's first axes; no held basis has this number.
AXES = 2**31 - 1


def basis_key(number: Array | int) -> Key[Array, ""]:
    """The key of the held bases with index ``number``."""
    return jax.random.fold_in(jax.random.key(BASES), number)


def newton_schulz(matrix: Float[Array, "R C"]) -> Float[Array, "R C"]:
    """An approximation of U Vᵀ for the matrix U S Vᵀ; its singular values lie between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (jnp.linalg.norm(x) + EPS)
    for _ in range(STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


def of_matrices(
    change: Callable[..., Array], rest: Callable[..., Array], tree: PyTree, *others: PyTree, as_leaf: bool = True
) -> PyTree:
    """Apply ``change`` to every matrix, layer by layer, and ``rest`` to all other leaves.

    A leaf of two or more axes is a matrix whose columns are its last axis.

    Args:
      change: (matrix [R, C], the corresponding leaves of ``others``) → an array.
      rest: (leaf, the corresponding leaves of ``others``) → an array, for leaves that are not matrices.
      tree: the leaves.
      others: trees of the same structure.
      as_leaf: whether the array of a matrix is reshaped to its leaf.
    """

    def leaf(layers: int, x: Array, *own: Array) -> Array:
        if x.ndim - layers < 2 or not x.size:
            return rest(x, *own)
        flat = x.reshape(*x.shape[:layers], -1, x.shape[-1])
        made = (jax.vmap(change) if layers else change)(flat, *own)
        return made.reshape(x.shape) if as_leaf else made

    def node(at: PyTree, *own: PyTree) -> PyTree:
        return jax.tree.map(lambda *leaves: leaf(int(is_stacked(at)), *leaves), at, *own)

    return jax.tree.map(node, tree, *others, is_leaf=is_stacked)
