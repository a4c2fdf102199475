"""A control of HiSo (arXiv 2506.02370): a curvature of one number, which adapts the rate but not the shape.

z_p = u_p / √h,   Δ = (1/P) Σ_p ĝ_p z_p,   x ← x − η Δ,   h ← γ h + (1 − γ)(mean of Δ² + ε), like the mean of HiSo's H.
Bytes a round: 4·K·P up, 4·K·P down; memory: one number.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from hiso_jax import zo
from hiso_jax.algorithms._server import descent, moving_average
from hiso_jax.checks import between, finite
from hiso_jax.fed.algorithm import Algorithm, default_rates


@default_rates(digits=0.017, mnist=0.0008)
def hiso_one_number(
    learning_rate: optax.ScalarOrSchedule,
    *,
    curvature_decay: float = 0.95,
    eps: float = 1e-8,
    sampler: zo.SamplerName = "gaussian",
) -> Algorithm:
    """HiSo with one number as its curvature.

    Args:
      learning_rate: η.
      curvature_decay: weight γ that the curvature keeps in each round.
      eps: ε, added to the mean square of Δ.
      sampler: family of raw perturbations.
    """
    between("curvature_decay", curvature_decay, 0, 1)
    finite("eps", eps)

    def ones(params: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.ones([], zo.working_dtype(x)), params)

    def advance(curvature: PyTree, delta: PyTree, step: Any) -> PyTree:
        square = zo.mean_square(delta) + eps
        return jax.tree.map(lambda h: moving_average(h, square, curvature_decay), curvature)

    head = zo.head(sampler=sampler, curvature=ones, advance=advance)
    return Algorithm(optax.chain(head, descent(learning_rate)))
