"""Directions that are rows of a randomised Hadamard matrix: signs, orthogonal to each other, with fast inner products.

A leaf is padded to blocks of n coordinates, n a power of two. Direction p is z_p = D ⊙ H[row_p] in every block, where D
are random signs of the leaf's coordinates and row_p a row of the n×n Hadamard matrix H, the same in all blocks. So
E[z zᵀ] = I, and the inner products of a vector v with all directions need one pass over v and one transform of n
numbers: ⟨v, z_p⟩ = Σ_b H[row_p] · (D_b ⊙ v_b) = (H Σ_b D_b ⊙ v_b)[row_p]. The sum Δ = Σ_p c_p z_p is the transpose:
Δ_b = D_b ⊙ (Hᵀ c) (Ailon and Chazelle, STOC 2006; Woodruff, arXiv 1411.4357, section 2.1).

Directions of one D are exactly orthogonal only without padding, because ⟨z_p, z_q⟩ counts the coordinates of the leaf.
After n directions of a leaf a new D begins. Every round, step, group and leaf has its own D and rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree, UInt32

from hiso_jax.checks import ParameterError
from hiso_jax.exact import pin
from hiso_jax.factored import dense
from hiso_jax.stacked import is_stacked
from hiso_jax.zo.directions import Directions, draw_leaves, leaves_of, shaped, working_dtype
from hiso_jax.zo.groups import Direction, GroupedDirections
from hiso_jax.zo.partitioned import is_partitioned, split_as
from hiso_jax.zo.samplers import Hadamard, random_words
from hiso_jax.zo.threefry import fold_in

# Indices of directions are below 2³¹, so no direction has this key.
STREAM = 0x4ADA0001 | 1 << 31
WORD = 32
# Bit j of mask b is bit b of j.
MASKS = (0xAAAAAAAA, 0xCCCCCCCC, 0xF0F0F0F0, 0xFF00FF00, 0xFFFF0000)
# Words of the rule that chooses rows.
RULE = 4


def transform(x: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """H x along the last axis, n a power of two; single additions, so the same bits in every program.

    Each turn adds and subtracts neighbours and moves the results apart; after log₂ n turns every bit of the index is
    back in its place.
    """
    size = x.shape[-1]

    def turn(_: Any, x: Array) -> Array:
        pairs = x.reshape(*x.shape[:-1], size // 2, 2)
        return jnp.concatenate([pairs[..., 0] + pairs[..., 1], pairs[..., 0] - pairs[..., 1]], -1)

    return lax.fori_loop(0, size.bit_length() - 1, turn, x)


def _signed(words: UInt32[Array, "W"], values: Float[Array, "s"]) -> Float[Array, "s"]:
    """``values`` with the signs in the bits of ``words``."""
    place, (full, rest) = jnp.arange(WORD, dtype=jnp.uint32), divmod(len(values), WORD)
    bits = ((words[:full, None] >> place[None]) & 1).reshape(-1)
    if rest:
        # Not a slice of all words' bits, see ``zo.samplers.rademacher``.
        bits = jnp.concatenate([bits, (words[full] >> place[:rest]) & 1])
    return jnp.where(bits.astype(bool), -values, values)


@dataclass(frozen=True)
class _Leaf:
    """The layout of a leaf, or of one layer of a leaf of stacked layers.

    Attributes:
      size: its coordinates.
      length: n, the coordinates of a block.
      turns: the number of D; a new one begins after n directions.
      layered: whether the leaf has a leading axis of layers.
      dtype: of its directions.
    """

    size: int
    length: int
    turns: int
    layered: bool
    dtype: Any

    @classmethod
    def of(
        cls, like: Array | jax.ShapeDtypeStruct, block: int, num_perturbations: int, *, layered: bool = False
    ) -> "_Leaf":
        """The layout of a leaf like ``like``."""
        size = math.prod(like.shape[1:] if layered else like.shape)
        length = min(block, max(WORD, 1 << max(size - 1, 0).bit_length()))
        return cls(size, length, -(-num_perturbations // length), layered, working_dtype(like))

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.size // self.length)

    @property
    def words(self) -> int:
        """The number of words of one D."""
        return self.blocks * self.length // WORD

    def each(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """``function``, for every layer if there are several."""
        return jax.vmap(function) if self.layered else function

    def flat(self, x: Array) -> Array:
        """The leaf as one axis, after that of the layers."""
        return x.reshape(len(x), -1) if self.layered else x.reshape(-1)

    def split(self, drawn: UInt32[Array, "V"]) -> tuple[UInt32[Array, "T W"], UInt32[Array, "4"]]:
        """The signs of every D, and the rule of the rows."""
        return drawn[RULE:].reshape(self.turns, self.words), drawn[:RULE]

    def row(self, rule: UInt32[Array, "4"], index: Any) -> Any:
        """The row of direction ``index``: two rounds of a bijection of the numbers below ``length``, without a sort."""
        last = jnp.uint32(self.length - 1)
        half = (self.length.bit_length() - 1 + 1) // 2
        row = jnp.asarray(index, jnp.uint32) & last
        for multiplier, offset in (rule[:2], rule[2:]):
            row = (row * (multiplier | 1) + offset) & last
            row = row ^ (row >> half)
        return row

    def direction(self, drawn: UInt32[Array, "V"], index: ArrayLike) -> Float[Array, "s"]:
        """The coordinates of one direction."""
        signs, rule = self.split(drawn)
        row, own = self.row(rule, index), signs[jnp.asarray(index) // self.length]
        low = reduce(jnp.bitwise_xor, [((row >> bit) & 1) * jnp.uint32(mask) for bit, mask in enumerate(MASKS)])
        # The parity of the bits of the row and the coordinate's place in its block, for 32 coordinates at once.
        places = jnp.arange(self.words, dtype=jnp.uint32) & jnp.uint32(self.length // WORD - 1)
        high = lax.population_count((row >> 5) & places) & 1
        return _signed(own ^ low ^ (jnp.uint32(0) - high), jnp.ones(self.size, self.dtype))

    def inner(self, drawn: UInt32[Array, "V"], vector: Float[Array, "s"], count: int) -> Float[Array, "P"]:
        """⟨v, z_p⟩ for p < ``count``."""
        signs, rule = self.split(drawn)

        def folded(own: UInt32[Array, "W"]) -> Float[Array, "n"]:
            padded = jnp.pad(_signed(own, vector), (0, self.blocks * self.length - self.size))
            return padded.reshape(self.blocks, self.length).sum(0)

        index = jnp.arange(count)
        products = transform(jax.vmap(folded)(signs))
        return products[index // self.length, self.row(rule, index)]

    def total(self, drawn: UInt32[Array, "V"], scalars: Float[Array, "P"]) -> Float[Array, "s"]:
        """Σ_p c_p z_p."""
        signs, rule = self.split(drawn)
        index, weights = jnp.arange(len(scalars)), scalars.astype(self.dtype)
        spread = jnp.zeros((self.turns, self.length), self.dtype)
        spread = spread.at[index // self.length, self.row(rule, index)].set(weights, unique_indices=True)

        def signed(own: UInt32[Array, "W"], values: Float[Array, "n"]) -> Float[Array, "s"]:
            each = jnp.broadcast_to(values, (self.blocks, self.length)).reshape(-1)
            return _signed(own, each[: self.size])

        sums = transform(spread)
        if self.turns == 1:
            return signed(signs[0], sums[0])

        def body(total: Array, term: tuple[Array, Array]) -> tuple[Array, None]:
            return pin(total + signed(*term)), None

        return lax.scan(body, jnp.zeros(self.size, self.dtype), (signs, sums))[0]


class HadamardDirections:
    """The directions of a local step for all groups of a cohort, with the methods of :class:`GroupedDirections`.

    The signs are drawn here, once for all directions: d bits for each group.
    """

    def __init__(
        self,
        directions: Directions,
        round_key: Key[Array, ""],
        step: ArrayLike,
        params: PyTree,
        curvature: PyTree | None,
        groups: int,
        num_perturbations: int,
        first: ArrayLike = 0,
    ) -> None:
        """Draw D and the rule of the rows for every leaf and for ``groups`` groups, from group ``first`` on."""
        assert isinstance(directions.sampler, Hadamard)
        if is_partitioned():
            raise ParameterError(
                "sampler", "must not be hadamard where model splits the parameters: a block is on one device"
            )
        self.params, self.curvature, self.groups, self.count = params, curvature, groups, num_perturbations
        block, self.leaves = directions.sampler.block, []
        for node in jax.tree.leaves(params, is_leaf=is_stacked):
            layered = is_stacked(node)
            for leaf in jax.tree.leaves(node):
                self.leaves.append(_Leaf.of(leaf, block, num_perturbations, layered=layered))
        key = directions.key(round_key, step, jnp.uint32(STREAM))

        def draw(leaf_key: Any, shape: Sequence[int], like: Array) -> UInt32[Array, "V"]:
            leaf = _Leaf.of(jax.ShapeDtypeStruct(shape, like.dtype), block, num_perturbations)
            return random_words(leaf_key, (RULE + leaf.turns * leaf.words,))

        self.drawn: list[UInt32[Array, "G ..."]] = lax.map(
            lambda group: draw_leaves(fold_in(key, group), params, draw), first + jnp.arange(groups)
        )

    def at(self, index: ArrayLike) -> Direction:
        """Direction p."""
        if self.groups == 1:
            return Direction(self._made(0, index))
        return Direction(None, drawn=lambda group: self._made(group, index))

    def of(self, index: Any) -> PyTree:
        """The direction z_{k,g,p} at index q = g·P + p, in the order of a step's scalars."""
        return self._made(index // self.count, index % self.count)

    def inner(self, vectors: PyTree[Float[Array, "c ..."]], groups: Int[Array, "c"]) -> Float[Array, "c P"]:
        """⟨v_i, z_{k,g_i,p}⟩ for all p: one pass over each vector, and a transform of each leaf."""
        curvature = [None] * len(self.leaves) if self.curvature is None else leaves_of(self.curvature)

        def one(vector: list[Array], group: Array) -> Float[Array, "P"]:
            parts = []
            for leaf, drawn, v, h in zip(self.leaves, self.drawn, vector, curvature, strict=True):
                own = dense(v if h is None else shaped(v, h)).astype(leaf.dtype)
                products = leaf.each(partial(leaf.inner, count=self.count))(drawn[group], leaf.flat(own))
                parts.append(products.sum(0) if leaf.layered else products)
            return reduce(add, parts)

        return jax.vmap(one)(jax.tree.leaves(vectors), groups)

    def delta(self, scalars: Float[Array, "P G"]) -> PyTree:
        """Δ = Σ_p Σ_g ĝ_{g,p} / (G·P) · z_{g,p}: a transform of each leaf and one pass over it, for each group."""
        # A product, as in ``Direction.add_to``: XLA turns a division by a constant into it in some programs.
        weights = pin(scalars.T * jnp.asarray(1 / scalars.size, scalars.dtype))

        def body(sums: list[Array], term: tuple[list[Array], Array]) -> tuple[list[Array], None]:
            drawn, own = term
            for place, leaf in enumerate(self.leaves):
                total = leaf.each(partial(leaf.total, scalars=own))(drawn[place])
                sums[place] = pin(sums[place] + total.reshape(sums[place].shape))
            return sums, None

        begin = [jnp.zeros(x.shape, working_dtype(x)) for x in jax.tree.leaves(self.params)]
        return self._shaped(lax.scan(body, begin, (self.drawn, weights))[0], self.curvature)

    def _made(self, group: ArrayLike, index: ArrayLike) -> PyTree:
        # Tied to the index, as in ``zo.directions``: XLA would compute every square root before the loop and keep it.
        curvature, index = lax.optimization_barrier((self.curvature, jnp.asarray(index)))
        found = [
            leaf.each(partial(leaf.direction, index=index))(drawn[group])
            for leaf, drawn in zip(self.leaves, self.drawn, strict=True)
        ]
        leaves = [u.reshape(x.shape) for u, x in zip(found, jax.tree.leaves(self.params), strict=True)]
        return self._shaped(leaves, curvature)

    def _shaped(self, leaves: list[Array], curvature: PyTree | None) -> PyTree:
        """The leaves, shaped by the curvature, in the structure of the parameters."""
        if curvature is not None:
            leaves = [dense(shaped(u, h)) for u, h in zip(leaves, leaves_of(curvature), strict=True)]
        placed = [split_as(x, u) for x, u in zip(jax.tree.leaves(self.params), leaves, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(self.params), placed)


def check_regenerated(directions: Directions, mode: str | None) -> None:
    """Refuse to keep Hadamard directions.

    Raises:
      ParameterError: the directions are Hadamard's and ``mode`` is "keep".
    """
    if isinstance(directions.sampler, Hadamard) and mode == "keep":
        raise ParameterError("directions", "must be regenerate with the sampler hadamard, got keep")


def grouped_directions(
    directions: Directions,
    round_key: Key[Array, ""],
    step: ArrayLike,
    params: PyTree,
    curvature: PyTree | None,
    groups: int,
    num_perturbations: int,
) -> GroupedDirections | HadamardDirections:
    """The directions of a local step, see :class:`GroupedDirections` for the arguments."""
    kind = HadamardDirections if isinstance(directions.sampler, Hadamard) else GroupedDirections
    return kind(directions, round_key, step, params, curvature, groups, num_perturbations)
