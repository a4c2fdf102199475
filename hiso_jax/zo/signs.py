"""The signs that distinguish the directions of a cohort's groups (see ``zo/groups.py``).

A dense leaf has one sign for each block of B coordinates in row-major order. A low-rank leaf A Bᵀ has one sign for each
row of A, so that it keeps its rank.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key, PyTree, UInt32

from hiso_jax.exact import pin
from hiso_jax.factored import Factors
from hiso_jax.zo.directions import draw_leaves, leaves_of
from hiso_jax.zo.partitioned import is_partitioned
from hiso_jax.zo.samplers import random_words
from hiso_jax.zo.threefry import fold_in

# Leaf indices are below 2³¹, so no leaf's draw has this key.
SIGN_STREAM = 0xB10C0001
LARGEST_BLOCK = 64
WORD = 32


def block_size(params: PyTree, groups: int) -> int:
    """The default B: the largest power of two ≤ min(64, d / (8·G)), and at least 1.

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
    """``of_blocks(block indices)``, each value repeated for its ``block`` coordinates in row-major order."""
    size = math.prod(shape)
    if is_partitioned():
        # Element by element, so that every device makes its own part without repeats or transfers.
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        places = [lax.broadcasted_iota(jnp.uint32, shape, axis) * stride for axis, stride in enumerate(strides)]
        return of_blocks(sum(places, jnp.zeros(shape, jnp.uint32)) // block)
    each = of_blocks(jnp.arange(-(-size // block), dtype=jnp.uint32))
    return jnp.broadcast_to(each[:, None], (len(each), block)).reshape(-1)[:size].reshape(shape)


class Signs(NamedTuple):
    """The signs of one direction.

    The methods return one array for each leaf of z: [...] as the leaf, or [..., R, 1] for a factor A of R rows.

    Attributes:
      key: the perturbation key of the direction.
      z: the direction; only its shapes are read.
      groups: G.
      block: B.
    """

    key: Key[Array, ""]
    z: PyTree
    groups: int
    block: int

    def _draw(self, word: ArrayLike, of_words: Callable[[UInt32[Array, "n"]], Array]) -> list[Array]:
        """``of_words`` of the signs of 32 groups, one bit for each group.

        Args:
          word: the index of the 32 groups.
          of_words: an elementwise function.
        """
        key = fold_in(fold_in(self.key, jnp.uint32(SIGN_STREAM)), word)

        def leaf(leaf_key: Any, shape: Sequence[int], like: Array | Factors) -> Array:
            seeds = random_words(leaf_key, (2,))
            rows, block = ((math.prod(shape[:-1]), 1), 1) if isinstance(like, Factors) else (shape, self.block)
            return _spread(lambda numbers: of_words(_hashed(numbers, seeds)), rows, block)

        return draw_leaves(key, self.z, leaf)

    def flipped(self, group: ArrayLike) -> list[Bool[Array, "..."]]:
        """Masks of the coordinates where D_g is −1; all false for group 0."""
        group = jnp.asarray(group, jnp.uint32)

        def bits_of(word: ArrayLike) -> list[Array]:
            return self._draw(word, lambda words: ((words >> (group % WORD)) & 1).astype(bool))

        if self.groups <= WORD:
            bits = bits_of(0)
        elif str(jax.random.key_impl(self.key)) == "threefry2x32":
            bits = bits_of(group // WORD)
        else:
            # Under a vmap over groups, keys of other generators must not depend on the group: they would draw others.
            def body(bits: list[Array], word: Array) -> tuple[list[Array], None]:
                own = word == group // WORD
                return [jnp.where(own, new, old) for new, old in zip(bits_of(word), bits, strict=True)], None

            zeros = jax.tree.map(jnp.zeros_like, bits_of(0))
            bits, _ = lax.scan(body, zeros, jnp.arange(-(-self.groups // WORD), dtype=jnp.uint32))
        return [bit & (group > 0) for bit in bits]

    def weighted(self, numbers: Float[Array, "G"]) -> list[Float[Array, "..."]]:
        """Σ_g D_g numbers_g."""

        def add_word(word: ArrayLike, own: Float[Array, "G"], count: int) -> list[Array]:
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
        shapes = [(*z.rows.shape[:-1], 1) if isinstance(z, Factors) else z.shape for z in leaves_of(self.z)]

        def body(total: list[Array], term: tuple[Array, Array]) -> tuple[list[Array], None]:
            return [pin(a + b) for a, b in zip(total, add_word(*term, WORD), strict=True)], None

        return lax.scan(body, [jnp.zeros(shape, numbers.dtype) for shape in shapes], (jnp.arange(words), padded))[0]
