"""Families of raw perturbations u with E[u uᵀ] = I, made leaf by leaf from the leaf's key."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, UInt32

from hiso_jax.checks import ParameterError, between, function, integer
from hiso_jax.exact import pin
from hiso_jax.factored import Factors
from hiso_jax.zo.partitioned import is_partitioned
from hiso_jax.zo.threefry import drawn, fold_in

# No index of a leaf is so large, and neither a leaf nor the signs of groups have this key.
BLOCK_STREAM = 0xB10C0002
# Integer weights of blocks are at most 2¹⁶.
UNIT_BITS = 16

Sampler = Callable[[Any, Sequence[int], Any], Array]
"""A family of raw perturbations: (leaf key, shape, dtype) → u with E[u uᵀ] = I."""


def _normal(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """``jax.random.normal`` with the same bits, in the layout that suits the program."""

    def draw(own: Any, own_shape: Sequence[int]) -> Array:
        return jax.random.normal(own, own_shape, dtype)

    # A flat draw cannot be sharded along an axis of ``shape``; under a partitioner each device must make its own part.
    return draw(key, shape) if is_partitioned() else drawn(draw, key, shape)


def _words(key: Any, shape: Sequence[int]) -> UInt32[Array, "..."]:
    return jax.random.bits(key, shape, jnp.uint32)


def random_words(key: Key[Array, ""], shape: Sequence[int]) -> UInt32[Array, "..."]:
    """``jax.random.bits`` with the same 32-bit words, in the layout that suits the program."""
    return _words(key, shape) if is_partitioned() else drawn(_words, key, shape)


def gaussian(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Standard normal perturbations, the family of MeZO, DeComFL and HiSo."""
    return _normal(key, shape, dtype)


def rademacher(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Random signs ±1 (SPSA, Spall 1992), made of integers and so the same on every backend.

    Each random word gives 32 signs; ``jax.random.rademacher`` uses one word for each sign.
    """
    size = math.prod(shape)
    words, place = drawn(_words, key, (-(-size // 32),)), jnp.arange(32, dtype=jnp.uint32)
    full, rest = divmod(size, 32)
    bits = ((words[:full, None] >> place[None]) & 1).reshape(-1)
    if rest:
        # Not a slice of all words' bits: beside a pooled convolution XLA never finished compiling it (jax 0.10.2, CPU).
        bits = jnp.concatenate([bits, (words[full] >> place[:rest]) & 1])
    return (1 - 2 * bits.astype(jnp.int8)).reshape(shape).astype(dtype)


def binomial(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Binomial draws of 16 fair coins, with mean 0 and variance 1: nearly normal, in steps of one half up to ±4.

    Each draw counts the bits of half a random word, so it is the same on every backend. The kurtosis is 2.875.
    """
    size, coins = math.prod(shape), 16
    words = drawn(_words, key, (-(-size // 2),))
    # All lower halves, then all upper halves: XLA did not vectorise interleaved halves, at a third of the speed.
    halves = jnp.concatenate([words & 0xFFFF, words >> coins])[:size]
    heads = lax.population_count(halves).astype(dtype)
    return ((heads - coins / 2) * (2 / math.sqrt(coins))).reshape(shape)


def uniform(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Uniform draws between −√3 and √3.

    Ferret (arXiv 2409.06277) cuts a standard normal at ±1/√d and rescales it: to a relative 1/(2d) this is its density.
    """
    # One rounding, by a product: that of jax.random.uniform with bounds would depend on fused multiply-adds.
    return (jax.random.uniform(key, shape, dtype) - 0.5) * (2 * math.sqrt(3))


def sphere(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Uniform draws on the sphere of radius √d_leaf, so that E[u uᵀ] = I holds leaf by leaf."""
    normal = _normal(key, shape, dtype)
    return normal * (math.sqrt(normal.size) / jnp.linalg.norm(normal))


@dataclass(frozen=True)
class LowRank:
    """Matrices of low rank, u = A Bᵀ/√r with the entries of A and B from another family (EGGROLL, arXiv 2511.16652).

    A leaf of two or more axes is a matrix whose columns are its last axis. Vectors, and matrices with a side of at
    most r, are drawn dense. E[u uᵀ] = I, because the entries of A and B are independent. But the fourth moments are
    larger than a normal's, and with small matrices single steps are far too long: on the digits r = 1 took 1.57 times
    the rounds of gaussian, r = 4 1.24 times (``docs/reference/benchmarks``). The family is for large models.

    Attributes:
      rank: r ≥ 1.
      family: the family of the factors and of dense leaves.

    Raises:
      ValueError: ``rank`` < 1.
    """

    rank: int = 1
    family: Sampler = gaussian

    def __post_init__(self) -> None:
        """Check the rank."""
        integer("rank", self.rank, 1)

    def splits(self, shape: Sequence[int]) -> bool:
        """Whether a leaf of ``shape`` is drawn as factors."""
        return len(shape) > 1 and min(math.prod(shape[:-1]), shape[-1]) > self.rank

    def factors(self, key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Factors:
        """The factors A/√r and B of a leaf for which :meth:`splits` is true."""
        rows = math.prod(shape[:-1])
        numbers = pin(self.family(key, (rows + shape[-1], self.rank), dtype).astype(dtype))
        return Factors(pin(numbers[:rows] * (1 / math.sqrt(self.rank))), numbers[rows:], tuple(shape))

    def __call__(self, key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
        """A leaf as a dense array."""
        return self.factors(key, shape, dtype).dense() if self.splits(shape) else self.family(key, shape, dtype)


@dataclass(frozen=True)
class Subspace:
    """Matrices in a held subspace, u = B Qᵀ: B is drawn, and the head's state holds the orthonormal Q (2602.17155).

    A leaf of two or more axes is a matrix of R rows whose columns are its last axis, C: B is [R, r] and Q [C, r], with
    r = min(rank, C). The head keeps Q of every matrix in place of a curvature, see :func:`subspaces`; vectors are drawn
    dense. E[u uᵀ] projects on the subspace, so a step sees only the part of the gradient that lies in it.

    Attributes:
      rank: r ≥ 1.
      family: the family of B and of the vectors.

    Raises:
      ValueError: ``rank`` < 1.
    """

    rank: int = 64
    family: Sampler = gaussian

    def __post_init__(self) -> None:
        """Check the rank."""
        integer("rank", self.rank, 1)

    def splits(self, shape: Sequence[int]) -> bool:
        """Whether a leaf of ``shape`` is drawn in a subspace."""
        return len(shape) > 1 and 0 not in shape

    def factors(self, key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Factors:
        """The factor B of a leaf for which :meth:`splits` is true; Q is left empty."""
        rank = min(self.rank, shape[-1])
        rows = pin(self.family(key, (math.prod(shape[:-1]), rank), dtype).astype(dtype))
        return Factors(rows, jnp.zeros((0, rank), dtype), tuple(shape))

    def __call__(self, key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
        """A leaf outside any subspace, as a dense array.

        Raises:
          ValueError: the leaf is a matrix, and no head keeps its basis.
        """
        if self.splits(shape):
            raise ParameterError(
                "sampler", "must not be a Subspace without a head that keeps its bases, see zo.subspaces"
            )
        return self.family(key, shape, dtype)


@dataclass(frozen=True)
class Blocks:
    """One leaf at a time: a direction is zero outside one leaf (Ferret, arXiv 2409.06277).

    The head keeps a squared norm of every leaf in place of a curvature. A direction draws its leaf l with a probability
    π_l in proportion to the norm, and is u_l / √π_l there, so that E[z zᵀ] = I. A leaf of stacked layers is one block.
    The probabilities are integers over their sum, so every backend chooses the same leaf.

    Attributes:
      family: the family of the values within a leaf.
      floor: the least norm that counts, in units of the power of two above the largest.

    Raises:
      ParameterError: ``floor`` is not in [2⁻¹⁶, 1].
    """

    family: Sampler = gaussian
    floor: float = 1 / 16

    def __post_init__(self) -> None:
        """Check the floor."""
        between("floor", self.floor, 2.0**-UNIT_BITS, 1)

    def __call__(self, key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
        """The values u_l of a leaf."""
        return self.family(key, shape, dtype)

    def weights(self, squared_norms: Sequence[Array]) -> UInt32[Array, "L"]:
        """The probabilities π_l in units of one over their sum; all equal if all norms are zero."""
        norms = pin(jnp.sqrt(jnp.stack(squared_norms)))
        # Scaled by a power of two, which is exact. XLA makes a product with a reciprocal of a division by a number.
        _, exponent = jnp.frexp(norms.max())
        scaled = jnp.floor(jnp.ldexp(norms, UNIT_BITS - exponent))
        return jnp.maximum(scaled, round(self.floor * 2**UNIT_BITS)).astype(jnp.uint32)

    def shares(self, squared_norms: Sequence[Array]) -> Float[Array, "L"]:
        """The probabilities π_l."""
        weights, real = self.weights(squared_norms), jnp.result_type(squared_norms[0])
        return pin(weights.astype(real) * pin(1 / weights.sum().astype(real)))

    def scales(self, key: Key[Array, ""], squared_norms: Sequence[Array]) -> list[Array]:
        """The factor on each leaf of the direction with this key: 1 / √π_l on the leaf that it draws, 0 on others."""
        weights, shares = self.weights(squared_norms), self.shares(squared_norms)
        drawn = jax.random.randint(fold_in(key, BLOCK_STREAM), (), 0, weights.sum().astype(jnp.int32), jnp.int32)
        chosen = (jnp.cumsum(weights) <= drawn.astype(jnp.uint32)).sum()
        return list(jnp.where(jnp.arange(len(weights)) == chosen, pin(1 / pin(jnp.sqrt(shares))), 0))


@dataclass(frozen=True)
class Hadamard:
    """Rows of a randomised Hadamard matrix, see ``zo/hadamard.py``: signs, orthogonal to each other.

    All directions of a step are made together, so this is the name of a family and not a function of a leaf's key.

    Attributes:
      block: largest number of coordinates n of a block, a power of two ≥ 32.

    Raises:
      ParameterError: ``block`` is no such power.
    """

    block: int = 2**15

    def __post_init__(self) -> None:
        """Check the block."""
        integer("block", self.block, 32)
        if self.block & (self.block - 1):
            raise ParameterError("block", f"must be a power of two, got {self.block}")

    def __call__(self, key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
        """Refused: a single direction does not exist.

        Raises:
          ParameterError: always.
        """
        raise ParameterError("sampler", "must not be hadamard for a single direction; see zo.grouped_directions")


SamplerName = Literal[
    "gaussian", "rademacher", "binomial", "uniform", "sphere", "hadamard", "low_rank", "low_rank_4", "low_rank_16"
]
"""The names of the samplers; ``low_rank`` has rank 1."""
SAMPLERS: dict[str, Sampler] = {
    "gaussian": gaussian,
    "rademacher": rademacher,
    "binomial": binomial,
    "uniform": uniform,
    "sphere": sphere,
    "hadamard": Hadamard(),
    "low_rank": LowRank(),
    "low_rank_4": LowRank(4),
    "low_rank_16": LowRank(16),
}


def _check_sampler(sampler: Any) -> None:
    """Refuse a value that cannot be called with a key, a shape and a dtype.

    Raises:
      ParameterError: it cannot.
    """
    if isinstance(sampler, type):
        raise ParameterError("sampler", f"must be a name or a function, got the class {sampler.__name__}")
    if not isinstance(sampler, LowRank | Subspace | Blocks):
        function("sampler", sampler, "key, shape, dtype")


def as_sampler(sampler: Sampler | str | None) -> Sampler:
    """A family of raw perturbations, given as a function or by name; None means gaussian.

    Raises:
      ValueError: the name is unknown.
    """
    if sampler is None:
        return gaussian
    if not isinstance(sampler, str):
        _check_sampler(sampler)
        return sampler
    if sampler not in SAMPLERS:
        raise ParameterError("sampler", f"must be one of {', '.join(SAMPLERS)}, or a function; got {sampler!r}")
    return SAMPLERS[sampler]
