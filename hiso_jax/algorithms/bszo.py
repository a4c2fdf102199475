"""BSZO (arXiv 2601.01452): a Kalman filter over the step's subspace shrinks the scalars that weight the directions.

For each p: R ← (1 − a) R + a (ĝ_p − m_p)²,   s = max(0.1 σ, √R),   K = v_p / (v_p + s²),   m_p ← m_p + K (ĝ_p − m_p),
v_p ← (1 − K) v_p, from m = 0, v = σ²; then once more for the direction with the largest v, whose ĝ counts twice.
x ← x − η Σ_p m_p u_p, as in the authors' code, v3. Bytes a round: 4·K·P up, 4·K·P down; memory: one number.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.checks import fraction, positive
from hiso_jax.fed.algorithm import Algorithm, default_rates


class _State(NamedTuple):
    noise: Float[Array, ""]
    prior: Float[Array, ""]


def _posterior(rate: float, prior: float | None) -> optax.GradientTransformation:
    """Replace a round's scalars by the posterior means of the directional derivatives."""

    def init(params: Any) -> _State:
        leaves = jax.tree.leaves(params)
        auto = math.sqrt(sum(leaf.size for leaf in leaves) / 1e6)
        variance = jnp.asarray((auto if prior is None else prior) ** 2, zo.working_dtype(leaves[0]))
        return _State(variance, variance)

    def update(scalars: Array, state: _State, params: Any = None) -> tuple[Array, _State]:
        def observe(carry: tuple[Array, Array, Array], at: tuple[Array, Array]) -> tuple[Any, None]:
            (m, v, r), (p, value) = carry, at
            error = value - m[p]
            r = zo.rounded((1 - rate) * r) + zo.rounded(rate * zo.rounded(error * error))
            gain = v[p] / (v[p] + jnp.maximum(zo.rounded(0.01 * state.prior), r))
            return (m.at[p].add(zo.rounded(gain * error)), v.at[p].add(-zo.rounded(gain * v[p])), r), None

        def step(noise: Array, row: Array) -> tuple[Array, Array]:
            start = jnp.zeros_like(row), jnp.full_like(row, state.prior), noise
            carry, _ = lax.scan(observe, start, (jnp.arange(len(row)), row))
            (m, _, noise), _ = observe(carry, (jnp.argmax(carry[1]), row[jnp.argmax(carry[1])]))
            return noise, m

        noise, means = lax.scan(step, state.noise, scalars.astype(state.prior.dtype))
        return (means * scalars.shape[1]).astype(scalars.dtype), state._replace(noise=noise)  # cancels the head's mean

    return optax.GradientTransformation(init, update)


@default_rates(digits=0.27, mnist=0.12)
def bszo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    prior: float | None = None,
    noise_rate: float = 0.1,
    sampler: zo.SamplerName = "gaussian",
) -> Algorithm:
    """BSZO, with 2 directions a step by default.

    Args:
      learning_rate: η.
      prior: σ, prior deviation of directional derivatives; by default √(d / 10⁶), a strong shrinkage for small d.
      noise_rate: a, weight of each new residual in the noise estimate.
      sampler: family of raw perturbations.
    """
    fraction("noise_rate", noise_rate)
    if prior is not None:
        positive("prior", prior)
    return Algorithm(
        optax.chain(_posterior(noise_rate, prior), zo.scale_by_zo(sampler=sampler), descent(learning_rate)),
        perturbations=2,
    )
