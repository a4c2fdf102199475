"""Norms of messages, and the factors that clip messages to a norm."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from hiso_jax.fed.codes import by_message, is_coded, root_mean_square
from hiso_jax.zo import directional_derivatives


def rows_of(messages: PyTree, counts: Bool[Array, "C"]) -> Float[Array, "C n"]:
    """Each message of a tree of [C, ...] as one row of values; zeros for a message that does not count."""
    rows = jnp.concatenate([m.reshape(len(m), -1) for m in jax.tree.leaves(messages)], axis=1)
    # A message that does not count may hold any values.
    return jnp.where(counts[:, None], rows, 0)


def kinds(messages: PyTree) -> list[PyTree]:
    """The parts of messages that are compared separately, because their scales differ (derivatives, curvatures)."""
    return [messages] if directional_derivatives(messages) is messages else jax.tree.leaves(messages, is_leaf=is_coded)


def lengths(messages: PyTree, counts: Bool[Array, "C"]) -> Float[Array, "C"]:
    """The root mean square of the values of each message; 0 for a message that does not count.

    Args:
      messages: a tree of [C, ...].
      counts: mask of the messages that count, [C].
    """
    return by_message(root_mean_square, rows_of(messages, counts))


def shortening(messages: PyTree, counts: Bool[Array, "C"], norm: float) -> Float[Array, "C"]:
    """The factors that clip messages to the Euclidean norm ``norm``; 1 for a message that is not longer."""
    rows = rows_of(messages, counts)
    # Root mean squares are compared, because the norm of a message may overflow a float.
    return to_length(lengths(messages, counts), norm / rows.shape[1] ** 0.5)


def to_length(own: Float[Array, "C"], wanted: ArrayLike) -> Float[Array, "C"]:
    """The factors that reduce lengths to ``wanted``; 1 for a length that is not larger."""
    return jnp.where(own > wanted, wanted / jnp.where(own > 0, own, 1), 1)


def middle(own: Float[Array, "C"], counts: Bool[Array, "C"]) -> Float[Array, ""]:
    """The lower median of the lengths that count and are not 0; infinite if there are no such lengths.

    Zero lengths are ignored: a client whose derivative is 0 along every direction gives no scale of a message.
    """
    counts &= own > 0
    total = counts.sum()
    ordered = jnp.sort(jnp.where(counts, own, jnp.inf))
    return ordered[jnp.maximum(total - 1, 0) // 2]
