"""MEAZO (arXiv 2605.03869): one adaptive number, the running mean square of the mean scalar.

ḡ = mean_p ĝ_p,   v ← β v + (1 − β) ḡ²,   x ← x − η Δ / (√(v / (1 − βᵗ)) + ζ), t the number of updates of v so far.
Bytes a round: 4·K·P up, 4·K·P down; memory: one number. The paper's β and ζ are not public; Adam's are the defaults.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.checks import finite, fraction
from hiso_jax.fed.algorithm import Algorithm, default_rates


class _State(NamedTuple):
    rounds: Int[Array, ""]
    mean_square: Float[Array, ""]


def _by_mean_scalar(decay: float, eps: float) -> optax.GradientTransformation:
    """Divide a round's scalars by the root of the running mean square of their mean."""

    def init(params: Any) -> _State:
        dtype = jnp.promote_types(jax.tree.leaves(params)[0].dtype, jnp.float32)
        return _State(jnp.zeros([], jnp.int32), jnp.zeros([], dtype))

    def update(scalars: Array, state: _State, params: Any = None) -> tuple[Array, _State]:
        count, mean = optax.safe_increment(state.rounds), zo.rounded(scalars.mean())
        square = zo.rounded(decay * state.mean_square) + zo.rounded((1 - decay) * zo.rounded(mean * mean))
        root = jnp.sqrt(square / (1 - decay ** count.astype(square.dtype))) + eps
        return scalars / root.astype(scalars.dtype), _State(count, square)

    return optax.GradientTransformation(init, update)


@default_rates(digits=0.01, mnist=0.002)
def meazo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.999,
    eps: float = 1e-8,
    sampler: zo.SamplerName = "gaussian",
) -> Algorithm:
    """MEAZO.

    Args:
      learning_rate: η.
      decay: weight β that the mean square keeps in each round.
      eps: ζ, added to the root of the mean square.
      sampler: family of raw perturbations.
    """
    fraction("decay", decay)
    finite("eps", eps)
    head = zo.scale_by_zo(sampler=sampler)
    return Algorithm(optax.chain(_by_mean_scalar(decay, eps), head, descent(learning_rate)))
