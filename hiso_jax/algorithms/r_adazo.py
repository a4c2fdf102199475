"""R-AdaZO (arXiv 2502.01014): Adam on the rebuilt ascent direction, its second moment from the first, not from Δ.

m ← β₁ m + (1 − β₁) Δ,   v ← β₂ v + (1 − β₂) m²,   x ← x − η m / (√v + ε).
There is no bias correction, as in the authors' code.
Bytes a round: 4·K·P up, 4·K·P down; memory: two copies of the trained parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from hiso_jax import zo
from hiso_jax.algorithms._server import moving_average
from hiso_jax.checks import fraction, positive, rate
from hiso_jax.fed.algorithm import Algorithm, default_rates


class _State(NamedTuple):
    mean: PyTree
    variance: PyTree


def _refined(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    def init(params: Any) -> _State:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, zo.working_dtype(x)), params)
        return _State(zeros, zeros)

    def update(delta: PyTree, state: _State, params: Any = None) -> tuple[PyTree, _State]:
        mean = jax.tree.map(lambda m, d: moving_average(m, d, b1), state.mean, delta)
        variance = jax.tree.map(lambda v, m: moving_average(v, zo.rounded(m * m), b2), state.variance, mean)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, variance), _State(mean, variance)

    return optax.GradientTransformation(init, update)


@default_rates(digits=0.001, mnist=0.0001)
def r_adazo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    sampler: zo.SamplerName = "gaussian",
) -> Algorithm:
    """R-AdaZO.

    Args:
      learning_rate: η.
      b1: β₁, weight that the running mean of the ascent directions keeps in each round.
      b2: β₂, weight that the running mean of the squared first moments keeps in each round.
      eps: ε, added to the root of the mean of squares.
      sampler: family of raw perturbations.
    """
    rate("learning_rate", learning_rate)
    fraction("b1", b1)
    fraction("b2", b2)
    positive("eps", eps)
    server = optax.chain(_refined(b1, b2, eps), optax.scale_by_learning_rate(learning_rate))
    return Algorithm(optax.chain(zo.scale_by_zo(sampler=sampler), server))
