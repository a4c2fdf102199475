"""FZOO (arXiv 2506.09034): steps in units of the standard deviation of the perturbed losses, along random signs.

Δ = (1/P) Σ_p ĝ_p u_p / std_p(ĝ),   x ← x − η Δ. μ·std_p(ĝ) is the standard deviation of the P perturbed losses, with
divisor P as in the authors' code; its μ cancels the μ of ĝ. Bytes a round: 4·K·P up, 4·K·P down; memory: none. P ≥ 2.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.fed.algorithm import Algorithm, default_rates


def _over_deviation(scalars: Array, params: Any = None) -> Array:
    centred = scalars - zo.rounded(scalars.mean(1, keepdims=True))
    deviation = jnp.sqrt(zo.rounded(zo.rounded(centred * centred).mean(1, keepdims=True)))
    # Equal scalars along all directions carry no information: the step is zero.
    return jnp.where(deviation > 0, scalars / jnp.where(deviation > 0, deviation, 1), 0)


@default_rates(digits=0.03, mnist=0.01)
def fzoo(
    learning_rate: optax.ScalarOrSchedule, *, sampler: zo.SamplerName = "rademacher", weight_decay: float = 0.0
) -> Algorithm:
    """FZOO, with 8 directions a step by default.

    Args:
      learning_rate: η; a step's length does not depend on the loss.
      sampler: family of raw perturbations.
      weight_decay: decoupled weight decay on the server, added to the ascent direction; 0 is none.
    """
    scale, head = optax.stateless(_over_deviation), zo.scale_by_zo(sampler=sampler)
    server = descent(learning_rate, weight_decay=weight_decay)
    return Algorithm(optax.chain(scale, head, server), perturbations=8, fewest_perturbations=2)
