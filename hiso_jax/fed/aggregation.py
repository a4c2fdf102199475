"""The message path: the steps from a client's measurement to the server's aggregate.

:class:`Send` → :class:`Attack` → :class:`~hiso_jax.fed.wire.Wire` → :class:`Clip` → :class:`Combine`. Each step is a
frozen value that declares the properties a round needs, and ``.into(algorithm)`` adds it to an algorithm.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError
from hiso_jax.renamed import successor
from hiso_jax.zo import fold_in, pin

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

A = TypeVar("A", bound="DataclassInstance")
"""A :class:`hiso_jax.fed.Algorithm`. It contains these values, so it is defined after them."""

Part = Literal["send", "attack", "rescale", "combine", "wire"]
"""The field of an algorithm that a value of the message path belongs to."""


def _with(algorithm: A, value: Any, **bits: int) -> A:
    """The algorithm with ``value`` added to its message path; ``bits`` replace fields of its wire."""
    fields: Any = algorithm
    before = getattr(fields, value.part)
    changes = {value.part: (*before, value) if isinstance(before, tuple) else value}
    if bits:
        changes["wire"] = replace(fields.wire, **bits)
    return replace(algorithm, **changes)


class Senders(NamedTuple):
    """The clients that send.

    Attributes:
      client_ids: their ids in the population, [C].
      places: their places in the cohort, 0 to C − 1, [C].
      hostile: mask of the clients whose messages the attack forges, [C]; None is no client.
      honest: mask of the other clients that report, [C]; None is all of them.
      groups: G; the client at place c measures along the directions of group c mod G.
      probing: mask of the clients whose messages the server scales to the length of the others', [C]; None is no
        client.
    """

    client_ids: Int[Array, "C"]
    places: Int[Array, "C"]
    hostile: Bool[Array, "C"] | None = None
    honest: Bool[Array, "C"] | None = None
    groups: int = 1
    probing: Bool[Array, "C"] | None = None

    def __getattr__(self, name: str) -> Any:
        """Attributes of earlier releases answer with their successors."""
        raise successor("hiso_jax.fed.Senders", name)


class Noise(NamedTuple):
    """Gaussian noise that makes messages or their sum private.

    Its key comes from the run's secret, which no public value reveals. In a simulation, one secret stands for the
    secrets of all clients and of the server.

    Attributes:
      clip_norm: S, the Euclidean norm to which a complete message is clipped before the noise is added.
      multiplier: σ, the standard deviation of the noise in units of S.
    """

    clip_norm: float
    multiplier: float


@dataclass(frozen=True)
class Send:
    """One step that clients apply to their messages before they send them.

    Attributes:
      apply: (messages [C, ...], senders, key) → messages.
      separable: whether ``apply`` treats every scalar of a message independently. It is then called with one scalar of
        every client at a time, a tree of [C] arrays, and a separate key for each (local step, perturbation), so that a
        round may aggregate a perturbation before the next is measured.
      bits: bits of each value that it returns; 32 is a float32.
      noise: the private noise that it adds after clipping; None if it adds none.
      label: its description in a ledger, with its option values; by default the name of ``apply``.
    """

    apply: Callable[[PyTree[Shaped[Array, "C ..."]], Senders, Key[Array, ""]], PyTree[Shaped[Array, "C ..."]]]
    separable: bool = False
    bits: int = 32
    noise: Noise | None = None
    label: str = ""
    part: ClassVar[Part] = "send"

    def into(self, algorithm: A) -> A:
        """The algorithm with this as the last step that clients apply before they send."""
        return _with(algorithm, self, up_bits=self.bits)


@dataclass(frozen=True)
class Attack(Send):
    """The messages that hostile clients send in place of their own; the run says which clients are hostile.

    ``apply`` maps the messages [C, ...] of all clients to the message that each client would send if it were hostile.

    Attributes:
      reads_others: whether a forged message also depends on other clients' messages. Each forged message then reveals
        the honest messages once more, which increases the ε of a private run.
    """

    reads_others: bool = True
    part: ClassVar[Part] = "attack"

    def into(self, algorithm: A) -> A:
        """The algorithm under this attack."""
        return _with(algorithm, self)


@dataclass(frozen=True)
class Clip:
    """Server-side clipping: scales each message by its own factor before the messages are combined.

    Attributes:
      factors: (messages [C, ...], weights [C]) → factors [C], 1 where a message is not clipped. A message of weight 0
        does not count and may hold any values. With ``init``, ``factors`` also takes the memory and returns
        (factors, memory).
      init: the shapes of the messages [C, ...] → the initial memory, a tree of arrays; None is no memory. The memory
        is in the run's snapshots; on resume it is advanced with the ledger's messages.
      is_rare: whether it seldom clips: a round then assumes that it does not, and recomputes Δ where it does.
      label: its description in a ledger, with its option values; by default the name of ``factors``.
    """

    factors: Callable[..., Any]
    init: Callable[[PyTree], PyTree] | None = None
    is_rare: bool = False
    label: str = ""
    part: ClassVar[Part] = "rescale"

    def advance(self, messages: PyTree, weights: Float[Array, "C"], memory: PyTree) -> tuple[Float[Array, "C"], PyTree]:
        """Compute (factors, memory); without ``init`` the memory is returned unchanged."""
        if self.init is None:
            return self.factors(messages, weights), memory
        return self.factors(messages, weights, memory)

    def into(self, algorithm: A) -> A:
        """The algorithm with this as the last clipping before its server combines."""
        return _with(algorithm, self)


@dataclass(frozen=True)
class Combine:
    """A combiner: the function with which the server combines all messages into one aggregate.

    Attributes:
      apply: (messages [C, ...], weights [C], key) → aggregate [...]. A message of weight 0 does not count and may hold
        any values. With ``init``, ``apply`` also takes the memory and returns (aggregate, memory). With ``noise`` it
        returns the noised sum, and is called once for all G groups, with messages [C/G, G, ...] and weights [C/G, G];
        the round divides by the size of a group, which is public, unlike the number of clients that count.
      init: the shapes of the messages [C, ...] → the initial memory, a tree of arrays; None is no memory. The memory
        is in the run's snapshots; on resume it is advanced with the ledger's messages.
      separable: whether it treats every scalar independently, see :class:`Send`.
      linear: whether it is the weighted mean, so that partial sums are enough and messages of few bits can be relayed
        in place of their aggregate.
      compares: whether it compares clients' scalars with one another and ignores their weights. It needs several
        clients that measure along the same directions, and clients of equal weight.
      bits: bits of each value that it returns; 32 is a float32.
      noise: the private noise that it adds; messages are clipped to ``noise.clip_norm`` before, and the aggregate is
        applied and broadcast in every round, even if no client counts. None if it adds none.
      label: its description in a ledger, with its option values; by default the name of ``apply``.
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
        """Check that the declared properties are compatible."""
        if self.noise is not None and (self.init is not None or self.separable or self.linear):
            raise ParameterError("noise", "must be None for a combiner with a memory, or a separable or linear one")

    def __call__(self, *operands: Any) -> PyTree:
        """Call ``apply`` with ``operands``."""
        return self.apply(*operands)

    def into(self, algorithm: A) -> A:
        """The algorithm with this as its combiner."""
        return _with(algorithm, self, down_bits=self.bits)


def by_scalar(
    function: Callable[[PyTree, Key[Array, ""]], PyTree],
    messages: PyTree[Shaped[Array, "C K P"]],
    key: Key[Array, ""],
    first: Int[Array, ""] | int = 0,
) -> PyTree:
    """Apply ``function(one scalar of every client [C], its key)`` to each local step and perturbation, and stack.

    Args:
      function: outputs of shape [C] or [] become [C, K, P] or [K, P].
      messages: the scalars.
      key: folded with the local step, then with the perturbation.
      first: index of the first perturbation, if ``messages`` holds only a part of them.
    """
    leaves = jax.tree.leaves(messages)
    steps, perturbations = leaves[0].shape[1:]
    # One scalar after the other: a sum over all at once has another order than a sum for each alone, and a run that
    # aggregates each direction as it is measured must give the same bits.
    columns = jax.tree.map(lambda x: x.reshape(len(x), -1).T, messages)

    def one(each: tuple[PyTree, Int[Array, ""]]) -> PyTree:
        column, place = each
        step, index = place // perturbations, first + place % perturbations
        return function(column, fold_in(fold_in(key, step), index))

    count = steps * perturbations
    # At least two iterations: XLA would inline a loop of one into the surrounding code, and the last bit would differ.
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
"""The weighted mean over the clients of positive weight (HiSo, Algorithm 1); zero if no client has one."""
