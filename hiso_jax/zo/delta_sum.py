"""The running sum Δ over directions: the same arithmetic whether directions are kept or regenerated.

Every direction updates the running total of a dense leaf. A leaf of low rank keeps only its weighted factors; all its
terms are added at the end in one pass over the memory.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree, Shaped

from hiso_jax.exact import pin
from hiso_jax.factored import Factors, is_factors, outer, term_of
from hiso_jax.zo.directions import leaves_of, working_dtype
from hiso_jax.zo.partitioned import split_as

Total = list[Array | None]
"""The sums of the dense leaves, in the order of the parameters' leaves; None for a leaf of low rank."""

# Number of low-rank terms added in one pass.
UNROLLED = 16


def begin(params: PyTree[Shaped[Array, "..."]], z: PyTree) -> Total:
    """The empty sum, sharded over devices like ``params``.

    Args:
      params: the parameters; only their shapes and dtypes are read.
      z: a direction; only its shapes and dtypes are read.
    """
    leaves = zip(jax.tree.leaves(params), leaves_of(z), strict=True)
    return [None if is_factors(u) else split_as(x, jnp.zeros(x.shape, working_dtype(x))) for x, u in leaves]


def add_weighted(total: Total, z: list[Array | Factors], weights: list[Float[Array, "..."]]) -> tuple[Total, list]:
    """``total + weight · z`` for the dense leaves, and the weighted factors of the low-rank leaves.

    Args:
      total: the sum so far.
      z: the leaves of a direction.
      weights: one array for each leaf: a scalar array or [...] as the leaf; [..., R, 1] for a factor A of R rows.
    """

    def whole(a: Array, u: Array, weight: Array) -> Array:
        return pin(a + pin(weight.astype(u.dtype) * u))

    def thin(u: Factors, weight: Array) -> Factors:
        return Factors(pin(weight.astype(u.dtype) * u.rows), u.columns, u.own)

    each = list(zip(total, z, weights, strict=True))
    sums = [None if isinstance(u, Factors) or a is None else whole(a, u, weight) for a, u, weight in each]
    return sums, [thin(u, weight) if isinstance(u, Factors) else None for _, u, weight in each]


def finish(params: PyTree[Shaped[Array, "..."]], total: Total, terms: list) -> PyTree[Shaped[Array, "..."]]:
    """Δ in the structure of ``params``.

    Args:
      params: the parameters; only their shapes are read.
      total: the sums over all directions.
      terms: the weighted factors of all directions, with leading axes of directions and groups.
    """
    leaves, structure = jax.tree.flatten(params)
    sums = iter(term for term in terms if term is not None)
    whole = [split_as(x, _sum(next(sums), x)) if a is None else a for x, a in zip(leaves, total, strict=True)]
    return jax.tree.unflatten(structure, whole)


def _sum(terms: Factors, like: Array) -> Array:
    """Σ_q A_q B_qᵀ over all leading axes, in the shape of ``like``."""
    layers = like.ndim - len(terms.own)

    def listed(factor: Array) -> Array:
        own = factor.reshape(-1, *factor.shape[factor.ndim - 2 - layers :])
        return jnp.moveaxis(own, -1, 1).reshape(-1, *own.shape[1:-1])

    rows, columns = listed(terms.rows), listed(terms.columns)
    if len(rows) <= UNROLLED:
        return outer(jnp.moveaxis(rows, 0, -1), jnp.moveaxis(columns, 0, -1)).reshape(like.shape)

    def in_chunks(x: Array) -> Array:
        pieces = -(-len(x) // UNROLLED)
        filled = jnp.pad(x, [(0, pieces * UNROLLED - len(x))] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(pieces, UNROLLED, *x.shape[1:])

    def body(total: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
        for a, b in zip(*piece, strict=True):
            total = total + term_of(a, b)
        return total, None

    zero = jnp.zeros((*rows.shape[1:], columns.shape[-1]), rows.dtype)
    return lax.scan(body, zero, (in_chunks(rows), in_chunks(columns)))[0].reshape(like.shape)
