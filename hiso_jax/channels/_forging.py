"""Statistics of the honest messages, which hostile clients use in attacks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hiso_jax.fed.algorithm import Senders


def honest_statistics(
    numbers: Float[Array, "C ..."], senders: Senders
) -> tuple[Float[Array, "C ..."], Float[Array, "C ..."]]:
    """The mean and the standard deviation of every entry over the honest clients of each client's group, [C, ...].

    If a group has no honest client, each of its clients uses its own measured value and deviation 0, the best that it
    knows. If each client has its own directions, a group is one client.
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
