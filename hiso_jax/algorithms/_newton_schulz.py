"""Five Newton-Schulz steps towards a matrix's orthogonal factor (Muon, K. Jordan et al. 2024)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hiso_jax.stacked import is_stacked

STEPS, COEFFICIENTS, EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7


def newton_schulz(matrix: Float[Array, "R C"]) -> Float[Array, "R C"]:
    """About U Vᵀ of U S Vᵀ: singular values come to between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (jnp.linalg.norm(x) + EPS)
    for _ in range(STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


def of_matrices(change: Callable[[Array], Array], rest: Callable[[Array], Array], tree: PyTree) -> PyTree:
    """``change`` of every leaf of two or more axes, the last one the columns, layer by layer; ``rest`` of others."""

    def leaf(x: Array, layers: int) -> Array:
        if x.ndim - layers < 2:
            return rest(x)
        flat = x.reshape(*x.shape[:layers], -1, x.shape[-1])
        return (jax.vmap(change) if layers else change)(flat).reshape(x.shape)

    def node(at: PyTree) -> PyTree:
        return jax.tree.map(lambda x: leaf(x, int(is_stacked(at))), at)

    return jax.tree.map(node, tree, is_leaf=is_stacked)
