"""DeComFL (arXiv 2405.15861) with heavy-ball momentum (Polyak, 1964) on the server.

m ← β m + Δ,   x ← x − η m.   Bytes a round: 4·K·P up, 4·K·P down; memory: a copy of the trained parameters.
"""

import optax

from hiso_jax import zo
from hiso_jax.checks import fraction, rate
from hiso_jax.fed.algorithm import Algorithm, default_rates


@default_rates(digits=0.005, mnist=0.0001)
def zo_momentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float = 0.9,
    nesterov: bool = False,
    sampler: zo.SamplerName = "gaussian",
) -> Algorithm:
    """DeComFL with momentum.

    Args:
      learning_rate: η; the steps are 1/(1 − β) times as long.
      beta: β, weight that the momentum keeps in each round.
      nesterov: look-ahead, as in Nesterov's momentum.
      sampler: family of raw perturbations.
    """
    fraction("beta", beta)
    rate("learning_rate", learning_rate)
    momentum = optax.trace(beta, nesterov=nesterov)
    return Algorithm(
        optax.chain(zo.scale_by_zo(sampler=sampler), momentum, optax.scale_by_learning_rate(learning_rate))
    )
