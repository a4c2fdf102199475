"""What a method of federated training is: a value of five parts.

A round is measure → valid → send → valid → combine → update. What a client measures, what may happen to its message,
how messages become one aggregate, what the server makes of that, and how many bytes it takes: each is a value here.
Messages and aggregates are trees of arrays: of scalars, [C, K, P] and [K, G·P], for methods that measure along
directions, of the parameters' shapes for methods that train on the client.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from hiso_jax.fed.codes import Coded, Relayed, are_finite
from hiso_jax.fed.measure import Local, LocalClient, Measure, Probes, probes
from hiso_jax.fed.wire import FewBits, Wire, float32
from hiso_jax.zo import Difference, Method, pin

__all__ = [
    "Algorithm",
    "Coded",
    "Combine",
    "Factory",
    "FewBits",
    "Local",
    "LocalClient",
    "Measure",
    "Probes",
    "Relayed",
    "RescaledMean",
    "Send",
    "Senders",
    "StatefulCombine",
    "Wire",
    "are_finite",
    "as_algorithm",
    "by_number",
    "default_rates",
    "float32",
    "in_bits",
    "is_separable",
    "mean",
    "measured_by",
    "probes",
    "separable",
]
F = TypeVar("F", bound=Callable[..., Any])


# ---------------------------------------------------------------- send and combine


class Senders(NamedTuple):
    """Who sends.

    Attributes:
      numbers: of the clients in the population, [C].
      places: in the cohort, 0 to C − 1, [C].
    """

    numbers: Int[Array, "C"]
    places: Int[Array, "C"]


Send = Callable[[PyTree[Shaped[Array, "C ..."]], Senders, Key[Array, ""]], PyTree[Shaped[Array, "C ..."]]]
"""(messages [C, ...], senders, key) → messages: what happens on the way, honest or not."""

Combine = Callable[[PyTree[Shaped[Array, "C ..."]], Float[Array, "C"], Key[Array, ""]], PyTree]
"""(messages [C, ...], weights [C], key) → aggregate. A weight of 0: its message does not count, and may be anything."""


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
class RescaledMean:
    """The weighted mean of messages, each multiplied by a factor of its own that all of them decide.

    Attributes:
      factors: (messages [C, ...], weights [C]) → [C]. A weight of 0: its message does not count.
    """

    factors: Callable[[PyTree, Float[Array, "C"]], Float[Array, "C"]]


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


def is_separable(function: Any) -> bool:
    """Whether :func:`separable` declared it."""
    return getattr(function, "separable", False)


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


# ---------------------------------------------------------------- an algorithm


@dataclass(frozen=True)
class Algorithm:
    """A method of federated training.

    Attributes:
      tx: the server's rule, an optax transformation of aggregates. For methods that measure along directions its head
        (``scale_by_zo``, ``scale_by_hiso``, ``zo.head``) rebuilds Δ from scalars, and anyone can replay it.
      measure: what a client measures; None means finite differences by the run's ``method``.
      send: what happens to the messages on their way, in order.
      combine: how they become one aggregate.
      wire: in how many bits numbers travel.
      perturbations: P that it is made for, if a run does not say another; None is 5, as in DeComFL and HiSo.
      fewest_perturbations: the least P that it makes sense with.
      local_share: the rate of the clients' own steps as a share of the server's, where nothing else is asked for.

    Raises:
      ValueError: few bits for messages that are not scalars.
    """

    tx: optax.GradientTransformation
    measure: Measure | None = None
    send: tuple[Send, ...] = ()
    combine: Combine | StatefulCombine | RescaledMean = mean
    wire: Wire = float32
    perturbations: int | None = None
    fewest_perturbations: int = 1
    local_share: float = 1.0

    def __post_init__(self) -> None:
        """Check that its parts go together."""
        if isinstance(self.wire, FewBits) and not self.has_scalars:
            raise ValueError(
                "wire of few bits is for methods that send scalars; this one sends trees like the parameters"
            )

    @property
    def has_scalars(self) -> bool:
        """Whether its messages are scalars, from which everything can be rebuilt."""
        return not isinstance(self.measure, Local)

    @property
    def is_separable(self) -> bool:
        """Whether a perturbation can be aggregated without the others."""
        return self.has_scalars and self.wire.is_exact and all(map(is_separable, (*self.send, self.combine)))

    @property
    def description(self) -> dict[str, Any]:
        """What of it can be written down, so that another is told from it; ``tx`` is told by what it leads to."""
        measure = self.measure
        return {
            "measure": list(measure.difference.offsets) if isinstance(measure, Probes) else _name(measure),
            "send": [_name(send) for send in self.send],
            "combine": _name(self.combine),
            "wire": self.wire.description,
        }

    @property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """``tx``, taking the keyword arguments of a round."""
        return optax.with_extra_args_support(self.tx)


Factory = Callable[..., Algorithm]
"""``name(learning_rate, *, options)``: its keywords are its options on the command line. The learning rate may be a
number, traced, or a schedule over rounds."""


def default_rates(perturbations: int | None = None, **rates: float) -> Callable[[Factory], Factory]:
    """Declare the learning rates that a factory's method takes where none is given.

    Args:
      perturbations: P that they are for; a run with fewer takes as much less, since a direction that is one of few
        brings as much more noise. None: they are the same for any P.
      rates: by the name of a task; or for language models, ``full`` if all parameters are trained and ``adapters``.
    """

    def declare(factory: Factory) -> Factory:
        factory.default_rates = rates  # type: ignore[attr-defined]
        factory.rates_for = perturbations  # type: ignore[attr-defined]
        return factory

    return declare


def _name(part: Any) -> str | None:
    """What a function is called, through what holds it."""
    if isinstance(part, Local):
        return _name(part.train)
    if isinstance(part, StatefulCombine):
        return _name(part.combine)
    if isinstance(part, RescaledMean):
        return _name(part.factors)
    return None if part is None else getattr(part, "__qualname__", type(part).__qualname__)


def as_algorithm(method: Algorithm | optax.GradientTransformation) -> Algorithm:
    """An algorithm, or a bare optimizer as one: finite differences, and the mean of the scalars."""
    return method if isinstance(method, Algorithm) else Algorithm(method)


def measured_by(algorithm: Algorithm, method: Difference | Method | None) -> Measure:
    """What the algorithm's clients measure, if the run asks for ``method``.

    Raises:
      ValueError: the algorithm has a measure of its own and the run asks for a method, too.
    """
    if algorithm.measure is None:
        return probes("forward" if method is None else method)
    if method is not None:
        raise ValueError(f"method must not be given for an algorithm that has a measure of its own, got {method!r}")
    return algorithm.measure
