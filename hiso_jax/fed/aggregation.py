"""The path of a message: what clients do before they send it, and what the server makes of all messages.

:class:`Send` → :class:`Attack` → :class:`~hiso_jax.fed.wire.Wire` → :class:`Clip` → :class:`Combine`: each is a frozen
value that declares what a round must know of it, and ``.into(algorithm)`` adds it to an algorithm.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError
from hiso_jax.zo import pin

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

A = TypeVar("A", bound="DataclassInstance")
"""A :class:`hiso_jax.fed.Algorithm`, which is made of these values and so is defined after them."""

Part = Literal["send", "attack", "rescale", "combine", "wire"]
"""The field of an algorithm that a value of the message path belongs to."""


def _with(algorithm: A, value: Any, **bits: int) -> A:
    """The algorithm with one more ``value`` of the message path, whose numbers travel in so many bits."""
    fields: Any = algorithm
    before = getattr(fields, value.part)
    changes = {value.part: (*before, value) if isinstance(before, tuple) else value}
    if bits:
        changes["wire"] = replace(fields.wire, **bits)
    return replace(algorithm, **changes)


class Senders(NamedTuple):
    """The clients that send.

    Attributes:
      client_ids: their indices in the population, [C].
      places: in the cohort, 0 to C − 1, [C].
      hostile: which of them an attack forges the messages of, [C]; None is nobody.
      honest: which of the others report, [C]; None is all of them.
      groups: G; the client at place c measures along the directions of group c mod G.
    """

    client_ids: Int[Array, "C"]
    places: Int[Array, "C"]
    hostile: Bool[Array, "C"] | None = None
    honest: Bool[Array, "C"] | None = None
    groups: int = 1


class Noise(NamedTuple):
    """Gaussian noise that makes messages or their sum private.

    Its key comes from the run's secret, which no public value reveals. In a simulation one secret stands for those of
    all clients and of the server.

    Attributes:
      clip_norm: S, the length of a whole message to which it is clipped before.
      multiplier: σ, the standard deviation of the noise in units of S.
    """

    clip_norm: float
    multiplier: float


@dataclass(frozen=True)
class Send:
    """One step that clients apply to their messages before they send them.

    Attributes:
      apply: (messages [C, ...], senders, key) → messages.
      separable: whether every number of a message is treated by itself. ``apply`` is then called for one number of all
        clients at a time, a tree of [C] arrays, with a key of its own for each (local step, perturbation), so that a
        round may aggregate a perturbation before the next is measured.
      bits: of each number that it gives; 32 is a float32.
      noise: the private noise that it adds after clipping; None if it adds none.
      label: its description in a ledger, with its numbers; by default the name of ``apply``.
    """

    apply: Callable[[PyTree[Shaped[Array, "C ..."]], Senders, Key[Array, ""]], PyTree[Shaped[Array, "C ..."]]]
    separable: bool = False
    bits: int = 32
    noise: Noise | None = None
    label: str = ""
    part: ClassVar[Part] = "send"

    def into(self, algorithm: A) -> A:
        """The algorithm, whose clients apply this last before they send."""
        return _with(algorithm, self, up_bits=self.bits)


@dataclass(frozen=True)
class Attack(Send):
    """What hostile clients send in place of their messages; the run says which clients are hostile.

    ``apply`` gives, of the messages [C, ...] of all clients, the message that each would send if it were hostile.

    Attributes:
      reads_others: whether a forged message depends on other clients' messages, too. Each forged message then reveals
        the honest ones once more, and the ε of a private run grows by it.
    """

    reads_others: bool = True
    part: ClassVar[Part] = "attack"

    def into(self, algorithm: A) -> A:
        """The algorithm under this attack."""
        return _with(algorithm, self)


@dataclass(frozen=True)
class Clip:
    """The server shortens messages, each by a factor of its own, before it combines them.

    Attributes:
      factors: (messages [C, ...], weights [C]) → factors [C], 1 where a message stays as it is. A weight of 0: its
        message does not count, and may be anything. With ``init`` it takes the memory, too, and returns
        (factors, memory).
      init: the shapes of the messages [C, ...] → the first memory, a tree of arrays; None is no memory. The memory is
        in the run's snapshots; on resume it is advanced from the ledger's messages.
      is_rare: whether it seldom acts: a round then goes ahead as if it did not, and makes Δ again where it does.
      label: its description in a ledger, with its numbers; by default the name of ``factors``.
    """

    factors: Callable[..., Any]
    init: Callable[[PyTree], PyTree] | None = None
    is_rare: bool = False
    label: str = ""
    part: ClassVar[Part] = "rescale"

    def advance(self, messages: PyTree, weights: Float[Array, "C"], memory: PyTree) -> tuple[Float[Array, "C"], PyTree]:
        """(factors, memory), with a memory or without."""
        if self.init is None:
            return self.factors(messages, weights), memory
        return self.factors(messages, weights, memory)

    def into(self, algorithm: A) -> A:
        """The algorithm, whose server applies this last before it combines."""
        return _with(algorithm, self)


@dataclass(frozen=True)
class Combine:
    """How the server makes one aggregate of all messages.

    Attributes:
      apply: (messages [C, ...], weights [C], key) → aggregate [...]. A weight of 0: its message does not count, and may
        be anything. With ``init`` it takes the memory, too, and returns (aggregate, memory). With ``noise`` it gives
        the noised sum, and is called once for all G groups, with messages [C/G, G, ...] and weights [C/G, G]; the
        round divides by the size of a group, which is public where the number of clients that count is not.
      init: the shapes of the messages [C, ...] → the first memory, a tree of arrays; None is no memory. The memory is
        in the run's snapshots; on resume it is advanced from the ledger's messages.
      separable: as of :class:`Send`.
      linear: whether it is the weighted mean, so that sums of parts are enough, and messages of few bits can be relayed
        in place of their aggregate.
      compares: whether it compares clients' numbers with one another and ignores their weights. It needs several
        clients that measure along the same directions, and clients that count alike.
      bits: of each number that it gives; 32 is a float32.
      noise: the private noise that it adds; messages are clipped to its length before, and its aggregate is applied
        and broadcast in every round, also where no client counts. None if it adds none.
      label: its description in a ledger, with its numbers; by default the name of ``apply``.
    """

    apply: Callable[..., PyTree]
    init: Callable[[PyTree], PyTree] | None = None
    separable: bool = False
    linear: bool = False
    compares: bool = False
    bits: int = 32
    noise: Noise | None = None
    label: str = ""
    part: ClassVar[Part] = "combine"

    def __post_init__(self) -> None:
        """Check that its declarations go together."""
        if self.noise is not None and (self.init is not None or self.separable or self.linear):
            raise ParameterError("noise", "must be None for a combiner with a memory, or a separable or linear one")

    def __call__(self, *operands: Any) -> PyTree:
        """``apply`` of the same."""
        return self.apply(*operands)

    def into(self, algorithm: A) -> A:
        """The algorithm, whose messages become one by this."""
        return _with(algorithm, self, down_bits=self.bits)


def by_scalar(
    function: Callable[[PyTree, Key[Array, ""]], PyTree],
    messages: PyTree[Shaped[Array, "C K P"]],
    key: Key[Array, ""],
    first: Int[Array, ""] | int = 0,
) -> PyTree:
    """``function(one number of all clients [C], its key)`` for each local step and perturbation, joined.

    Args:
      function: its outputs [C] or [] become [C, K, P] or [K, P].
      messages: scalars.
      key: folded by the local step, then by the perturbation.
      first: the number of the first of the perturbations, if they are not all.
    """
    leaves = jax.tree.leaves(messages)
    steps, perturbations = leaves[0].shape[1:]
    # One after the other: all at once would be summed in another order than each by itself, and a run that aggregates
    # while its directions go by must make the same bits.
    columns = jax.tree.map(lambda x: x.reshape(len(x), -1).T, messages)

    def one(each: tuple[PyTree, Int[Array, ""]]) -> PyTree:
        column, place = each
        step, index = place // perturbations, first + place % perturbations
        return function(column, jax.random.fold_in(jax.random.fold_in(key, step), index))

    count = steps * perturbations
    # Never a loop of one turn: XLA would dissolve it into what stands around it, and the last bit would part.
    turns = max(count, 2)
    columns = jax.tree.map(lambda x: jnp.pad(x, ((0, turns - count), (0, 0)), mode="edge"), columns)
    made = lax.map(one, (columns, jnp.minimum(jnp.arange(turns), count - 1)))
    return jax.tree.map(lambda x: jnp.moveaxis(x[:count], 0, -1).reshape(*x.shape[1:], steps, perturbations), made)


def _mean(
    messages: PyTree[Shaped[Array, "C ..."]], weights: Float[Array, "C"], key: Key[Array, ""] | None = None
) -> PyTree[Shaped[Array, "..."]]:
    del key
    total = weights.sum()
    divisor = pin(jnp.where(total > 0, total, 1))

    def one(message: Shaped[Array, "C ..."]) -> Shaped[Array, "..."]:
        own = jnp.expand_dims(weights.astype(message.dtype), range(1, message.ndim))
        counted = jnp.where(own > 0, message * own, 0)
        return pin(pin(counted).sum(0) / divisor.astype(message.dtype))

    return jax.tree.map(one, messages)


mean = Combine(_mean, separable=True, linear=True, label="mean")
"""The weighted mean over the clients of positive weight (HiSo, Algorithm 1); zero if there is none."""
