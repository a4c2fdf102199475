"""Groups of a cohort that measure along directions of their own, all made from the same draws.

Group g of G measures along z_{k,g,p} = D_{k,g,p} z_{k,p}: the round's direction p, the sign of each block of B
coordinates flipped by a bit that is keyed by (perturbation key, g); D_{k,0,p} = I. So a round has P draws and not
G·P, and Δ_block = Σ_p z_{p,block} Σ_g D_{g,p,block} ĝ_{g,p} / (G·P). The price against independent draws is a floor:
E‖Δ‖² / ‖∇f‖² = d / (G·P) + (1 − 1/G)(B + 1) / P + 1.

Own directions for clients: Just One Byte (arXiv 2306.10015), FedKSeed (arXiv 2312.06353).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key, PyTree, Shaped, UInt32

from hiso_jax.zo.directions import Directions, draw_leaves, random_words
from hiso_jax.zo.partitioned import is_partitioned
from hiso_jax.zo.walls import pin

# Leaves are below 2³¹, so that no leaf's draw has this key.
SIGN_STREAM = 0xB10C0001
LARGEST_BLOCK = 64
WORD = 32


def block_size(params: PyTree, groups: int) -> int:
    """B where none is asked for: the largest power of two ≤ min(64, d / (8·G)), and at least 1.

    Args:
      params: the trained parameters, d of them; only shapes are read.
      groups: G.
    """
    share = sum(leaf.size for leaf in jax.tree.leaves(params)) // (8 * groups)
    return min(LARGEST_BLOCK, 1 << max(share.bit_length() - 1, 0))


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words in which every input bit changes every output bit with probability near one half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def _hashed(counter: UInt32[Array, "..."], words: UInt32[Array, "2"]) -> UInt32[Array, "..."]:
    return _mixed(_mixed(counter ^ words[0]) + words[1])


def _spread(of_blocks: Callable[[Array], Array], shape: Sequence[int], block: int) -> Array:
    """``of_blocks(block numbers)``, each repeated for its ``block`` coordinates in row-major order, in ``shape``."""
    size = math.prod(shape)
    if is_partitioned():
        # Element by element, so that every device makes its own part; nothing is repeated or moved.
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        places = [lax.broadcasted_iota(jnp.uint32, shape, axis) * stride for axis, stride in enumerate(strides)]
        return of_blocks(sum(places, jnp.zeros(shape, jnp.uint32)) // block)
    each = of_blocks(jnp.arange(-(-size // block), dtype=jnp.uint32))
    return jnp.broadcast_to(each[:, None], (len(each), block)).reshape(-1)[:size].reshape(shape)


class Signs(NamedTuple):
    """The signs of blocks of one direction.

    Attributes:
      key: the perturbation key of the direction.
      params: of which only shapes are read.
      groups: G.
      block: B.
    """

    key: Key[Array, ""]
    params: PyTree[Shaped[Array, "..."]]
    groups: int
    block: int

    def _draw(self, word: ArrayLike, of_words: Callable[[UInt32[Array, "n"]], Array]) -> PyTree:
        """``of_words`` of 32 groups' signs, a bit each, of every block, in the structure and shapes of the parameters.

        Args:
          word: which 32 groups.
          of_words: elementwise.
        """
        key = jax.random.fold_in(jax.random.fold_in(self.key, jnp.uint32(SIGN_STREAM)), word)

        def leaf(leaf_key: Any, shape: Sequence[int], like: Array) -> Array:
            seeds = random_words(leaf_key, (2,))
            return _spread(lambda numbers: of_words(_hashed(numbers, seeds)), shape, self.block)

        return jax.tree.unflatten(jax.tree.structure(self.params), draw_leaves(key, self.params, leaf))

    def flipped(self, group: ArrayLike) -> PyTree[Bool[Array, "..."]]:
        """Where D_g is −1; nowhere for group 0."""
        group = jnp.asarray(group, jnp.uint32)
        bits = self._draw(group // WORD, lambda words: ((words >> (group % WORD)) & 1).astype(bool))
        return jax.tree.map(lambda bit: bit & (group > 0), bits)

    def weighted(self, numbers: Float[Array, "G"]) -> PyTree[Float[Array, "..."]]:
        """Σ_g D_g numbers_g, in the structure and shapes of the parameters."""

        def add_word(word: ArrayLike, own: Float[Array, "G"], count: int) -> PyTree:
            def of_words(words: UInt32[Array, "n"]) -> Float[Array, "n"]:
                total = jnp.zeros(words.shape, own.dtype)
                for place in range(count):
                    flip = ((words >> place) & 1).astype(bool)
                    if place == 0:
                        flip &= jnp.asarray(word) > 0
                    total = pin(total + jnp.where(flip, -own[place], own[place]))
                return total

            return self._draw(word, of_words)

        if self.groups <= WORD:
            return add_word(0, numbers, self.groups)
        words = -(-self.groups // WORD)
        padded = jnp.pad(numbers, (0, words * WORD - self.groups)).reshape(words, WORD)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, numbers.dtype), self.params)

        def body(total: PyTree, term: tuple[Array, Array]) -> tuple[PyTree, None]:
            return jax.tree.map(lambda a, b: pin(a + b), total, add_word(*term, WORD)), None

        return lax.scan(body, zero, (jnp.arange(words), padded))[0]


class Direction(NamedTuple):
    """Direction p of a local step, as every group of the cohort has it.

    Attributes:
      whole: z_{k,p}; None where every group draws for itself.
      signs: of its blocks; None where there is one group, or every group draws for itself.
      drawn: group g → z_{k,g,p}, where every group draws for itself.
    """

    whole: PyTree | None
    signs: Signs | None = None
    drawn: Callable[[ArrayLike], PyTree] | None = None

    def of(self, group: ArrayLike) -> PyTree[Shaped[Array, "..."]]:
        """z_{k,g,p} itself."""
        if self.drawn is not None:
            return self.drawn(group)
        if self.signs is None:
            return self.whole
        return jax.tree.map(lambda flip, z: jnp.where(flip, -z, z), self.signs.flipped(group), self.whole)

    def add_to(self, total: PyTree, numbers: Float[Array, "G"], num_perturbations: int) -> PyTree:
        """``total + Σ_g numbers_g / (G·P) · z_{k,g,p}``: the step of which every Δ is made."""
        count = len(numbers) * num_perturbations
        if self.drawn is not None:
            drawn = self.drawn

            def body(total: PyTree, term: tuple[Array, Array]) -> tuple[PyTree, None]:
                group, number = term
                return add_direction(total, drawn(group), number, count), None

            return lax.scan(body, total, (jnp.arange(len(numbers)), numbers))[0]
        if self.signs is None:
            return add_direction(total, self.whole, numbers[0], count)
        weights = self.signs.weighted(numbers)

        def add(a: Array, u: Array, weight: Array) -> Array:
            weight = pin(weight * jnp.asarray(1 / count, weight.dtype))
            return pin(a + pin(weight.astype(u.dtype) * u))

        return jax.tree.map(add, total, self.whole, weights)


def add_direction(
    total: PyTree[Shaped[Array, "..."]],
    z: PyTree[Shaped[Array, "..."]],
    scalar: Float[Array, ""],
    num_perturbations: int,
) -> PyTree[Shaped[Array, "..."]]:
    """``total + scalar / P · z``, by the arithmetic of every Δ, whether z is at hand or made again."""
    # XLA turns a division by a constant into this product; written so, every backend has the same bits.
    weight = pin(scalar * jnp.asarray(1 / num_perturbations, scalar.dtype))
    return jax.tree.map(lambda a, u: pin(a + pin(weight.astype(u.dtype) * u)), total, z)


class Deal(NamedTuple):
    """A local step's directions, dealt to the groups of a cohort.

    Attributes:
      directions: which there are.
      round_key: of the round.
      step: local step k.
      params: of which only shapes and dtypes are read.
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
        """Direction p, of which z_{k,p} is at hand."""
        if self.groups == 1:
            return Direction(whole)
        block = self.directions.block or block_size(self.params, self.groups)
        key = self.directions.key(self.round_key, self.step, index)
        return Direction(whole, Signs(key, self.params, self.groups, block))

    def of(self, index: Any) -> PyTree[Shaped[Array, "..."]]:
        """Z of number q = g·P + p, the order of the scalars of a step."""
        return self.at(index % self.num_perturbations).of(index // self.num_perturbations)

    def _made(self, index: ArrayLike) -> PyTree:
        return self.directions.at(self.round_key, self.step, index, self.params, self.curvature)
