"""The message path of a round, from the clients' messages to the aggregate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm, Clip, Combine, Send, Senders, by_scalar
from hiso_jax.fed.codes import Coded, Relayed, decoded, received
from hiso_jax.fed.keys import combine_key, send_key
from hiso_jax.fed.norms import lengths, middle, shortening
from hiso_jax.zo import fold_in, pin


class Combined(NamedTuple):
    """The result of combining a round's messages.

    Attributes:
      aggregate: the aggregate that the server broadcasts.
      memory: the server's memory for later rounds.
      clipped: mask of the messages that count and were clipped, [C].
    """

    aggregate: PyTree
    memory: PyTree
    clipped: Bool[Array, "C"]


class Memory(NamedTuple):
    """The server's memory from round to round.

    Attributes:
      combine: the memory of the combiner.
      rescale: the memories of the clippings, in order.
    """

    combine: PyTree
    rescale: tuple[PyTree, ...]


class Channel(NamedTuple):
    """An algorithm's ``send``, ``attack``, ``rescale``, ``combine`` and ``wire`` in one round.

    Attributes:
      algorithm: the algorithm.
      senders: the cohort and its number of groups of directions.
      key: the channel key of the round.
      secret: the channel key of the round from the run's secret, which no public value reveals; None if the algorithm
        needs no secret.
    """

    algorithm: Algorithm
    senders: Senders
    key: Key[Array, ""]
    secret: Key[Array, ""] | None = None

    @property
    def groups(self) -> int:
        """G, the number of groups of directions in the cohort."""
        return self.senders.groups

    def send(self, messages: PyTree, first: Int[Array, ""] | int = 0) -> PyTree:
        """The messages [C, ...] as they arrive at the server; ``first`` is the index of their first perturbation."""
        known = messages
        for place, send in enumerate(self.algorithm.send):
            key = send_key(self.key if send.noise is None else self._private_key(), place)
            messages = self._sent(send, messages, key, first)
            if send.noise is not None and self.senders.hostile is not None:
                # Hostile clients know other clients' messages only with noise: the noise is added before sending.
                known = _where(self.senders.hostile, known, messages)
        return self.algorithm.wire.encode(self._forged(known, messages, first))

    def _private_key(self) -> Key[Array, ""]:
        if self.secret is None:
            raise ParameterError("secret", "must be given for an algorithm that adds private noise")
        return self.secret

    def _sent(self, send: Send, messages: PyTree, key: Key[Array, ""], first: Int[Array, ""] | int) -> PyTree:
        if self.algorithm.has_scalars and send.separable:
            return by_scalar(lambda numbers, own: send.apply(numbers, self.senders, own), messages, key, first)
        return send.apply(messages, self.senders, key)

    def _forged(self, known: PyTree, messages: PyTree, first: Int[Array, ""] | int) -> PyTree:
        """Replace hostile clients' messages by forgeries from ``known``, which skip the channels of honest clients."""
        attack, hostile, sends = self.algorithm.attack, self.senders.hostile, self.algorithm.send
        if attack is None or hostile is None:
            return messages
        made = self._sent(attack, known, send_key(self.key, len(sends)), first)
        # The bits of a value are fixed by the wire, so hostile clients quantise, too.
        narrow = [(place, send) for place, send in enumerate(sends) if send.bits < 32]
        for place, send in narrow[-1:]:
            made = self._sent(send, made, send_key(self.key, place), first)
        return _where(hostile, made, messages)

    def combine(
        self,
        messages: PyTree,
        weights: Float[Array, "C"],
        memory: PyTree,
        discounts: Float[Array, "C"] | None = None,
    ) -> Combined:
        """Clip and combine all messages into the aggregate that the server broadcasts.

        Args:
          messages: the messages as they arrived, [C, ...].
          weights: the clients' weights, zero for messages that do not count.
          memory: the server's memory.
          discounts: a factor on each message, which does not change its weight; None is 1.
        """
        combine, values = self.algorithm.combine, decoded(messages)
        weights = weights.astype(jnp.result_type(jnp.float32, *jax.tree.leaves(values)))
        scales = self._scales(values, weights) if discounts is None else discounts
        if scales is not None:
            values = _times(values, scales, clips=False)
        factors, states, shortened = None, [], values
        for clip, state in zip(_clips(self.algorithm), memory.rescale, strict=True):
            own, state = clip.advance(shortened, weights, state)
            states.append(state)
            factors = own if factors is None else pin(factors * own)
            shortened = _times(values, factors)
        clipped = (weights > 0) & (False if factors is None else factors < 1)
        remembered = memory.combine
        if combine.init is None:
            # A scale is a weight: it is no clipping.
            both = factors if scales is None else scales if factors is None else pin(scales * factors)
            aggregate = self._aggregate(messages, shortened, weights, both, 0)
        else:
            made, remembered = self._remembering(combine, shortened, weights, memory.combine)
            aggregate = self.algorithm.wire.encode_aggregate(made)
        return Combined(aggregate, Memory(remembered, tuple(states)), clipped)

    def _scales(self, values: PyTree, weights: Float[Array, "C"]) -> Float[Array, "C"] | None:
        """γ for the messages of finite differences and 1 for the others; None if nobody's messages are scaled.

        γ is the ratio of the median lengths of the two kinds, at most 1, or 1 if one of them is missing. A larger ratio
        would let one short message of finite differences, hostile or not, make the others of its kind decide the round.
        """
        probing, counts = self.senders.probing, weights > 0
        if probing is None:
            return None
        own = lengths(values, counts)
        wanted, found = middle(own, counts & ~probing), middle(own, counts & probing)
        known = jnp.isfinite(wanted) & jnp.isfinite(found)
        ratio = pin(jnp.minimum(jnp.where(known, wanted, 1) / jnp.where(known, found, 1), 1))
        return jnp.where(probing, ratio, 1)

    def _aggregate(
        self,
        messages: PyTree,
        values: PyTree,
        weights: Float[Array, "C"],
        factors: Float[Array, "C"] | None,
        first: Int[Array, ""] | int,
    ) -> PyTree:
        """The broadcast aggregate of messages whose scalars, decoded and clipped by ``factors``, are ``values``."""
        combine, wire = self.algorithm.combine, self.algorithm.wire
        if combine.linear and wire.relays(messages, self.groups):
            return self._relayed(messages, weights, factors)
        if combine.noise is not None:
            return wire.encode_aggregate(self._noised(combine, values, weights))
        return wire.encode_aggregate(self._in_groups(combine, values, weights, first))

    def _noised(self, combine: Combine, values: PyTree, weights: Float[Array, "C"]) -> PyTree:
        """The noised mean, [K, G·P] or a tree; weights only indicate which clients count."""
        key, clients = combine_key(self._private_key()), len(weights)
        rows, own = jax.tree.map(self._rows, values), self._rows(weights)
        sums = combine.apply(rows, own, key)
        return jax.tree.map(lambda each: self._side_by_side(each * (self.groups / clients)), sums)

    def _rows(self, x: Shaped[Array, "C ..."]) -> Shaped[Array, "turns G ..."]:
        """Arrange clients so that each is in the column of its group; padding is zeros and has no weight."""
        turns = -(-len(x) // self.groups)
        filled = jnp.pad(x, [(0, turns * self.groups - len(x))] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(turns, self.groups, *x.shape[1:])

    def _side_by_side(self, each: Shaped[Array, "G ..."]) -> Shaped[Array, "..."]:
        """Reshape [G, K, P] to [K, G·P]; for a single group, drop the axis G."""
        return each[0] if self.groups == 1 else jnp.moveaxis(each, 0, 1).reshape(each.shape[1], -1)

    def _remembering(
        self, combine: Combine, values: PyTree, weights: Float[Array, "C"], memory: PyTree
    ) -> tuple[PyTree, PyTree]:
        # A branch of a conditional is compiled apart from the surrounding code, so that a resumed run, which recomputes
        # its memory from the ledger, has the same bits.
        operands = values, weights, combine_key(self.key), memory
        shapes = jax.eval_shape(combine.apply, *operands)

        def nothing(*_: PyTree) -> tuple[PyTree, PyTree]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[0]), memory

        return lax.cond((weights > 0).any(), combine.apply, nothing, *operands)

    def _combined(
        self, combine: Combine, values: PyTree, weights: Float[Array, "C"], key: Key[Array, ""], first: Array | int
    ) -> PyTree:
        if self.algorithm.has_scalars and combine.separable:
            return by_scalar(lambda numbers, own: combine.apply(numbers, weights, own), values, key, first)
        return combine.apply(values, weights, key)

    def _in_groups(self, combine: Combine, values: PyTree, weights: Float[Array, "C"], first: Array | int) -> PyTree:
        """Combine inside every group: ĝ_g = (G W_g / W) · combine_g, [K, G·P]; a single group needs no factor."""
        groups, key = self.groups, combine_key(self.key)
        if groups == 1:
            return self._combined(combine, values, weights, key, first)
        rows, own = jax.tree.map(self._rows, values), self._rows(weights)
        keys = jax.vmap(fold_in, (None, 0))(key, jnp.arange(groups))
        combined = jax.vmap(lambda v, w, k: self._combined(combine, v, w, k, first), (1, 1, 0))(rows, own, keys)
        total = weights.sum()
        share = pin(groups * own.sum(0) / jnp.where(total > 0, total, 1))

        def weighted(each: Array) -> Array:
            return self._side_by_side(pin(each * jnp.expand_dims(share.astype(each.dtype), (1, 2))))

        return jax.tree.map(weighted, combined)

    def _relayed(self, messages: PyTree, weights: Float[Array, "C"], factors: Float[Array, "C"] | None) -> PyTree:
        """The codes of all clients that count, with weighted steps."""
        valid, total = weights > 0, weights.sum()
        factors = jnp.ones_like(weights) if factors is None else factors
        share = pin(weights * factors * self.groups / jnp.where(total > 0, total, 1))

        def one(message: Coded) -> Relayed:
            step = jnp.where(valid, pin(jnp.asarray(message.step) * share.astype(message.step.dtype)), 0)
            codes = jnp.where(jnp.expand_dims(valid, (1, 2)), message.codes, 0)
            return Relayed(codes, step, valid, message.bits)

        return jax.tree.map(one, messages, is_leaf=lambda node: isinstance(node, Coded))

    def received(self, aggregate: PyTree) -> PyTree:
        """The optimizer's input, decoded from a broadcast aggregate: ĝ [K, G·P], or a tree."""
        return received(aggregate, self.groups)

    def relay(self, numbers: PyTree, weights: Float[Array, "C"], index: Int[Array, ""]) -> tuple[PyTree, PyTree]:
        """Send one perturbation's scalars [C] in a round of one local step, and aggregate them.

        The arithmetic is that of all perturbations together, so the bits are the same unless a message is clipped.

        Returns:
          The scalars [C] as they arrive, and their aggregate [G].

        Raises:
          ValueError: the algorithm needs complete messages.
        """
        if not self.algorithm.is_separable:
            raise ValueError("the algorithm needs complete messages, so scalars cannot be relayed one by one")
        sent = self.send(jax.tree.map(lambda x: x[:, None, None], numbers), index)
        values = decoded(sent)
        weights = weights.astype(jnp.result_type(jnp.float32, *jax.tree.leaves(values)))
        combined = self._aggregate(sent, values, weights, None, index)
        return jax.tree.map(lambda x: x[:, 0, 0], sent), jax.tree.map(lambda x: x[0], combined)


def _where(clients: Bool[Array, "C"], messages: PyTree, others: PyTree) -> PyTree:
    """``messages`` for the clients of a mask and ``others`` for the rest, in the dtypes of ``others``."""
    return jax.tree.map(
        lambda own, other: jnp.where(jnp.expand_dims(clients, range(1, other.ndim)), own.astype(other.dtype), other),
        messages,
        others,
    )


def _times(values: PyTree, factors: Float[Array, "C"], *, clips: bool = True) -> PyTree:
    """The messages times the clients' factors, which are at most 1 if they clip.

    A message with factor 1 keeps its bits and its infinities.
    """

    def scaled(message: Float[Array, "C ..."]) -> Float[Array, "C ..."]:
        own = jnp.expand_dims(factors.astype(message.dtype), range(1, message.ndim))
        return jnp.where(own < 1 if clips else own != 1, pin(message * own), message)

    return jax.tree.map(scaled, values)


def _clips(algorithm: Algorithm) -> tuple[Clip, ...]:
    """The clippings: those of the algorithm, or the clipping to the norm for which a private mean's noise is set."""
    noise = algorithm.combine.noise
    if noise is None:
        return algorithm.rescale
    return (Clip(lambda messages, weights: shortening(messages, weights > 0, noise.clip_norm)),)


def first_memory(algorithm: Algorithm, messages: PyTree) -> Memory:
    """The server's memory before the first round; ``messages`` are the shapes [C, ...] of the messages."""
    combine = algorithm.combine
    return Memory(
        () if combine.init is None else combine.init(messages),
        tuple(() if clip.init is None else clip.init(messages) for clip in _clips(algorithm)),
    )
