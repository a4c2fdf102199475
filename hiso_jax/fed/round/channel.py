"""What happens to a round's messages between its clients and its aggregate."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from hiso_jax.fed.algorithm import (
    Algorithm,
    Probes,
    Send,
    Senders,
    StatefulCombine,
    by_number,
    is_separable,
)
from hiso_jax.fed.keys import combine_key, send_key
from hiso_jax.fed.round.inputs import Estimator


class Channel(NamedTuple):
    """An algorithm's ``send`` and ``combine`` in one round.

    Attributes:
      algorithm: whose.
      senders: the cohort.
      key: the channel key of the round.
    """

    algorithm: Algorithm
    senders: Senders
    key: Key[Array, ""]

    def send(self, messages: PyTree, first: Int[Array, ""] | int = 0) -> PyTree:
        """What arrives of all messages [C, ...], whose perturbations are numbered from ``first``."""
        for place, send in enumerate(self.algorithm.send):
            key = send_key(self.key, place)
            if self.algorithm.has_scalars and is_separable(send):
                messages = by_number(partial(self._send_one, send), messages, key, first)
            else:
                messages = send(messages, self.senders, key)
        return messages

    def _send_one(self, send: Send, numbers: PyTree, key: Key[Array, ""]) -> PyTree:
        return send(numbers, self.senders, key)

    def combine(
        self, messages: PyTree, weights: Float[Array, "C"], memory: PyTree, first: Int[Array, ""] | int = 0
    ) -> tuple[PyTree, PyTree]:
        """The aggregate of all messages, and what the combiner remembers after it.

        Args:
          messages: [C, ...].
          weights: zero for those that do not count.
          memory: what the combiner remembers.
          first: the number of the first of the perturbations, if they are not all.
        """
        combine, key = self.algorithm.combine, combine_key(self.key)
        weights = weights.astype(jnp.result_type(jnp.float32, *jax.tree.leaves(messages)))
        if isinstance(combine, StatefulCombine):
            # As a branch of a conditional it is compiled apart from what stands around it, so that a resumed run, which
            # makes its memory again from the ledger, has the same bits.
            operands = messages, weights, key, memory
            shapes = jax.eval_shape(combine.combine, *operands)

            def nothing(*_: PyTree) -> tuple[PyTree, PyTree]:
                return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[0]), memory

            return lax.cond((weights > 0).any(), combine.combine, nothing, *operands)
        if self.algorithm.has_scalars and is_separable(combine):
            return by_number(lambda numbers, own: combine(numbers, weights, own), messages, key, first), memory
        return combine(messages, weights, key), memory

    def relay(self, numbers: PyTree, weights: Float[Array, "C"], index: Int[Array, ""]) -> tuple[PyTree, PyTree]:
        """What arrives of one perturbation's numbers [C] in a round of one local step, and its aggregate.

        By the same arithmetic as of all perturbations together, so that the bits are the same.
        """
        sent = self.send(jax.tree.map(lambda x: x[:, None, None], numbers), index)
        combined, _ = self.combine(sent, weights, (), index)
        return jax.tree.map(lambda x: x[:, 0, 0], sent), jax.tree.map(lambda x: x[0, 0], combined)


def first_memory(algorithm: Algorithm, messages: PyTree) -> PyTree:
    """What the combiner remembers before the first round; ``messages`` are shapes [C, ...]."""
    combine = algorithm.combine
    return combine.init(messages) if isinstance(combine, StatefulCombine) else ()


class Shapes(NamedTuple):
    """The shapes of a round's messages.

    Attributes:
      sent: of all clients, as they arrive, [C, ...].
      aggregate: of what is made of them.
      memory: of what the combiner remembers.
    """

    sent: PyTree
    aggregate: PyTree
    memory: PyTree

    @property
    def message(self) -> PyTree:
        """Of one client."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.sent)


def _check_names(numbers: PyTree) -> None:
    """Refuse numbers of a direction that the ledger has no columns for.

    Raises:
      ValueError: they are neither an array nor nested dicts of arrays, with names without dots.
    """
    for path, _ in jax.tree_util.tree_leaves_with_path(numbers):
        for key in path:
            if not isinstance(key, jax.tree_util.DictKey) or not isinstance(key.key, str) or "." in key.key:
                raise ValueError(
                    "measure must give an array, or a dict of arrays whose names have no dot, for each direction; got "
                    f"{jax.tree.structure(numbers)}"
                )


def shapes_of(algorithm: Algorithm, estimator: Estimator, params: PyTree, clients: int) -> Shapes:
    """The shapes of the messages of ``clients`` clients; of ``params`` only shapes and dtypes are read.

    Raises:
      ValueError: a difference whose numbers the ledger has no columns for.
    """
    dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(params)))
    if isinstance(estimator.measure, Probes):
        difference, shape = estimator.measure.difference, (clients, estimator.local_steps, estimator.num_perturbations)
        losses = [jax.ShapeDtypeStruct(shape, dtype)] * len(difference.offsets)
        measured = jax.eval_shape(lambda losses: difference.numbers(losses, 1.0), losses)
        _check_names(measured)
    else:
        measured = jax.tree.map(lambda x: jax.ShapeDtypeStruct((clients, *x.shape), dtype), params)

    def through(messages: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        places = jnp.arange(clients)
        channel = Channel(algorithm, Senders(places, places), jax.random.key(0))
        sent, memory = channel.send(messages), first_memory(algorithm, messages)
        return sent, channel.combine(sent, jnp.ones(clients), memory)[0], memory

    return Shapes(*jax.eval_shape(through, measured))
