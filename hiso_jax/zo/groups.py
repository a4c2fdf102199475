"""Groups of a cohort that measure along their own directions, all made from the same draws.

Group g of G measures along z_{k,g,p} = D_{k,g,p} z_{k,p}: a bit keyed by (perturbation key, g) flips the sign of each
block of B coordinates of direction p, and D_{k,0,p} = I. So a local step has P draws and not G·P, and
Δ_block = Σ_p z_{p,block} Σ_g D_{g,p,block} ĝ_{g,p} / (G·P). The price against independent draws is a floor:
E‖Δ‖² / ‖∇f‖² = d / (G·P) + (1 − 1/G)(B + 1) / P + 1. A low-rank matrix A Bᵀ has one bit for each row of A.

Just One Byte (arXiv 2306.10015) and FedKSeed (arXiv 2312.06353) have own directions for each client.
"""

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from hiso_jax.exact import pin
from hiso_jax.factored import Factors, is_factors
from hiso_jax.zo.delta_sum import Total, add_weighted, begin, finish
from hiso_jax.zo.directions import Directions, leaves_of
from hiso_jax.zo.signs import Signs, block_size


def _like(z: PyTree, leaves: list[Any]) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(z, is_leaf=is_factors), leaves)


def _flip(flip: Array, z: Array | Factors) -> Array | Factors:
    if isinstance(z, Factors):
        return Factors(jnp.where(flip, -z.rows, z.rows), z.columns, z.own)
    return jnp.where(flip, -z, z)


def _products(vectors: Shaped[Array, "c ..."], z: Array | Factors) -> Array:
    """v_i ⊙ z, whose sum is the inner product; of z = A Bᵀ the part of each row, Σ_r (V B)_r A_r, [c, ..., R]."""
    if not isinstance(z, Factors):
        return vectors.astype(z.dtype) * z
    rows, columns = z.rows, z.columns
    matrices = vectors.astype(z.dtype).reshape(len(vectors), *rows.shape[:-1], columns.shape[-2])
    return (jnp.matmul(matrices, columns, precision="highest") * rows).sum(-1)


class Direction(NamedTuple):
    """Direction p of a local step, for all groups of the cohort.

    Attributes:
      whole: z_{k,p}; None if every group draws independently.
      signs: the signs of its blocks; None if there is one group, or if every group draws independently.
      drawn: group g → z_{k,g,p}, if every group draws independently; else None.
    """

    whole: PyTree | None
    signs: Signs | None = None
    drawn: Callable[[ArrayLike], PyTree] | None = None

    def of(self, group: ArrayLike) -> PyTree[Shaped[Array, "..."]]:
        """The direction z_{k,g,p} of one group; low-rank leaves stay factors."""
        if self.drawn is not None:
            return self.drawn(group)
        if self.signs is None:
            return self.whole
        flips = self.signs.flipped(group)
        return _like(self.whole, [_flip(*pair) for pair in zip(flips, leaves_of(self.whole), strict=True)])

    def inner(self, vectors: PyTree[Shaped[Array, "c ..."]], groups: Int[Array, "c"]) -> Float[Array, "c"]:
        """⟨v_i, z_{k,g_i,p}⟩ of some clients' vectors; a matrix A Bᵀ is never made.

        Args:
          vectors: like the parameters, with a leading axis of clients.
          groups: g_i, the group of each client.
        """
        if self.drawn is not None:
            drawn = self.drawn

            def one(each: tuple[PyTree, Array]) -> Array:
                own, group = each
                alone = jax.tree.map(lambda v: v[None], own)
                products = map(_products, jax.tree.leaves(alone), leaves_of(drawn(group)))
                return reduce(operator.add, [part.sum() for part in products])

            return lax.map(one, (vectors, groups))
        products = list(map(_products, jax.tree.leaves(vectors), leaves_of(self.whole)))
        if self.signs is not None:
            flips = jax.vmap(self.signs.flipped)(groups)
            products = [jnp.where(flip.reshape(x.shape), -x, x) for flip, x in zip(flips, products, strict=True)]
        return reduce(operator.add, [x.reshape(len(x), -1).sum(1) for x in products])

    def add_to(self, total: Total, numbers: Float[Array, "G"], num_perturbations: int) -> tuple[Total, list]:
        """``total + Σ_g numbers_g / (G·P) · z_{k,g,p}``: one step of the sum Δ.

        Returns:
          The total, and the terms of the low-rank leaves, see ``zo/delta_sum.py``.
        """
        count = len(numbers) * num_perturbations

        def share(numbers: Array) -> Array:
            # XLA turns a division by a constant into this product; the explicit product has the same bits everywhere.
            return pin(numbers * jnp.asarray(1 / count, numbers.dtype))

        if self.drawn is not None:
            drawn = self.drawn

            def body(total: Total, term: tuple[Array, Array]) -> tuple[Total, list]:
                z = leaves_of(drawn(term[0]))
                return add_weighted(total, z, [share(term[1])] * len(z))

            return lax.scan(body, total, (jnp.arange(len(numbers)), numbers))
        z = leaves_of(self.whole)
        if self.signs is None:
            return add_weighted(total, z, [share(numbers[0])] * len(z))
        return add_weighted(total, z, [share(weight) for weight in self.signs.weighted(numbers)])


class GroupedDirections(NamedTuple):
    """The directions of a local step, for all groups of a cohort.

    Attributes:
      directions: the rule that makes the directions.
      round_key: the key of the round.
      step: local step k.
      params: the parameters; only their shapes and dtypes are read.
      curvature: H, or None for H = 1.
      groups: G.
      num_perturbations: P.
    """

    directions: Directions
    round_key: Key[Array, ""]
    step: ArrayLike
    params: PyTree
    curvature: PyTree | None
    groups: int
    num_perturbations: int

    def at(self, index: ArrayLike) -> Direction:
        """Direction p."""
        if self.groups > 1 and self.directions.block == 0:
            return Direction(None, drawn=lambda group: self._made(group * self.num_perturbations + index))
        return self.again(self._made(index), index)

    def again(self, whole: PyTree, index: ArrayLike) -> Direction:
        """Direction p, from an existing z_{k,p}."""
        if self.groups == 1:
            return Direction(whole)
        block = self.directions.block or block_size(self.params, self.groups)
        key = self.directions.key(self.round_key, self.step, index)
        return Direction(whole, Signs(key, whole, self.groups, block))

    def inner(self, vectors: PyTree[Shaped[Array, "c ..."]], groups: Int[Array, "c"]) -> Float[Array, "c P"]:
        """⟨v_i, z_{k,g_i,p}⟩ for all p, one direction at a time; see :meth:`Direction.inner`."""
        indices = jnp.arange(self.num_perturbations)
        return lax.map(lambda index: self.at(index).inner(vectors, groups), indices).T

    def begin(self) -> Total:
        """The empty sum."""
        return begin(self.params, jax.eval_shape(lambda: self.at(0).of(0)))

    def finish(self, total: Total, terms: list) -> PyTree[Shaped[Array, "..."]]:
        """Δ, from a total and the terms [P, ...] that :meth:`Direction.add_to` returned with it."""
        return finish(self.params, total, terms)

    def of(self, index: Any) -> PyTree[Shaped[Array, "..."]]:
        """The direction z_{k,g,p} at index q = g·P + p, in the order of a step's scalars."""
        return self.at(index % self.num_perturbations).of(index // self.num_perturbations)

    def _made(self, index: ArrayLike) -> PyTree:
        return self.directions.at(self.round_key, self.step, index, self.params, self.curvature)
