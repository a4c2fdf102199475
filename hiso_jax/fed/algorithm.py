"""Many clients' scalars → one: aggregates of a cohort, of the shape ``(scalars, weights) → [K, P]``."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hiso_jax.zo import pin

Aggregate = Callable[[Float[Array, "C K P"], Float[Array, "C"]], Float[Array, "K P"]]


def mean(scalars: Float[Array, "C K P"], weights: Float[Array, "C"]) -> Float[Array, "K P"]:
    """The weighted mean over the clients of positive weight (HiSo, Algorithm 1); zero if there is none.

    Args:
      scalars: of every client of the cohort; those of weight zero may be anything, NaN too.
      weights: zero for a client that does not count.
    """
    total = weights.sum()
    divisor = pin(jnp.where(total > 0, total, 1))

    def one(column: Float[Array, "C"]) -> Float[Array, ""]:
        counted = jnp.where(weights > 0, column * weights, 0)
        return pin(pin(counted).sum() / divisor)

    # One perturbation after the other: all at once would be summed in another order than each by itself, and a run
    # that aggregates while its directions go by must make the same bits.
    columns = scalars.reshape(len(scalars), -1).T
    return lax.map(one, columns).reshape(scalars.shape[1:])


# Of these a perturbation's aggregate needs that perturbation's scalars only, and can be applied before the next.
SEPARABLE: frozenset[Aggregate] = frozenset({mean})
