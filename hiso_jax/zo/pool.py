"""A pool of directions, the key rule of FedKSeed (arXiv 2312.06353): with plain descent a run is one sum per seed."""

from dataclasses import dataclass

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key

from hiso_jax.checks import integer
from hiso_jax.zo.directions import perturbation_key
from hiso_jax.zo.threefry import fold_in

# The seed of the pool, the same in every run.
POOL = 0x5EED


def in_order(round_key: Key[Array, ""], step: ArrayLike, index: ArrayLike) -> Key[Array, ""]:
    """The key rule that visits a pool in order: the key of direction s = ``index``, in every round."""
    return fold_in(jax.random.key(POOL), index)


@dataclass(frozen=True)
class Pool:
    """The key rule of a pool: one of ``seeds`` keys, drawn at random for each (round, step, index).

    Attributes:
      seeds: S, the number of directions in the pool.

    Raises:
      ValueError: S is not in [1, 2³¹).
    """

    seeds: int

    def __post_init__(self) -> None:
        """Check S."""
        integer("seeds", self.seeds, 1, 2**31)

    def number(self, round_key: Key[Array, ""], step: ArrayLike, index: ArrayLike) -> Int[Array, ""]:
        """The index s of a direction in the pool, 0 ≤ s < S."""
        return jax.random.randint(perturbation_key(round_key, step, index), (), 0, self.seeds)

    def __call__(self, round_key: Key[Array, ""], step: ArrayLike, index: ArrayLike) -> Key[Array, ""]:
        """The key of a direction."""
        return in_order(round_key, step, self.number(round_key, step, index))
