"""FedKSeed (arXiv 2312.06353): every client's directions are of a pool of S seeds, drawn at random for each step.

Δ = (1/C) Σ_i (1/P) Σ_p ĝ_{i,p} u_{s(i,p)},   x ← x − η Δ, plain descent. Who comes late could be told S sums,
a seed each, in the place of all rounds; that message is not made here, and catch-up is counted round by round.
Bytes a round: 4·K·P up; down those of every valid client.
"""

from dataclasses import dataclass

import jax
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Key

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.checks import whole
from hiso_jax.fed.algorithm import Algorithm, default_rates

# Of the pool, the same in every run.
POOL = 0x5EED


@dataclass(frozen=True)
class OfPool:
    """The key rule of a pool: one of ``seeds`` keys, at random for each (round, step, index).

    Attributes:
      seeds: S.
    """

    seeds: int

    def __call__(self, round_key: Key[Array, ""], step: ArrayLike, index: ArrayLike) -> Key[Array, ""]:
        """The key of a direction."""
        number = jax.random.randint(zo.perturbation_key(round_key, step, index), (), 0, self.seeds)
        return jax.random.fold_in(jax.random.key(POOL), number)


@default_rates(digits=0.01, mnist=0.0005)
def fed_kseed(
    learning_rate: optax.ScalarOrSchedule, *, pool_seeds: int = 4096, sampler: zo.SamplerName = "gaussian"
) -> Algorithm:
    """FedKSeed, with one direction a step unless a run says otherwise.

    Args:
      learning_rate: η.
      pool_seeds: S, in the pool.
      sampler: family of raw perturbations.
    """
    whole("pool_seeds", pool_seeds, 1)
    directions = zo.Directions(zo.SAMPLERS[sampler], key=OfPool(pool_seeds), groups=None, block=0)
    return Algorithm(optax.chain(zo.scale_by_zo(sampler=directions), descent(learning_rate)), perturbations=1)
