"""HiZOO (arXiv 2402.15173): directions shaped by a diagonal Hessian learned from second differences.

z_p = H^{-1/2} u_p,   H⁺ = (1 − α) H + α (1/P) Σ_p ½ |ĉ_p| H² z_p²,   x ← x − η (1/P) Σ_p ĝ_p u_p / √H⁺. H shapes the
measurement and H⁺ the step, as in the authors' code, where P = 1. ĝ is the central difference over 2μ, ĉ the second
over μ².
Bytes a round: 8·K·P up, 8·K·P down; 2·P + 1 forward passes a step; memory: H, as large as the trained parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, PyTree

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.checks import between
from hiso_jax.fed.algorithm import Algorithm, default_rates, probes


def _head(smoothing: float, sampler: zo.SamplerName) -> optax.GradientTransformationExtraArgs:
    def advance(curvature: PyTree, delta: PyTree, step: zo.LocalStep) -> PyTree:
        second = jnp.abs(step.aggregate["curvature"])

        def add(total: PyTree, term: tuple[Array, Array]) -> tuple[PyTree, None]:
            index, number = term

            def one(a: Array, h: Array, z: Array) -> Array:
                return a + zo.rounded(zo.rounded(number / 2) * zo.rounded(zo.rounded(h * z) ** 2))

            return jax.tree.map(one, total, curvature, step.direction_at(index)), None

        zero = jax.tree.map(jnp.zeros_like, curvature)
        total, _ = lax.scan(add, zero, (jnp.arange(len(second)), second))
        share = smoothing / len(second)
        return jax.tree.map(lambda h, t: zo.rounded((1 - smoothing) * h) + zo.rounded(share * t), curvature, total)

    def ones(params: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.ones_like(x, zo.working_dtype(x)), params)

    measured = zo.head(sampler=sampler, curvature=ones, advance=advance, every_step=True)

    def update(updates: Any, state: zo.ScaleByZoState, params: Any = None, **extra: Any) -> tuple[PyTree, Any]:
        delta, after = measured.update(updates, state, params, **extra)

        def stepped(d: Array, old: Array, new: Array) -> Array:
            return d * zo.rounded(jnp.sqrt(old)) / zo.rounded(jnp.sqrt(new))

        return jax.tree.map(stepped, delta, state.curvature, after.curvature), after

    return optax.GradientTransformationExtraArgs(measured.init, update)


@default_rates(digits=0.09, mnist=0.006)
def hizoo(
    learning_rate: optax.ScalarOrSchedule, *, smoothing: float = 1e-3, sampler: zo.SamplerName = "gaussian"
) -> Algorithm:
    """HiZOO.

    Args:
      learning_rate: η.
      smoothing: α, weight of each round's Hessian; the authors try 1e-12 to 1e-2, 0 leaves H at one.
      sampler: family of raw perturbations.
    """
    between("smoothing", smoothing, 0, 1)
    return Algorithm(optax.chain(_head(smoothing, sampler), descent(learning_rate)), measure=probes("second"))
