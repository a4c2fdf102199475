"""The cohort of a round: the first C values of a keyed Feistel permutation of [0, N) with cycle walking.

Exact (a permutation has no repeats), O(C) in time and memory, and jit-able; ``jax.random.choice`` without
replacement permutes the entire population. Format-preserving encryption by Feistel networks and cycle walking:
Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key, UInt32

from hiso_jax.checks import ParameterError

# Small domains need many rounds: over all orders of 5 values, 12 rounds are visibly uneven, 18 barely, 24 not.
FEISTEL_ROUNDS = 24


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's 32-bit finaliser: every input bit affects every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def permute(key: Key[Array, ""], index: Int[Array, "..."], size: int) -> Int[Array, "..."]:
    """The images of ``index`` under a keyed permutation of [0, size).

    Args:
      key: the key that selects the permutation.
      index: integers in [0, size).
      size: 1 ≤ size < 2³¹, static.

    Raises:
      ValueError: ``size`` is out of range.
    """
    if not 1 <= size < 2**31:
        raise ValueError(f"a permuted domain must hold between 1 and 2³¹ − 1 values, got {size}")
    bits = (size - 1).bit_length()
    low_bits = bits - bits // 2
    low_mask, high_mask = jnp.uint32((1 << low_bits) - 1), jnp.uint32((1 << (bits // 2)) - 1)
    round_words = jax.random.bits(key, (FEISTEL_ROUNDS // 2, 2, 2), jnp.uint32)

    def two_rounds(halves: tuple[Array, Array], words: UInt32[Array, "2 2"]) -> tuple[tuple[Array, Array], None]:
        high, low = halves
        low ^= _mix(_mix(high ^ words[0, 0]) ^ words[0, 1]) & low_mask
        high ^= _mix(_mix(low ^ words[1, 0]) ^ words[1, 1]) & high_mask
        return (high, low), None

    def encrypt(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
        (high, low), _ = lax.scan(two_rounds, (x >> low_bits, x & low_mask), round_words)
        return (high << low_bits) | low

    # The network permutes [0, next power of two); a value that lands outside [0, size) is permuted again until it is
    # inside. All values start as outside, so the program contains the network once: it takes longer to compile than
    # to run.
    def walk(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, outside = carry
        x = jnp.where(outside, encrypt(x), x)
        return x, x >= size

    start = index.astype(jnp.uint32)
    inside, _ = lax.while_loop(lambda carry: carry[1].any(), walk, (start, jnp.ones(start.shape, bool)))
    return inside.astype(jnp.int32)


def sample_cohort(key: Key[Array, ""], population: int, cohort: int) -> Int[Array, "C"]:
    """The clients of a round: ``cohort`` distinct integers of [0, population), uniformly.

    Args:
      key: the cohort key of the round.
      population: N, static.
      cohort: C, static, 1 ≤ C ≤ N.

    Raises:
      ValueError: the cohort is empty or larger than the population.
    """
    if not 1 <= cohort <= population:
        raise ParameterError("cohort", f"must be between 1 and the population of {population} clients, got {cohort}")
    return permute(key, jnp.arange(cohort), population)
