"""The wire: the encoding of messages and aggregates, and their bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import jax
from jaxtyping import Array, Float, PyTree

from hiso_jax.checks import ParameterError, integer
from hiso_jax.fed.codes import Coded, Relayed, is_coded, packed_size, quantise

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

A = TypeVar("A", bound="DataclassInstance")
BITS = (1, 2, 4, 8, 32)
AGGREGATE_BITS = (4, 8, 32)
DEFAULT_BYTES_UP = 20
# The bytes of a group's share of a round's weight.
SHARE_BYTES = 4
Relay = Literal["messages", "aggregate"]


@dataclass(frozen=True)
class BroadcastBytes:
    """The bytes that the server broadcasts for a round.

    Attributes:
      fixed: bytes of every round.
      each: additional bytes for each valid client.
      clients: the clients of a cohort.
    """

    fixed: int
    each: int = 0
    clients: int = 0

    @property
    def most(self) -> int:
        """The bytes if all clients are valid."""
        return self.fixed + self.clients * self.each


def _bytes(tree: PyTree, bits: int) -> int:
    return -(-sum(leaf.size for leaf in jax.tree.leaves(tree)) * bits // 8)


@dataclass(frozen=True)
class Wire:
    """The encoding of messages and aggregates. This class sends them unchanged.

    Attributes:
      up_bits: bits of a value in a client's message.
      down_bits: bits of a value in the broadcast aggregate.
    """

    up_bits: int = 32
    down_bits: int = 32
    is_coded: ClassVar[bool] = False
    """Whether scalars are sent as codes and one step."""
    part: ClassVar[Literal["wire"]] = "wire"

    def into(self, algorithm: A) -> A:
        """The algorithm with this as its wire."""
        return replace(algorithm, wire=self)

    @property
    def is_exact(self) -> bool:
        """Whether every value arrives unchanged, and so may be sent separately."""
        return True

    @property
    def must_relay(self) -> bool:
        """Whether the server may broadcast only the clients' messages, not their aggregate."""
        return False

    @property
    def description(self) -> list[Any]:
        """Its entry in a ledger."""
        return [self.up_bits, self.down_bits]

    def encode(self, messages: PyTree) -> PyTree:
        """Encode messages [C, ...] as clients send them."""
        return messages

    def relays(self, messages: PyTree, groups: int) -> bool:
        """Whether the server broadcasts the codes of all clients instead of their aggregate."""
        return False

    def encode_aggregate(self, aggregate: PyTree) -> PyTree:
        """Encode an aggregate as the server broadcasts and applies it."""
        return aggregate

    def up(self, message: PyTree) -> int:
        """The bytes of one client's message of these shapes."""

        def one(node: Any) -> int:
            if isinstance(node, Coded):
                return node.step.dtype.itemsize + packed_size(math.prod(node.codes.shape), node.bits)
            return 0

        nodes = jax.tree.leaves(message, is_leaf=is_coded)
        return sum(map(one, nodes)) + _bytes([n for n in nodes if not is_coded(n)], self.up_bits)

    def down(self, aggregate: PyTree, groups: int = 1) -> BroadcastBytes:
        """The bytes of an aggregate of these shapes, with ``groups`` groups of directions.

        A combiner with outputs of few bits runs inside each group. Each group then also has a float32, its share of the
        round's weight, because the number of clients that count differs between groups.
        """
        nodes = jax.tree.leaves(aggregate, is_leaf=is_coded)
        relayed = [node for node in nodes if isinstance(node, Relayed)]
        if not relayed:
            coded = [node for node in nodes if isinstance(node, Coded)]
            plain = [node for node in nodes if not is_coded(node)]
            shares = SHARE_BYTES * groups if plain and groups > 1 and self.down_bits < 32 else 0
            return BroadcastBytes(self.up(coded) + _bytes(plain, self.down_bits) + shares)
        clients = len(relayed[0].step)
        each = [n.step.dtype.itemsize + packed_size(math.prod(n.codes.shape[1:]), n.bits) for n in relayed]
        # The mask of the valid clients, and the codes of these clients.
        return BroadcastBytes(-(-clients // 8), sum(each), clients)


float32 = Wire()


@dataclass(frozen=True)
class FewBits(Wire):
    """Scalars in few bits, up and down.

    Attributes:
      scalar_bits: b, the bits of a scalar in a client's message: 1, 2, 4, 8, or 32 for floats without a step; None is
        the most that ``bytes_up`` allows.
      bytes_up: the most bytes of a message.
      aggregate_bits: the bits of a scalar in an aggregate: 4, 8, or 32 for floats.
      relay: the broadcast, the clients' "messages" or their "aggregate"; None is the smaller if clients have separate
        directions, and the aggregate if they share directions. Relayed messages show every client's scalars to all
        clients, which excludes secure aggregation, where the server learns only the sum.

    Raises:
      ValueError: a value is out of range, both or neither of ``scalar_bits`` and ``bytes_up`` are given, or
        ``aggregate_bits`` is set although messages are relayed.
    """

    scalar_bits: int | None = None
    bytes_up: int | None = None
    aggregate_bits: int = 32
    relay: Relay | None = None
    is_coded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check every range."""
        if self.scalar_bits is None and self.bytes_up is None:
            raise ParameterError("scalar_bits", "must be given, or `bytes_up`")
        if self.scalar_bits is not None and self.bytes_up is not None:
            raise ParameterError("scalar_bits", "must not be given beside `bytes_up`, which decides them")
        if self.scalar_bits not in (None, *BITS):
            raise ParameterError("scalar_bits", f"must be one of {', '.join(map(str, BITS))}, got {self.scalar_bits}")
        if self.bytes_up is not None:
            integer("bytes_up", self.bytes_up, 1)
        if self.aggregate_bits not in AGGREGATE_BITS:
            allowed = ", ".join(map(str, AGGREGATE_BITS))
            raise ParameterError("aggregate_bits", f"must be one of {allowed}, got {self.aggregate_bits}")
        if self.relay not in (None, "messages", "aggregate"):
            raise ParameterError("relay", f"must be messages or aggregate, got {self.relay!r}")
        if self.relay == "messages" and self.aggregate_bits != 32:
            raise ParameterError(
                "aggregate_bits",
                f"must be 32 with relay messages, because no aggregate is broadcast, got {self.aggregate_bits}",
            )
        if self.relay == "messages" and self.scalar_bits == 32:
            raise ParameterError("relay", "must be aggregate for scalars of 32 bits: relaying messages saves no bytes")

    @property
    def is_exact(self) -> bool:
        """Whether scalars are floats up and down: the step of coded scalars is known only after the entire message."""
        return self.scalar_bits == 32 and self.aggregate_bits == 32

    @property
    def must_relay(self) -> bool:
        """Whether the server may broadcast only the clients' messages, not their aggregate."""
        return self.relay == "messages"

    @property
    def description(self) -> list[Any]:
        """Its entry in a ledger."""
        return ["few bits", self.scalar_bits, self.bytes_up, self.aggregate_bits, self.relay]

    def bits_of(self, counts: int | Sequence[int], itemsize: int = 4) -> int:
        """The bits b of every scalar of a message.

        Args:
          counts: the number of scalars; a list, one for each part, if a direction has several estimates.
          itemsize: the bytes of a float of a part, and of a part's step.

        Raises:
          ValueError: even one bit for each scalar exceeds ``bytes_up``.
        """
        if self.scalar_bits is not None:
            return self.scalar_bits
        assert self.bytes_up is not None

        counts = [counts] if isinstance(counts, int) else counts

        def size(bits: int) -> int:
            each = [itemsize * count if bits == 32 else packed_size(count, bits) + itemsize for count in counts]
            return sum(each)

        for bits in reversed(BITS):
            if size(bits) <= self.bytes_up:
                return bits
        raise ParameterError(
            "bytes_up", f"must be at least {size(1)} for {sum(counts)} scalars a message, got {self.bytes_up}"
        )

    def encode(self, messages: PyTree[Float[Array, "C K P"]]) -> PyTree:
        """Encode messages [C, K, P], or a tree of them if a direction has several estimates, as clients send them."""
        parts = jax.tree.leaves(messages)
        counts = [math.prod(part.shape[1:]) for part in parts]
        bits = self.bits_of(counts, max(part.dtype.itemsize for part in parts))
        return messages if bits == 32 else jax.tree.map(lambda part: quantise(part, bits), messages)

    def relays(self, messages: PyTree, groups: int) -> bool:
        """Whether the server broadcasts the codes of all clients instead of their aggregate."""
        nodes = jax.tree.leaves(messages, is_leaf=is_coded)
        if not all(isinstance(node, Coded) for node in nodes) or self.relay == "aggregate":
            return False
        if self.relay == "messages":
            return True
        clients, steps, perturbations = nodes[0].codes.shape
        each = nodes[0].step.dtype.itemsize + packed_size(steps * perturbations, nodes[0].bits)
        aggregate = packed_size(groups * steps * perturbations, self.aggregate_bits)
        return groups > 1 and self.aggregate_bits == 32 and -(-clients // 8) + clients * each < aggregate

    def encode_aggregate(self, aggregate: PyTree) -> PyTree:
        """Encode an aggregate [K, G·P] as the server broadcasts and applies it."""
        if self.aggregate_bits == 32:
            return aggregate

        def one(numbers: Float[Array, "K GP"]) -> Coded:
            coded = quantise(numbers[None], self.aggregate_bits)
            return Coded(coded.codes[0], coded.step[0], coded.bits)

        return jax.tree.map(one, aggregate)
