"""ZO-Adam: Adam (arXiv 1412.6980) on the rebuilt ascent direction, as in ZO-AdaMM (arXiv 1910.06513).

m ← β₁ m + (1 − β₁) Δ,   v ← β₂ v + (1 − β₂) Δ²,   x ← x − η m̂ / (√v̂ + ε).
Bytes a round: 4·K·P up, 4·K·P down; memory: two copies of the trained parameters.
"""

import optax

from hiso_jax import zo
from hiso_jax.checks import fraction, rate
from hiso_jax.fed.algorithm import Algorithm, default_rates


@default_rates(digits=0.01, mnist=0.0017)
def zo_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    sampler: zo.SamplerName = "gaussian",
) -> Algorithm:
    """ZO-Adam.

    Args:
      learning_rate: η.
      b1: β₁, weight that the running mean of the ascent directions keeps in each round.
      b2: β₂, weight that the running mean of the squared ascent directions keeps in each round.
      sampler: family of raw perturbations.
    """
    rate("learning_rate", learning_rate)
    fraction("b1", b1)
    fraction("b2", b2)
    server = optax.adam(learning_rate, b1=b1, b2=b2)
    return Algorithm(optax.chain(zo.scale_by_zo(sampler=sampler), server))
