"""What a method of federated training is: a value of a few parts.

A round is measure → valid → send → valid → rescale → combine → update. What a client measures, what may happen to its
message, how messages become one aggregate, what the server makes of that, and how many bytes it takes: each is a value
here. Messages and aggregates are trees of arrays: of scalars, [C, K, P] and [K, G·P], for methods that measure along
directions, of the parameters' shapes for methods that train on the client.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.aggregation import Attack, Clip, Combine, Noise, Part, Send, Senders, by_scalar, mean
from hiso_jax.fed.codes import Coded, Relayed, are_finite
from hiso_jax.fed.measure import Local, LocalClient, Measure, Probes, probes
from hiso_jax.fed.part_digests import digest
from hiso_jax.fed.wire import FewBits, Wire, float32
from hiso_jax.zo import Difference, DifferenceName, Pool, settled, working_dtype, zo_state

__all__ = [
    "Algorithm",
    "Attack",
    "Clip",
    "Coded",
    "Combine",
    "Factory",
    "FewBits",
    "Local",
    "LocalClient",
    "Measure",
    "Noise",
    "Part",
    "Probes",
    "Relayed",
    "Send",
    "Senders",
    "Wire",
    "are_finite",
    "as_algorithm",
    "by_scalar",
    "default_rates",
    "float32",
    "mean",
    "measured_by",
    "probes",
]


@dataclass(frozen=True)
class Algorithm:
    """A method of federated training.

    Attributes:
      tx: the server's rule, an optax transformation of aggregates. For methods that measure along directions its head
        (``scale_by_zo``, ``scale_by_hiso``, ``zo.head``) rebuilds Δ from scalars, and anyone can replay it.
      measure: what a client measures; None means finite differences, the run's ``difference``.
      send: what clients do with their messages before they send them, in order.
      attack: what hostile clients send; who they are the run says.
      rescale: how the server shortens messages before it combines them, in order.
      combine: how they become one aggregate.
      wire: in how many bits numbers travel.
      perturbations: P that it is made for, if a run does not say another; None is 5, as in DeComFL and HiSo.
      fewest_perturbations: the least P that it makes sense with.
      local_share: the rate of the clients' own steps as a share of the server's, where nothing else is asked for.
      pooled_rate: η, where ``tx`` is plain descent along directions of a :class:`hiso_jax.zo.Pool`, and nothing else:
        who comes late can then be told a sum a seed (``fed/ledger/seed_sums.py``).

    Raises:
      ValueError: few bits for messages that are not scalars, or messages that are told where another combiner than the
        mean makes something else of them.
    """

    tx: optax.GradientTransformation
    measure: Measure | None = None
    send: tuple[Send, ...] = ()
    attack: Attack | None = None
    rescale: tuple[Clip, ...] = ()
    combine: Combine = mean
    wire: Wire = float32
    perturbations: int | None = None
    fewest_perturbations: int = 1
    local_share: float = 1.0
    pooled_rate: optax.ScalarOrSchedule | None = None

    def __post_init__(self) -> None:
        """Check that its parts are of their types and go together."""
        attack = () if self.attack is None else (self.attack,)
        for name, kind, values in (
            ("send", Send, self.send),
            ("attack", Attack, attack),
            ("rescale", Clip, self.rescale),
            ("combine", Combine, (self.combine,)),
        ):
            for value in values:
                if not isinstance(value, kind):
                    raise ParameterError(
                        name, f"must be of fed.{kind.__name__}, like fed.{kind.__name__}(function); got {value!r}"
                    )
        if self.wire.is_coded and not self.has_scalars:
            raise ParameterError(
                "wire", "of few bits is for methods that send scalars; this one sends trees like the parameters"
            )
        if self.is_private and self.wire.relay == "messages":
            raise ParameterError(
                "relay", "must be aggregate for a private mean: messages show every client's numbers to all"
            )
        if not self.combine.linear and self.wire.relay == "messages":
            raise ParameterError(
                "relay", "must be aggregate for another combiner than the mean, whose result is none of codes"
            )

    @property
    def has_scalars(self) -> bool:
        """Whether its messages are scalars, from which everything can be rebuilt."""
        return self.measure is None or self.measure.has_scalars

    @property
    def is_private(self) -> bool:
        """Whether what everyone is told is noised by the server, and nothing else may be told."""
        return self.combine.noise is not None

    @property
    def noise(self) -> Noise | None:
        """The noise that makes it private, the server's before the clients'; None if nothing does."""
        noises = [self.combine.noise, *(send.noise for send in self.send)]
        return next((noise for noise in noises if noise is not None), None)

    @property
    def needs_secret(self) -> bool:
        """Whether something in it draws what nobody else may draw."""
        return self.noise is not None

    @property
    def is_separable(self) -> bool:
        """Whether a perturbation can be aggregated without the others, but for what rarely happens."""
        attack = () if self.attack is None else (self.attack,)
        alone = all(part.separable for part in (*self.send, *attack, self.combine))
        return self.has_scalars and self.wire.is_exact and alone and all(each.is_rare for each in self.rescale)

    def pool_of(self, state: optax.OptState) -> Pool | None:
        """The pool over whose seeds its rounds are sums, if they are.

        Args:
          state: of its optimizer, or its shapes.
        """
        if self.pooled_rate is None:
            return None
        directions = zo_state(state).directions
        # Signs that are flipped by blocks make directions that are not of the pool.
        alone = directions.groups == 1 or directions.block == 0
        return directions.key if isinstance(directions.key, Pool) and alone else None

    @property
    def description(self) -> dict[str, Any]:
        """What of it can be written down and read; :attr:`made_of` tells another from it."""
        measure = self.measure
        said: dict[str, Any] = {
            "measure": None if measure is None else measure.description,
            "send": [send.label or _name(send.apply) for send in self.send],
            "combine": self.combine.label or _name(self.combine.apply),
            "wire": self.wire.description,
        }
        if self.rescale:
            said["rescale"] = [clip.label or _name(clip.factors) for clip in self.rescale]
        if self.attack is not None:
            said["attack"] = self.attack.label or _name(self.attack.apply)
        return said

    @property
    def part_digests(self) -> dict[str, str]:
        """Digests of its parts with all of their numbers, see :func:`hiso_jax.fed.part_digests.digest`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"optimizer" if name == "tx" else name: digest(part) for name, part in parts.items()}

    @property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """``tx``, taking the keyword arguments of a round, its state in float32 or wider whatever the parameters are.

        optax keeps moments in the parameters' dtype unless told otherwise; those of bfloat16 would hardly move.
        """
        tx = optax.with_extra_args_support(self.tx)
        return optax.GradientTransformationExtraArgs(partial(_first_state, tx, self.has_scalars), tx.update)


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


def _first_state(tx: optax.GradientTransformationExtraArgs, has_scalars: bool, params: PyTree) -> optax.OptState:
    state = _init_precisely(tx.init, params)
    return settled(tx, state, params) if has_scalars else state


def _init_precisely(init: Callable[[Any], Any], params: PyTree) -> optax.OptState:
    """``init`` of the parameters in the dtypes of their updates."""

    def is_narrow(leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.promote_types(leaf.dtype, jnp.float32)

    if not any(map(is_narrow, jax.tree.leaves(params))):
        return init(params)

    def widened(given: PyTree) -> optax.OptState:
        return init(jax.tree.map(lambda x: x.astype(working_dtype(x)) if is_narrow(x) else x, given))

    # Compiled, so that the wider copy is of what ``init`` reads alone: a head reads shapes.
    return jax.jit(widened)(params)


def _name(part: Any) -> str:
    """The name of a function, or of the type of a callable object."""
    return getattr(part, "__qualname__", type(part).__qualname__)


def as_algorithm(method: Algorithm | optax.GradientTransformation) -> Algorithm:
    """An algorithm, or a bare optimizer as one: finite differences, and the mean of the scalars.

    Raises:
      TypeError: it is neither.
    """
    if isinstance(method, Algorithm):
        return method
    if not (hasattr(method, "init") and hasattr(method, "update")):
        raise TypeError(
            f"tx must be an optax transformation or a fed.Algorithm, like hiso_jax.hiso(0.01); got {method!r}"
        )
    return Algorithm(method)


def measured_by(algorithm: Algorithm, difference: Difference | DifferenceName | None) -> Measure:
    """What the algorithm's clients measure, if the run asks for ``difference``.

    Raises:
      ValueError: the algorithm has a measure of its own and the run asks for a difference, too.
    """
    if algorithm.measure is None:
        return probes("forward" if difference is None else difference)
    if difference is not None:
        raise ParameterError(
            "difference", f"must not be given for an algorithm that has a measure of its own, got {difference!r}"
        )
    return algorithm.measure
