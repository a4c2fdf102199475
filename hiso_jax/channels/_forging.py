"""What attacks share: what the hostile know of the honest."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hiso_jax.fed.algorithm import Senders


def honest_statistics(
    numbers: Float[Array, "C ..."], senders: Senders
) -> tuple[Float[Array, "C ..."], Float[Array, "C ..."]]:
    """The mean and the standard deviation of every number over the honest clients of everyone's own group, [C, ...].

    A client whose group has nobody honest, its own where each measures along directions of its own, takes the number
    that it measured itself, and no deviation: it is the best that it knows.
    """
    honest = jnp.isfinite(numbers)
    if senders.honest is not None:
        honest &= jnp.expand_dims(senders.honest, range(1, numbers.ndim))
    group = senders.places % senders.groups
    own = jnp.where(honest, numbers, 0)

    def total(values: Float[Array, "C ..."]) -> Float[Array, "C ..."]:
        return jax.ops.segment_sum(values, group, num_segments=senders.groups)[group]

    count = total(honest.astype(numbers.dtype))
    average = total(own) / jnp.maximum(count, 1)
    spread = jnp.sqrt(total(jnp.where(honest, jnp.square(numbers - average), 0)) / jnp.maximum(count, 1))
    return jnp.where(count > 0, average, numbers), jnp.where(count > 0, spread, 0)
