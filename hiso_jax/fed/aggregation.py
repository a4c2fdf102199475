"""What may happen to messages between clients and server, and how they become one: the types of channels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from hiso_jax.zo import pin

F = TypeVar("F", bound=Callable[..., Any])


class Senders(NamedTuple):
    """Who sends.

    Attributes:
      numbers: of the clients in the population, [C].
      places: in the cohort, 0 to C − 1, [C].
      hostile: which of them an attack forges the messages of, [C]; None is nobody.
      honest: which of the others report, [C]; None is all of them.
      groups: G; the client at place c measures along the directions of group c mod G.
    """

    numbers: Int[Array, "C"]
    places: Int[Array, "C"]
    hostile: Bool[Array, "C"] | None = None
    honest: Bool[Array, "C"] | None = None
    groups: int = 1


Send = Callable[[PyTree[Shaped[Array, "C ..."]], Senders, Key[Array, ""]], PyTree[Shaped[Array, "C ..."]]]
"""(messages [C, ...], senders, key) → messages: what clients do with theirs before they send them."""

Combine = Callable[[PyTree[Shaped[Array, "C ..."]], Float[Array, "C"], Key[Array, ""]], PyTree]
"""(messages [C, ...], weights [C], key) → aggregate. A weight of 0: its message does not count, and may be anything."""


@dataclass(frozen=True)
class Attack:
    """What hostile clients send in place of their messages; the run says who is hostile.

    Attributes:
      forge: (messages [C, ...] of all clients, senders, key) → what each would send if it were hostile.
      reads_others: whether what a client sends depends on other clients' messages, too. Each forged message then tells
        of the honest ones once more, and the ε of a private run grows by it.
    """

    forge: Send
    reads_others: bool = True


@dataclass(frozen=True)
class Rescale:
    """Messages shortened at the server's door, each by a factor of its own, before they are combined.

    Attributes:
      factors: (messages [C, ...], weights [C], state) → (factors [C], 1 where a message stays as it is; next state).
        A weight of 0: its message does not count, and may be anything.
      init: the shapes of the messages [C, ...] → the first state, a tree of arrays; none by default. It is in the run's
        snapshots; on resume it is advanced from the ledger's messages.
      is_rare: whether it seldom acts: a round then goes ahead as if it did not, and makes Δ again where it does.
      label: what it is, with its numbers, as a ledger says it.
    """

    factors: Callable[[PyTree, Float[Array, "C"], PyTree], tuple[Float[Array, "C"], PyTree]]
    init: Callable[[PyTree], PyTree] = lambda messages: ()
    is_rare: bool = False
    label: str = ""


@dataclass(frozen=True)
class StatefulCombine:
    """A combiner that remembers something from round to round.

    Its state is in the run's snapshots; on resume it is advanced from the ledger's messages.

    Attributes:
      init: the shapes of the messages [C, ...] → the first state, a tree of arrays.
      combine: (messages, weights, key, state) → (aggregate, state).
    """

    init: Callable[[PyTree], PyTree]
    combine: Callable[[PyTree, Float[Array, "C"], Key[Array, ""], PyTree], tuple[PyTree, PyTree]]


@dataclass(frozen=True)
class PrivateMean:
    """The mean of clipped messages, with noise that only the server can make (DP-FedAvg, arXiv 1710.06963).

    m = (Σ_i min(1, S / ‖m_i‖) m_i + N(0, (σS)² I)) / C: the sum is over the clients that count, C is the whole cohort,
    whoever counts, and the noise is drawn from the run's secret, on every number of every group of directions. It is
    applied, and told, in every round, also where no client counts.

    Attributes:
      clip_norm: S, of a whole message.
      noise_multiplier: σ, the noise's standard deviation on the sum in units of S.
    """

    clip_norm: float
    noise_multiplier: float


def secret(clip_norm: float, noise_multiplier: float) -> Callable[[F], F]:
    """Declare that a client clips its message and noises it in private: its key then comes from the run's secret.

    In a simulation one secret stands for all clients' and the server's.

    Args:
      clip_norm: S, of a whole message.
      noise_multiplier: σ, the noise's standard deviation on every number in units of S.
    """

    def declare(function: F) -> F:
        function.secret = clip_norm, noise_multiplier  # type: ignore[attr-defined]
        return function

    return declare


def separable(function: F) -> F:
    """Declare that a channel or combiner treats every number of a message by itself.

    It is then called for one number of all clients at a time, a tree of [C] arrays, with a key of its own for each
    (local step, perturbation), so that a round may aggregate a perturbation before the next is measured.
    """
    function.separable = True  # type: ignore[attr-defined]
    return function


def in_bits(bits: int) -> Callable[[F], F]:
    """Declare how many bits each number takes that a channel or combiner gives; undeclared it is a float32."""

    def declare(function: F) -> F:
        function.bits = bits  # type: ignore[attr-defined]
        return function

    return declare


def compares(function: F) -> F:
    """Declare that a combiner compares clients' numbers with one another, and does not heed their weights.

    It needs several clients that measure along the same directions, and clients that count alike.
    """
    function.compares = True  # type: ignore[attr-defined]
    return function


def is_separable(function: Any) -> bool:
    """Whether :func:`separable` declared it."""
    return getattr(function, "separable", False)


def noise_of(function: Any) -> tuple[float, float] | None:
    """S and σ, if :func:`secret` declared them."""
    return getattr(function, "secret", None)


def is_secret(function: Any) -> bool:
    """Whether :func:`secret` declared it."""
    return noise_of(function) is not None


def by_number(
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


@separable
def mean(
    messages: PyTree[Shaped[Array, "C ..."]], weights: Float[Array, "C"], key: Key[Array, ""] | None = None
) -> PyTree[Shaped[Array, "..."]]:
    """The weighted mean over the clients of positive weight (HiSo, Algorithm 1); zero if there is none.

    Args:
      messages: of every client of the cohort; those of weight zero may be anything, NaN too.
      weights: zero for a client that does not count.
      key: not used.
    """
    del key
    total = weights.sum()
    divisor = pin(jnp.where(total > 0, total, 1))

    def one(message: Shaped[Array, "C ..."]) -> Shaped[Array, "..."]:
        own = jnp.expand_dims(weights.astype(message.dtype), range(1, message.ndim))
        counted = jnp.where(own > 0, message * own, 0)
        return pin(pin(counted).sum(0) / divisor.astype(message.dtype))

    return jax.tree.map(one, messages)
