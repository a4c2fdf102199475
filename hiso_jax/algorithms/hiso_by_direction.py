"""HiSo (arXiv 2506.02370) in its authors' memory-saving form: each direction updates the curvature in turn.

Δ = (1/P) Σ_p ĝ_p z_p with z_p = H^{-1/2} u_p,   x ← x − η Δ; then for p = 1 … P, each with the previous H,
H ← γ H + (1 − γ)((ĝ_p / P)² u_p² / H + ε), as in adam_forward.py of ZidongLiu/DeComFL, which has no ε.
Bytes a round: 4·K·P up, 4·K·P down; memory: H, as large as the trained parameters.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from hiso_jax import zo
from hiso_jax.algorithms._server import descent, moving_average
from hiso_jax.checks import between, finite
from hiso_jax.fed.algorithm import Algorithm, default_rates


@default_rates(digits=0.01, mnist=0.0005)
def hiso_by_direction(
    learning_rate: optax.ScalarOrSchedule,
    *,
    curvature_decay: float = 0.95,
    eps: float = 1e-8,
    sampler: zo.SamplerName = "gaussian",
) -> Algorithm:
    """HiSo with P curvature updates a round.

    Args:
      learning_rate: η.
      curvature_decay: weight γ that the curvature keeps for each direction.
      eps: ε, added to the square of every direction's share of Δ.
      sampler: family of raw perturbations.
    """
    between("curvature_decay", curvature_decay, 0, 1)
    finite("eps", eps)

    def ones(params: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.ones(x.shape, zo.working_dtype(x)), params)

    def advance(before: PyTree, delta: PyTree, step: zo.LocalStep) -> PyTree:
        shares = zo.directional_derivatives(step.aggregate) / zo.directional_derivatives(step.aggregate).shape[0]

        def by(place: Array, curvature: PyTree) -> PyTree:
            def one(h: Array, z: Array, h0: Array) -> Array:
                # z was shaped by h0, the H of the round, so that u² / h = z² · h0 / h.
                part = zo.rounded(shares[place].astype(z.dtype) * z)
                return moving_average(
                    h, zo.rounded(zo.rounded(part * part) * zo.rounded(h0 / h)) + eps, curvature_decay
                )

            return jax.tree.map(one, curvature, step.direction_at(place), before)

        return jax.lax.fori_loop(0, shares.shape[0], by, before)

    head = zo.head(sampler=sampler, curvature=ones, advance=advance)
    return Algorithm(optax.chain(head, descent(learning_rate)))
