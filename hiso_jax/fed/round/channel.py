"""What happens to a round's messages between its clients and its aggregate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm, Clip, Combine, Send, Senders, by_scalar
from hiso_jax.fed.codes import Coded, Relayed, decoded, received
from hiso_jax.fed.keys import combine_key, send_key
from hiso_jax.fed.norms import shortening
from hiso_jax.zo import pin


class Combined(NamedTuple):
    """What becomes of a round's messages.

    Attributes:
      aggregate: what everyone is told of them.
      memory: what the server remembers of them for later rounds.
      clipped: which of the messages that count were shortened, [C].
    """

    aggregate: PyTree
    memory: PyTree
    clipped: Bool[Array, "C"]


class Memory(NamedTuple):
    """What the server remembers from round to round.

    Attributes:
      combine: of the combiner.
      rescale: of what shortens messages, one after the other.
    """

    combine: PyTree
    rescale: tuple[PyTree, ...]


class Channel(NamedTuple):
    """An algorithm's ``send``, ``attack``, ``rescale``, ``combine`` and ``wire`` in one round.

    Attributes:
      algorithm: whose.
      senders: the cohort, and into how many groups it is dealt for its directions.
      key: the channel key of the round.
      secret: the same of the run's secret, which nothing that is public tells; None if the algorithm needs none.
    """

    algorithm: Algorithm
    senders: Senders
    key: Key[Array, ""]
    secret: Key[Array, ""] | None = None

    @property
    def groups(self) -> int:
        """G, into which the cohort is dealt."""
        return self.senders.groups

    def send(self, messages: PyTree, first: Int[Array, ""] | int = 0) -> PyTree:
        """What arrives of all messages [C, ...], whose perturbations are numbered from ``first``."""
        known = messages
        for place, send in enumerate(self.algorithm.send):
            key = send_key(self.key if send.noise is None else self._private_key(), place)
            messages = self._sent(send, messages, key, first)
            if send.noise is not None and self.senders.hostile is not None:
                # No other client sees a message before its noise is drawn: hostile clients know the noised ones.
                known = _where(self.senders.hostile, known, messages)
        return self.algorithm.wire.encode(self._forged(known, messages, first))

    def _private_key(self) -> Key[Array, ""]:
        if self.secret is None:
            raise ParameterError("secret", "must be given for an algorithm that draws noise in private")
        return self.secret

    def _sent(self, send: Send, messages: PyTree, key: Key[Array, ""], first: Int[Array, ""] | int) -> PyTree:
        if self.algorithm.has_scalars and send.separable:
            return by_scalar(lambda numbers, own: send.apply(numbers, self.senders, own), messages, key, first)
        return send.apply(messages, self.senders, key)

    def _forged(self, known: PyTree, messages: PyTree, first: Int[Array, ""] | int) -> PyTree:
        """The messages; hostile clients forge theirs from ``known`` and skip the channels of honest ones."""
        attack, hostile, sends = self.algorithm.attack, self.senders.hostile, self.algorithm.send
        if attack is None or hostile is None:
            return messages
        made = self._sent(attack, known, send_key(self.key, len(sends)), first)
        # But in how few bits a number goes is the wire's, and binds whoever sends.
        narrow = [(place, send) for place, send in enumerate(sends) if send.bits < 32]
        for place, send in narrow[-1:]:
            made = self._sent(send, made, send_key(self.key, place), first)
        return _where(hostile, made, messages)

    def combine(self, messages: PyTree, weights: Float[Array, "C"], memory: PyTree) -> Combined:
        """What everyone is told of all messages.

        Args:
          messages: [C, ...], as they arrived.
          weights: zero for those that do not count.
          memory: what the server remembers.
        """
        combine, values = self.algorithm.combine, decoded(messages)
        weights = weights.astype(jnp.result_type(jnp.float32, *jax.tree.leaves(values)))
        factors, states, shortened = None, [], values
        for clip, state in zip(_clips(self.algorithm), memory.rescale, strict=True):
            own, state = clip.advance(shortened, weights, state)
            states.append(state)
            factors = own if factors is None else pin(factors * own)
            shortened = _times(values, factors)
        clipped = (weights > 0) & (False if factors is None else factors < 1)
        remembered = memory.combine
        if combine.init is None:
            aggregate = self._aggregate(messages, shortened, weights, factors, 0)
        else:
            made, remembered = self._remembering(combine, shortened, weights, memory.combine)
            aggregate = self.algorithm.wire.encode_aggregate(made)
        return Combined(aggregate, Memory(remembered, tuple(states)), clipped)

    def _aggregate(
        self,
        messages: PyTree,
        values: PyTree,
        weights: Float[Array, "C"],
        factors: Float[Array, "C"] | None,
        first: Int[Array, ""] | int,
    ) -> PyTree:
        """What everyone is told of messages whose numbers, shortened by ``factors``, are ``values``."""
        combine, wire = self.algorithm.combine, self.algorithm.wire
        if combine.linear and wire.relays(messages, self.groups):
            return self._relayed(messages, weights, factors)
        if combine.noise is not None:
            return wire.encode_aggregate(self._noised(combine, values, weights))
        return wire.encode_aggregate(self._in_groups(combine, values, weights, first))

    def _noised(self, combine: Combine, values: PyTree, weights: Float[Array, "C"]) -> PyTree:
        """The noised mean, [K, G·P] or a tree; weights only say which clients count."""
        key, clients = combine_key(self._private_key()), len(weights)
        rows, own = jax.tree.map(self._rows, values), self._rows(weights)
        sums = combine.apply(rows, own, key)
        return jax.tree.map(lambda each: self._side_by_side(each * (self.groups / clients)), sums)

    def _rows(self, x: Shaped[Array, "C ..."]) -> Shaped[Array, "turns G ..."]:
        """Each client in the column of its group; rows that only fill up are zeros, and weigh nothing."""
        turns = -(-len(x) // self.groups)
        filled = jnp.pad(x, [(0, turns * self.groups - len(x))] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(turns, self.groups, *x.shape[1:])

    def _side_by_side(self, each: Shaped[Array, "G ..."]) -> Shaped[Array, "..."]:
        """[G, K, P] as [K, G·P]; that of a single group as it is."""
        return each[0] if self.groups == 1 else jnp.moveaxis(each, 0, 1).reshape(each.shape[1], -1)

    def _remembering(
        self, combine: Combine, values: PyTree, weights: Float[Array, "C"], memory: PyTree
    ) -> tuple[PyTree, PyTree]:
        # As a branch of a conditional it is compiled apart from what stands around it, so that a resumed run, which
        # makes its memory again from the ledger, has the same bits.
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
        """ĝ_g = (G W_g / W) · combine_g, [K, G·P]: a combiner inside every group; of one group it is plain."""
        groups, key = self.groups, combine_key(self.key)
        if groups == 1:
            return self._combined(combine, values, weights, key, first)
        rows, own = jax.tree.map(self._rows, values), self._rows(weights)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(groups))
        combined = jax.vmap(lambda v, w, k: self._combined(combine, v, w, k, first), (1, 1, 0))(rows, own, keys)
        total = weights.sum()
        share = pin(groups * own.sum(0) / jnp.where(total > 0, total, 1))

        def weighted(each: Array) -> Array:
            return self._side_by_side(pin(each * jnp.expand_dims(share.astype(each.dtype), (1, 2))))

        return jax.tree.map(weighted, combined)

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

    def received(self, aggregate: PyTree) -> PyTree:
        """What the server's rule takes: ĝ [K, G·P], or a tree."""
        return received(aggregate, self.groups)

    def relay(self, numbers: PyTree, weights: Float[Array, "C"], index: Int[Array, ""]) -> tuple[PyTree, PyTree]:
        """What arrives of one perturbation's numbers [C] in a round of one local step, and their aggregate [G].

        By the same arithmetic as of all perturbations together, so that the bits are the same, if none is shortened.

        Raises:
          ValueError: the algorithm needs whole messages.
        """
        if not self.algorithm.is_separable:
            raise ValueError("numbers can only be relayed one by one if nothing in the algorithm needs whole messages")
        sent = self.send(jax.tree.map(lambda x: x[:, None, None], numbers), index)
        values = decoded(sent)
        weights = weights.astype(jnp.result_type(jnp.float32, *jax.tree.leaves(values)))
        combined = self._aggregate(sent, values, weights, None, index)
        return jax.tree.map(lambda x: x[:, 0, 0], sent), jax.tree.map(lambda x: x[0], combined)


def _where(clients: Bool[Array, "C"], messages: PyTree, others: PyTree) -> PyTree:
    """The ``messages`` of some clients, and the others' of the rest, in the dtypes of these."""
    return jax.tree.map(
        lambda own, other: jnp.where(jnp.expand_dims(clients, range(1, other.ndim)), own.astype(other.dtype), other),
        messages,
        others,
    )


def _scaled(message: Float[Array, "C ..."], factors: Float[Array, "C"]) -> Float[Array, "C ..."]:
    # Not 1 times a message: what is not shortened keeps its bits, and its infinities.
    own = jnp.expand_dims(factors.astype(message.dtype), range(1, message.ndim))
    return jnp.where(own < 1, pin(message * own), message)


def _times(values: PyTree, factors: Float[Array, "C"]) -> PyTree:
    return jax.tree.map(lambda message: _scaled(message, factors), values)


def _clips(algorithm: Algorithm) -> tuple[Clip, ...]:
    """What shortens messages: the algorithm's own, or the clipping that a private mean is calibrated to."""
    noise = algorithm.combine.noise
    if noise is None:
        return algorithm.rescale
    return (Clip(lambda messages, weights: shortening(messages, weights > 0, noise.clip_norm)),)


def first_memory(algorithm: Algorithm, messages: PyTree) -> Memory:
    """The server's memory before the first round; ``messages`` are shapes [C, ...]."""
    combine = algorithm.combine
    return Memory(
        () if combine.init is None else combine.init(messages),
        tuple(() if clip.init is None else clip.init(messages) for clip in _clips(algorithm)),
    )
