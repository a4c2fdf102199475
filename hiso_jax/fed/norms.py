"""The lengths of messages, and the factors that shorten them."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from hiso_jax.fed.codes import by_message, is_coded, root_mean_square
from hiso_jax.zo import directional_derivatives


def rows_of(messages: PyTree, counts: Bool[Array, "C"]) -> Float[Array, "C n"]:
    """Every message, a tree of [C, ...], as one row of numbers; zeros where it does not count."""
    rows = jnp.concatenate([m.reshape(len(m), -1) for m in jax.tree.leaves(messages)], axis=1)
    # A message that does not count may be anything.
    return jnp.where(counts[:, None], rows, 0)


def kinds(messages: PyTree) -> list[PyTree]:
    """The parts of messages that are compared each by itself: derivatives and curvatures, say, differ in scale."""
    return [messages] if directional_derivatives(messages) is messages else jax.tree.leaves(messages, is_leaf=is_coded)


def lengths(messages: PyTree, counts: Bool[Array, "C"]) -> Float[Array, "C"]:
    """The root mean square of every message's numbers, 0 of one that does not count.

    Args:
      messages: a tree of [C, ...].
      counts: which of them count, [C].
    """
    return by_message(root_mean_square, rows_of(messages, counts))


def shortening(messages: PyTree, counts: Bool[Array, "C"], norm: float) -> Float[Array, "C"]:
    """The factors that shorten messages to the Euclidean length ``norm``, 1 of those that are not longer."""
    rows = rows_of(messages, counts)
    # The norm itself may be beyond what a float holds.
    return to_length(lengths(messages, counts), norm / rows.shape[1] ** 0.5)


def to_length(own: Float[Array, "C"], wanted: ArrayLike) -> Float[Array, "C"]:
    """The factors that bring lengths down to ``wanted``, 1 of those that are not longer."""
    return jnp.where(own > wanted, wanted / jnp.where(own > 0, own, 1), 1)


def middle(own: Float[Array, "C"], counts: Bool[Array, "C"]) -> Float[Array, ""]:
    """The lower median of those lengths that count and are not 0; infinite if there is none.

    Clients whose loss is 0 along every direction say nothing of how long a message is.
    """
    counts &= own > 0
    total = counts.sum()
    ordered = jnp.sort(jnp.where(counts, own, jnp.inf))
    return ordered[jnp.maximum(total - 1, 0) // 2]
