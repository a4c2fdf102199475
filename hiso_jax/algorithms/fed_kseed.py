"""FedKSeed (arXiv 2312.06353): every client draws the directions of each step at random from a pool of S seeds.

Δ = (1/C) Σ_i (1/P) Σ_p ĝ_{i,p} u_{s(i,p)},   x ← x − η Δ. With plain descent any number of rounds is S sums; a late
client receives the sums if they are fewer bytes (``fed/ledger/seed_sums.py``).
Bytes a round: 4·K·P up; down the messages of all valid clients, at most 4·S + 4.
"""

import optax

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.checks import integer
from hiso_jax.fed.algorithm import Algorithm, default_rates


@default_rates(digits=0.01, mnist=0.00017)
def fed_kseed(
    learning_rate: optax.ScalarOrSchedule, *, pool_seeds: int = 4096, sampler: zo.SamplerName = "gaussian"
) -> Algorithm:
    """FedKSeed, with one direction a step by default.

    Args:
      learning_rate: η.
      pool_seeds: S, number of seeds in the pool.
      sampler: family of raw perturbations.
    """
    integer("pool_seeds", pool_seeds, 1)
    directions = zo.Directions(zo.as_sampler(sampler), key=zo.Pool(pool_seeds), groups=None, block=0)
    tx = optax.chain(zo.scale_by_zo(sampler=directions), descent(learning_rate))
    return Algorithm(tx, perturbations=1, pooled_rate=learning_rate)
