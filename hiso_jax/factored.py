"""Matrices that are not made dense: a product of two thin factors, and a weight with such a product beside it.

A direction of low rank u = A Bᵀ is as cheap to evaluate as to draw if the model multiplies by it in two thin steps,
x (W + s u) = x W + s (x A) Bᵀ: no perturbed copy of W exists, and all who evaluate along directions of their own share
the product with W (EGGROLL, arXiv 2511.16652). The one word for it that models and the zeroth-order mathematics share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from hiso_jax.exact import pin, rounded
from hiso_jax.renamed import successor

PerturbedAs = Callable[[str], Literal["matrix", "table"] | None]
"""A parameter's dotted name → how the model reads it when it is perturbed along a direction: by :func:`product` and
:func:`take` (a matrix), rows of it by :func:`take` (a table of embeddings), or None: as an array made dense."""


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Factors:
    """A matrix A Bᵀ, or a stack of them, in the place of an array of ``shape``.

    Attributes:
      rows: A, [..., R, r], R being all axes of the array but the last.
      columns: B, [..., C, r].
      own: the shape of the array, without any axis of stacked layers.
    """

    rows: Float[Array, "... R r"]
    columns: Float[Array, "... C r"]
    own: tuple[int, ...]

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[int, ...]]:
        """Keys that tell the factors apart in a saved state."""
        key = jax.tree_util.DictKey
        return ((key("rows"), self.rows), (key("columns"), self.columns)), self.own

    @classmethod
    def tree_unflatten(cls, own: tuple[int, ...], children: tuple[Any, Any]) -> "Factors":
        """The inverse."""
        return cls(*children, own)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return (*self.rows.shape[:-2], *self.own)

    @property
    def dtype(self) -> Any:
        """Of the array."""
        return self.rows.dtype

    def dense(self) -> Shaped[Array, "..."]:
        """The array itself, summed term by term, so that every program has the same bits."""
        return outer(self.rows, self.columns).reshape(self.shape)


def outer(rows: Float[Array, "... R r"], columns: Float[Array, "... C r"]) -> Float[Array, "... R C"]:
    """A Bᵀ, summed term by term: a product of matrices would be rounded to fewer bits on accelerators."""
    terms = zip(jnp.unstack(rows, axis=-1), jnp.unstack(columns, axis=-1), strict=True)
    return reduce(add, [term_of(a, b) for a, b in terms])


def term_of(row: Float[Array, "... R"], column: Float[Array, "... C"]) -> Float[Array, "... R C"]:
    """A bᵀ, each product rounded: of two that are added either could be contracted, in one program and in another."""
    return rounded(row[..., :, None] * column[..., None, :])


def is_factors(node: Any) -> bool:
    """Whether ``node`` stands for a matrix by its factors."""
    return isinstance(node, Factors)


def dense(node: Array | Factors) -> Array:
    """An array, or the one that factors stand for."""
    return node.dense() if isinstance(node, Factors) else node


def added(x: Array, z: Array, scale: ArrayLike) -> Array:
    """``x + scale · z``, added in the wider dtype and then cast to that of ``x``."""
    # Pinned, so that the sum is not contracted in one program and not in another.
    return (x.astype(z.dtype) + pin(jnp.asarray(scale, z.dtype) * z)).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerturbedParameter:
    """A parameter perturbed along a direction, ``base + scale · along``: what a model reads in the place of an array.

    Attributes:
      base: the parameter.
      along: the direction, as an array or by its factors.
      scale: how far.
    """

    base: Shaped[Array, "..."]
    along: Shaped[Array, "..."] | Factors
    scale: Float[Array, ""]

    def dense(self) -> Shaped[Array, "..."]:
        """The array itself."""
        return added(self.base, dense(self.along), self.scale)

    def _factors(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """A · scale and B."""
        assert isinstance(self.along, Factors)
        rows = pin(self.along.rows * self.scale.astype(self.along.rows.dtype))
        return rows.astype(dtype), self.along.columns.astype(dtype)


def product(
    x: Float[Array, "... R"],
    weight: Array | PerturbedParameter,
    *,
    transposed: bool = False,
    to: DTypeLike | None = None,
) -> Float[Array, "... C"]:
    """``x @ weight``, in the dtype of ``x``.

    Args:
      x: the inputs.
      weight: [R, C], and [C, R] if ``transposed``.
      transposed: multiply by the transpose.
      to: in which dtype products are summed and returned; None means that of ``x``.
    """

    def times(x: Array, matrix: Array, transposed: bool) -> Array:
        axes = ((x.ndim - 1,), (1 if transposed else 0,))
        return jax.lax.dot_general(x, matrix.astype(x.dtype), (axes, ((), ())), preferred_element_type=to)

    if isinstance(weight, PerturbedParameter) and isinstance(weight.along, Factors):
        first, second = weight._factors(x.dtype)
        if transposed:
            first, second = second, first
        # Rounded: products so thin are fused into what follows, and contracted with it in one program and not another.
        thin = rounded(times(x, first, False)).astype(x.dtype)
        return times(x, weight.base, transposed) + rounded(times(thin, second, True))
    return times(x, weight.dense() if isinstance(weight, PerturbedParameter) else weight, transposed)


def take(weight: Array | PerturbedParameter, numbers: Int[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
    """Rows of a matrix, or columns (``axis`` 1) with ``numbers`` [n], made dense: [..., C], or [R, n]."""
    if not isinstance(weight, PerturbedParameter):
        return weight[numbers] if axis == 0 else weight[:, numbers]
    base = take(weight.base, numbers, axis)
    if not isinstance(weight.along, Factors):
        return added(base, take(weight.along, numbers, axis), weight.scale)
    rows, columns = weight.along.rows, weight.along.columns
    along = outer(rows[numbers][..., None, :], columns)[..., 0, :] if axis == 0 else outer(rows, columns[numbers])
    return added(base, along, weight.scale)


def __getattr__(name: str) -> Any:
    """Names of earlier releases answer with their successors."""
    raise successor(__name__, name)
