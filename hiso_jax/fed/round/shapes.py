"""The shapes of a round's messages, and the checks that need only shapes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm, Senders
from hiso_jax.fed.codes import received
from hiso_jax.fed.measure import Estimator
from hiso_jax.fed.round.channel import Channel, first_memory
from hiso_jax.fed.wire import BroadcastBytes
from hiso_jax.zo import reads_loss as zo_reads_loss
from hiso_jax.zo import zo_states

# Combiners that compare need three clients: the median of two is their mean.
FEWEST_COMPARED = 3


class Shapes(NamedTuple):
    """The shapes of a round's messages.

    Attributes:
      sent: shapes of all clients' messages as they arrive, [C, ...].
      aggregate: shapes of the broadcast aggregate.
      memory: shapes of the server's memory.
      groups: G.
    """

    sent: PyTree
    aggregate: PyTree
    memory: PyTree
    groups: int

    @property
    def message(self) -> PyTree:
        """The shapes of one client's message."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.sent)

    def bytes_of(self, algorithm: Algorithm) -> tuple[int, BroadcastBytes]:
        """The bytes of a message, and the bytes that the server broadcasts for a round."""
        return algorithm.wire.up(self.message), algorithm.wire.down(self.aggregate, self.groups)


def groups_of(algorithm: Algorithm, params: PyTree, clients: int) -> int:
    """G, the number of groups of directions in a cohort; 1 if the algorithm has no directions.

    Raises:
      ValueError: there are fewer clients than groups, a combiner with a memory has several groups, or a group has too
        few clients for a combiner that compares them.
    """
    heads = zo_states(jax.eval_shape(algorithm.optimizer.init, params)) if algorithm.has_scalars else []
    groups = heads[0].directions.groups_of(clients) if heads else 1
    if groups > 1 and algorithm.combine.init is not None:
        raise ParameterError("groups", f"must be 1 for a combiner with a memory, got {groups}")
    if algorithm.combine.compares and clients // groups < FEWEST_COMPARED:
        raise ParameterError(
            "groups",
            f"must leave {FEWEST_COMPARED} clients along the same directions for a combiner that compares them; "
            f"{clients} clients in {groups} groups do not: use fewer groups, or a mean of clipped messages",
        )
    return groups


def reads_loss(algorithm: Algorithm, shapes: Shapes, params: PyTree) -> bool:
    """Whether the optimizer reads the loss of a round; a client that replays the round must then receive the loss.

    Args:
      algorithm: the algorithm.
      shapes: the shapes of its messages.
      params: the parameters, or their shapes.
    """
    taken = jax.eval_shape(lambda aggregate: received(aggregate, shapes.groups), shapes.aggregate)
    return zo_reads_loss(algorithm.tx, params, taken)


def shapes_of(
    algorithm: Algorithm, estimator: Estimator, params: PyTree, clients: int, groups: int | None = None
) -> Shapes:
    """The shapes of the messages of ``clients`` clients; only the shapes and dtypes of ``params`` are read.

    ``groups`` is the number of groups whose aggregates stand side by side; None is that of the algorithm's directions.

    Raises:
      ValueError: the ledger has no columns for the estimates of the difference.
    """
    dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(params)))
    measured = estimator.measure.message_shapes(estimator, params, clients, dtype)
    groups = groups_of(algorithm, params, clients) if groups is None else groups

    def through(messages: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        places = jnp.arange(clients)
        senders = Senders(places, places, places < 0, places >= 0, groups)
        channel = Channel(algorithm, senders, jax.random.key(0), jax.random.key(0))
        sent, memory = channel.send(messages), first_memory(algorithm, messages)
        return sent, channel.combine(sent, jnp.ones(clients), memory).aggregate, memory

    sent, aggregate, memory = jax.eval_shape(through, measured)
    return Shapes(sent, aggregate, memory, groups)
