"""A control of HiSo (arXiv 2506.02370): the curvature is learned for some rounds and then fixed.

z_p = H^{-1/2} u_p,   Δ = (1/P) Σ_p ĝ_p z_p,   x ← x − η Δ,   H ← γ H + (1 − γ)(Δ² + ε) in the first rounds only.
Bytes a round: 4·K·P up, 4·K·P down; memory: H, as large as the trained parameters.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from hiso_jax import zo
from hiso_jax.algorithms._server import descent, moving_average
from hiso_jax.checks import between, finite, integer
from hiso_jax.fed.algorithm import Algorithm, default_rates


@default_rates(digits=0.017, mnist=0.0007)
def hiso_frozen(
    learning_rate: optax.ScalarOrSchedule,
    *,
    learning_rounds: int = 100,
    curvature_decay: float = 0.95,
    eps: float = 1e-8,
    sampler: zo.SamplerName = "gaussian",
) -> Algorithm:
    """HiSo with a curvature that is fixed after some rounds.

    Args:
      learning_rate: η.
      learning_rounds: number of rounds in which the curvature is learned; 0 is DeComFL.
      curvature_decay: weight γ that the curvature keeps in each of these rounds.
      eps: ε, added to the square of Δ.
      sampler: family of raw perturbations.
    """
    integer("learning_rounds", learning_rounds, 0)
    between("curvature_decay", curvature_decay, 0, 1)
    finite("eps", eps)

    def ones(params: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.ones(x.shape, zo.working_dtype(x)), params)

    def advance(curvature: PyTree, delta: PyTree, step: zo.LocalStep) -> PyTree:
        def one(h: Array, d: Array) -> Array:
            moved = moving_average(h, zo.rounded(d * d) + eps, curvature_decay)
            return jnp.where(step.rounds < learning_rounds, moved, h)

        return jax.tree.map(one, curvature, delta)

    head = zo.head(sampler=sampler, curvature=ones, advance=advance)
    return Algorithm(optax.chain(head, descent(learning_rate)))
