"""A control of HiSo (arXiv 2506.02370): the curvature shapes the step but not the measured directions.

Δ = H^{-1/2} (1/P) Σ_p ĝ_p u_p with ĝ measured along u,   x ← x − η Δ,   H ← γ H + (1 − γ)(Δ² + ε).
Bytes a round: 4·K·P up, 4·K·P down; memory: H, as large as the trained parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from hiso_jax import zo
from hiso_jax.algorithms._server import descent, moving_average
from hiso_jax.checks import between, finite
from hiso_jax.fed.algorithm import Algorithm, default_rates


class _State(NamedTuple):
    curvature: PyTree


def _by_learned_root(decay: float, eps: float) -> optax.GradientTransformation:
    def init(params: Any) -> _State:
        return _State(jax.tree.map(lambda x: jnp.ones(x.shape, zo.working_dtype(x)), params))

    def advanced(h: Array, d: Array) -> Array:
        return moving_average(h, zo.rounded(d * d) + eps, decay)

    def update(delta: PyTree, state: _State, params: Any = None) -> tuple[PyTree, _State]:
        shaped = jax.tree.map(lambda d, h: zo.rounded(d / zo.rounded(jnp.sqrt(h))), delta, state.curvature)
        return shaped, _State(jax.tree.map(advanced, state.curvature, shaped))

    return optax.GradientTransformation(init, update)


@default_rates(digits=0.03, mnist=0.0007)
def hiso_isotropic(
    learning_rate: optax.ScalarOrSchedule,
    *,
    curvature_decay: float = 0.95,
    eps: float = 1e-8,
    sampler: zo.SamplerName = "gaussian",
) -> Algorithm:
    """HiSo with measurements along isotropic directions.

    Args:
      learning_rate: η.
      curvature_decay: weight γ that the curvature keeps in each round.
      eps: ε, added to the square of Δ.
      sampler: family of raw perturbations.
    """
    between("curvature_decay", curvature_decay, 0, 1)
    finite("eps", eps)
    shaped = _by_learned_root(curvature_decay, eps)
    return Algorithm(optax.chain(zo.scale_by_zo(sampler=sampler), shaped, descent(learning_rate)))
