"""AdaMeZO (arXiv 2605.00650): Adam with moments recomputed from the scalars and seeds of the last w rounds.

m = Σ_{j<w} β₁^j Δ_{t−j},   v = Σ_{j<w} β₂^j Δ_{t−j}²,   x ← x − η · 100 m / (√v + ε); the first w rounds
use x ← x − η Δ. As in the authors' code (shawnnn3di/AdaMeZO), a round has one direction and one local step, and the
moments have the factor 100 and no (1 − β). Bytes a round: 4 up, 4 down; memory: w keys and scalars, w directions made.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree, UInt32

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.checks import ParameterError, finite, fraction, integer
from hiso_jax.fed.algorithm import Algorithm, default_rates


class _State(NamedTuple):
    head: zo.ScaleByZoState
    keys: UInt32[Array, "w words"]
    scalars: Float[Array, "w"]


def _head(window: int, b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    measured = zo.scale_by_zo()

    def init(params: PyTree) -> _State:
        words = jax.random.key_data(jax.random.key(0)).shape
        return _State(measured.init(params), jnp.zeros((window, *words), jnp.uint32), jnp.zeros(window))

    def update(updates: Any, state: _State, params: Any = None, *, key: Any = None, **extra: Any) -> tuple[PyTree, Any]:
        delta, head = measured.update(updates, state.head, params, key=key, **extra)
        if updates.shape != (1, 1):
            raise ParameterError("perturbations", f"and `local_steps` must be 1 for adamezo, got {updates.shape}")
        keys = jnp.roll(state.keys, 1, 0).at[0].set(jax.random.key_data(key))
        scalars = jnp.roll(state.scalars, 1).at[0].set(updates[0, 0].astype(state.scalars.dtype))

        def add(sums: tuple[PyTree, PyTree], term: tuple[Array, Array, Array]) -> tuple[tuple[PyTree, PyTree], None]:
            age, words, scalar = term
            own = jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))
            past = zo.accumulate(own, scalar[None], params, sampler=head.directions)
            a, b = b1**age, b2**age
            m = jax.tree.map(lambda m, d: m + zo.rounded(a.astype(d.dtype) * d), sums[0], past)
            v = jax.tree.map(lambda v, d: v + zo.rounded(b.astype(d.dtype) * zo.rounded(d * d)), sums[1], past)
            return (m, v), None

        zero = jax.tree.map(jnp.zeros_like, delta)
        (m, v), _ = lax.scan(add, (zero, zero), (jnp.arange(window), keys, scalars))

        def shaped(d: Array, m: Array, v: Array) -> Array:
            return jnp.where(state.head.rounds < window, d, zo.rounded(100.0 * m) / (jnp.sqrt(v) + eps))

        return jax.tree.map(shaped, delta, m, v), _State(head, keys, scalars)

    return optax.GradientTransformationExtraArgs(init, update)


@default_rates(digits=5.8e-5, mnist=1e-5)
def adamezo(
    learning_rate: optax.ScalarOrSchedule, *, window: int = 10, b1: float = 0.7, b2: float = 0.9, eps: float = 1e-5
) -> Algorithm:
    """AdaMeZO, with one direction a round.

    Args:
      learning_rate: η.
      window: w, number of rounds in the moments.
      b1: β₁, weight that an ascent direction keeps with each round of age.
      b2: β₂, weight that the square of an ascent direction keeps with each round of age.
      eps: ε, added to the root.
    """
    integer("window", window, 1)
    fraction("b1", b1)
    fraction("b2", b2)
    finite("eps", eps)
    head = _head(window, b1, b2, eps)
    return Algorithm(optax.chain(head, descent(learning_rate)), perturbations=1)
