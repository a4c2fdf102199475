"""What happens to a round's messages between its clients and its aggregate."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from hiso_jax.fed.algorithm import (
    Algorithm,
    Combine,
    Probes,
    RescaledMean,
    Send,
    Senders,
    StatefulCombine,
    by_number,
    is_separable,
    mean,
)
from hiso_jax.fed.codes import Coded, Relayed, decoded, told
from hiso_jax.fed.keys import combine_key, send_key
from hiso_jax.fed.round.inputs import Estimator
from hiso_jax.fed.wire import Told
from hiso_jax.zo import pin, zo_states


class Channel(NamedTuple):
    """An algorithm's ``send``, ``combine`` and ``wire`` in one round.

    Attributes:
      algorithm: whose.
      senders: the cohort.
      key: the channel key of the round.
      groups: G, into which the cohort is dealt for its directions.
    """

    algorithm: Algorithm
    senders: Senders
    key: Key[Array, ""]
    groups: int = 1

    def send(self, messages: PyTree, first: Int[Array, ""] | int = 0) -> PyTree:
        """What arrives of all messages [C, ...], whose perturbations are numbered from ``first``."""
        for place, send in enumerate(self.algorithm.send):
            key = send_key(self.key, place)
            if self.algorithm.has_scalars and is_separable(send):
                messages = by_number(partial(self._send_one, send), messages, key, first)
            else:
                messages = send(messages, self.senders, key)
        return self.algorithm.wire.encode(messages)

    def _send_one(self, send: Send, numbers: PyTree, key: Key[Array, ""]) -> PyTree:
        return send(numbers, self.senders, key)

    def combine(
        self, messages: PyTree, weights: Float[Array, "C"], memory: PyTree, first: Int[Array, ""] | int = 0
    ) -> tuple[PyTree, PyTree]:
        """What everyone is told of all messages, their aggregate, and what the combiner remembers after it.

        Args:
          messages: [C, ...], as they arrived.
          weights: zero for those that do not count.
          memory: what the combiner remembers.
          first: the number of the first of the perturbations, if they are not all.
        """
        combine, wire = self.algorithm.combine, self.algorithm.wire
        values = decoded(messages)
        weights = weights.astype(jnp.result_type(jnp.float32, *jax.tree.leaves(values)))
        if isinstance(combine, StatefulCombine):
            aggregate, memory = self._remembering(combine, values, weights, memory)
            return wire.encode_aggregate(aggregate), memory
        factors = combine.factors(values, weights) if isinstance(combine, RescaledMean) else None
        rule = mean if isinstance(combine, RescaledMean) else combine
        if rule is mean and wire.relays(messages, self.groups):
            return self._relayed(messages, weights, factors), memory
        if factors is not None:
            values = jax.tree.map(lambda m: pin(m * jnp.expand_dims(factors.astype(m.dtype), range(1, m.ndim))), values)
        return wire.encode_aggregate(self._in_groups(rule, values, weights, first)), memory

    def _remembering(
        self, combine: StatefulCombine, values: PyTree, weights: Float[Array, "C"], memory: PyTree
    ) -> tuple[PyTree, PyTree]:
        # As a branch of a conditional it is compiled apart from what stands around it, so that a resumed run, which
        # makes its memory again from the ledger, has the same bits.
        operands = values, weights, combine_key(self.key), memory
        shapes = jax.eval_shape(combine.combine, *operands)

        def nothing(*_: PyTree) -> tuple[PyTree, PyTree]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[0]), memory

        return lax.cond((weights > 0).any(), combine.combine, nothing, *operands)

    def _combined(
        self, rule: Combine, values: PyTree, weights: Float[Array, "C"], key: Key[Array, ""], first: Array | int
    ) -> PyTree:
        if self.algorithm.has_scalars and is_separable(rule):
            return by_number(lambda numbers, own: rule(numbers, weights, own), values, key, first)
        return rule(values, weights, key)

    def _in_groups(self, rule: Combine, values: PyTree, weights: Float[Array, "C"], first: Array | int) -> PyTree:
        """ĝ_g = (G W_g / W) · combine_g, [K, G·P]: a combiner inside every group; of one group it is plain."""
        groups, key = self.groups, combine_key(self.key)
        if groups == 1:
            return self._combined(rule, values, weights, key, first)
        turns = -(-len(weights) // groups)

        def dealt(x: Array) -> Array:
            whole = jnp.pad(x, [(0, turns * groups - len(x))] + [(0, 0)] * (x.ndim - 1))
            return whole.reshape(turns, groups, *x.shape[1:])

        # Each client in its column, its group; rows that only fill up weigh nothing.
        rows, own = jax.tree.map(dealt, values), dealt(weights)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(groups))
        combined = jax.vmap(lambda v, w, k: self._combined(rule, v, w, k, first), (1, 1, 0))(rows, own, keys)
        total = weights.sum()
        share = pin(groups * own.sum(0) / jnp.where(total > 0, total, 1))

        def joined(each: Array) -> Array:
            scaled = pin(each * jnp.expand_dims(share.astype(each.dtype), (1, 2)))
            return jnp.moveaxis(scaled, 0, 1).reshape(each.shape[1], -1)

        return jax.tree.map(joined, combined)

    def _relayed(self, messages: PyTree, weights: Float[Array, "C"], factors: Float[Array, "C"] | None) -> PyTree:
        """The codes of all clients that count, their steps weighted."""
        valid, total = weights > 0, weights.sum()
        factors = jnp.ones_like(weights) if factors is None else factors
        share = pin(weights * factors * self.groups / jnp.where(total > 0, total, 1))

        def one(message: Coded) -> Relayed:
            step = jnp.where(valid, pin(jnp.asarray(message.step) * share.astype(message.step.dtype)), 0)
            codes = jnp.where(jnp.expand_dims(valid, (1, 2)), message.codes, 0)
            return Relayed(codes, step, valid, message.bits)

        return jax.tree.map(one, messages, is_leaf=lambda node: isinstance(node, Coded))

    def told(self, aggregate: PyTree) -> PyTree:
        """What the server's rule takes: ĝ [K, G·P], or a tree."""
        return told(aggregate, self.groups)

    def relay(self, numbers: PyTree, weights: Float[Array, "C"], index: Int[Array, ""]) -> tuple[PyTree, PyTree]:
        """What arrives of one perturbation's numbers [C] in a round of one local step, and their aggregate [G].

        By the same arithmetic as of all perturbations together, so that the bits are the same.

        Raises:
          ValueError: the algorithm needs whole messages.
        """
        if not self.algorithm.is_separable:
            raise ValueError("numbers can only be relayed one by one if nothing in the algorithm needs whole messages")
        sent = self.send(jax.tree.map(lambda x: x[:, None, None], numbers), index)
        combined, _ = self.combine(sent, weights, (), index)
        return jax.tree.map(lambda x: x[:, 0, 0], sent), jax.tree.map(lambda x: x[0], combined)


def first_memory(algorithm: Algorithm, messages: PyTree) -> PyTree:
    """What the combiner remembers before the first round; ``messages`` are shapes [C, ...]."""
    combine = algorithm.combine
    return combine.init(messages) if isinstance(combine, StatefulCombine) else ()


class Shapes(NamedTuple):
    """The shapes of a round's messages.

    Attributes:
      sent: of all clients, as they arrive, [C, ...].
      aggregate: of what everyone is told of them.
      memory: of what the combiner remembers.
      groups: G.
    """

    sent: PyTree
    aggregate: PyTree
    memory: PyTree
    groups: int

    @property
    def message(self) -> PyTree:
        """Of one client."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.sent)

    def bytes_of(self, algorithm: Algorithm) -> tuple[int, Told]:
        """What a message takes, and what everyone is told of a round."""
        return algorithm.wire.up(self.message), algorithm.wire.down(self.aggregate)


def groups_of(algorithm: Algorithm, params: PyTree, clients: int) -> int:
    """Into how many groups a cohort is dealt for its directions; 1 if there are none.

    Raises:
      ValueError: there are fewer clients than groups, or several groups and a combiner with a memory.
    """
    heads = zo_states(jax.eval_shape(algorithm.optimizer.init, params)) if algorithm.has_scalars else []
    groups = heads[0].directions.groups_of(clients) if heads else 1
    if groups > 1 and isinstance(algorithm.combine, StatefulCombine):
        raise ValueError(f"groups must be 1 for a combiner with a memory, got {groups}")
    return groups


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

    groups = groups_of(algorithm, params, clients)

    def through(messages: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        places = jnp.arange(clients)
        channel = Channel(algorithm, Senders(places, places), jax.random.key(0), groups)
        sent, memory = channel.send(messages), first_memory(algorithm, messages)
        return sent, channel.combine(sent, jnp.ones(clients), memory)[0], memory

    sent, aggregate, memory = jax.eval_shape(through, measured)
    return Shapes(sent, aggregate, memory, groups)
