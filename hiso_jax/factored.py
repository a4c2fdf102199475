"""Matrices in factored form: a product of two thin factors, and a weight plus such a product.

A direction of low rank u = A Bᵀ is as cheap to evaluate as to draw if the model multiplies by it in two thin steps,
x (W + s u) = x W + s (x A) Bᵀ. No perturbed copy of W exists, and all evaluations along different directions share
the product with W (EGGROLL, arXiv 2511.16652). Models and the zeroth-order code share this form.
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
"""A parameter's dotted name → how the model reads the parameter perturbed along a direction: by :func:`product` and
:func:`take` (a matrix), by :func:`take` of rows (a table of embeddings), or as a dense array (None)."""


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Factors:
    """A matrix A Bᵀ, or a stack of such matrices, in place of an array of ``shape``.

    Attributes:
      rows: A, [..., R, r]; R comprises all axes of the array but the last.
      columns: B, [..., C, r].
      own: the shape of the array without the axis of stacked layers.
    """

    rows: Float[Array, "... R r"]
    columns: Float[Array, "... C r"]
    own: tuple[int, ...]

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[int, ...]]:
        """The factors, with keys that distinguish them in a saved state."""
        key = jax.tree_util.DictKey
        return ((key("rows"), self.rows), (key("columns"), self.columns)), self.own

    @classmethod
    def tree_unflatten(cls, own: tuple[int, ...], children: tuple[Any, Any]) -> "Factors":
        """The inverse of :meth:`tree_flatten_with_keys`."""
        return cls(*children, own)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return (*self.rows.shape[:-2], *self.own)

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.rows.dtype

    def dense(self) -> Shaped[Array, "..."]:
        """The dense array, summed term by term, so that every program has the same bits."""
        return outer(self.rows, self.columns).reshape(self.shape)


def outer(rows: Float[Array, "... R r"], columns: Float[Array, "... C r"]) -> Float[Array, "... R C"]:
    """A Bᵀ, summed term by term: a matrix product would be rounded to fewer bits on accelerators."""
    terms = zip(jnp.unstack(rows, axis=-1), jnp.unstack(columns, axis=-1), strict=True)
    return reduce(add, [term_of(a, b) for a, b in terms])


def term_of(row: Float[Array, "... R"], column: Float[Array, "... C"]) -> Float[Array, "... R C"]:
    """The outer product a bᵀ, each product rounded: else programs could contract different products of a sum."""
    return rounded(row[..., :, None] * column[..., None, :])


def is_factors(node: Any) -> bool:
    """Whether ``node`` is a matrix in factored form."""
    return isinstance(node, Factors)


def dense(node: Array | Factors) -> Array:
    """The dense array of an array or of factors."""
    return node.dense() if isinstance(node, Factors) else node


def added(x: Array, z: Array, scale: ArrayLike) -> Array:
    """``x + scale · z``, added in the wider dtype and then cast to that of ``x``."""
    # Pinned, because otherwise only some programs would contract the sum.
    return (x.astype(z.dtype) + pin(jnp.asarray(scale, z.dtype) * z)).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerturbedParameter:
    """A parameter perturbed along a direction, ``base + scale · along``; a model reads it in place of an array.

    Attributes:
      base: the parameter.
      along: the direction, as an array or as factors.
      scale: how far the parameter goes along the direction.
    """

    base: Shaped[Array, "..."]
    along: Shaped[Array, "..."] | Factors
    scale: Float[Array, ""]

    def dense(self) -> Shaped[Array, "..."]:
        """The dense array."""
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
      weight: [R, C], or [C, R] if ``transposed``.
      transposed: multiply by the transpose.
      to: the dtype in which products are summed and returned; None means that of ``x``.
    """

    def times(x: Array, matrix: Array, transposed: bool) -> Array:
        axes = ((x.ndim - 1,), (1 if transposed else 0,))
        return jax.lax.dot_general(x, matrix.astype(x.dtype), (axes, ((), ())), preferred_element_type=to)

    if isinstance(weight, PerturbedParameter) and isinstance(weight.along, Factors):
        first, second = weight._factors(x.dtype)
        if transposed:
            first, second = second, first
        # Rounded: only some programs would fuse and contract these thin products with the operations that follow.
        thin = rounded(times(x, first, False)).astype(x.dtype)
        return times(x, weight.base, transposed) + rounded(times(thin, second, True))
    return times(x, weight.dense() if isinstance(weight, PerturbedParameter) else weight, transposed)


def take(weight: Array | PerturbedParameter, numbers: Int[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
    """The rows ``numbers`` of a matrix, [..., C], or its columns (``axis`` 1) ``numbers`` [n], [R, n], dense."""
    if not isinstance(weight, PerturbedParameter):
        return weight[numbers] if axis == 0 else weight[:, numbers]
    base = take(weight.base, numbers, axis)
    if not isinstance(weight.along, Factors):
        return added(base, take(weight.along, numbers, axis), weight.scale)
    rows, columns = weight.along.rows, weight.along.columns
    along = outer(rows[numbers][..., None, :], columns)[..., 0, :] if axis == 0 else outer(rows, columns[numbers])
    return added(base, along, weight.scale)


def __getattr__(name: str) -> Any:
    """The error for a name of an earlier release names its successor."""
    raise successor(__name__, name)
