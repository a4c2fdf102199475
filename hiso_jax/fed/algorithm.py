"""A federated method as one value, :class:`Algorithm`, made of a few parts.

A round is measure → valid → send → valid → rescale → combine → update. Each part is a value: the client's measure, the
steps of the message path, the combiner, the server's optimizer, and the wire, which sets the bits of a message.
Messages and aggregates are trees of arrays. Methods that measure along directions have scalars, [C, K, P] and
[K, G·P]; methods that train on the client have arrays of the parameters' shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError, integer, is_real, of_kind, transformation
from hiso_jax.fed.aggregation import Attack, Clip, Combine, Noise, Part, Send, Senders, by_scalar, mean
from hiso_jax.fed.codes import Coded, Relayed, are_finite
from hiso_jax.fed.measure import Local, LocalClient, Measure, Mixed, Probes, Projections, mixed, probes, projections
from hiso_jax.fed.part_digests import digest
from hiso_jax.fed.wire import FewBits, Wire, float32
from hiso_jax.renamed import successor
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
    "Mixed",
    "Noise",
    "Part",
    "Probes",
    "Projections",
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
    "mixed",
    "probes",
    "projections",
]


@dataclass(frozen=True)
class Algorithm:
    """A federated method.

    Attributes:
      tx: the server's optimizer, an optax transformation of aggregates. For methods that measure along directions, its
        head (``scale_by_zo``, ``scale_by_hiso``, ``zo.head``) rebuilds Δ from scalars, so anyone can replay it.
      measure: the clients' measurement; None means finite differences, the run's ``difference``.
      send: the steps that clients apply to their messages before they send them, in order.
      attack: the messages that hostile clients send; the run says which clients are hostile.
      rescale: the server's clipping of messages before it combines them, in order.
      combine: the combiner, which makes one aggregate of the messages.
      wire: the number of bits of each value in messages and aggregates.
      perturbations: the method's default P; None is 5, as in DeComFL and HiSo.
      local_steps: the K that it is made for, if a run gives no other; None is 1.
      fewest_perturbations: the smallest P that makes sense for the method.
      local_share: the default rate of the clients' own steps as a share of the server's.
      pooled_rate: η, if ``tx`` is only plain descent along directions of a :class:`hiso_jax.zo.Pool`: a client that
        missed rounds can then be sent one sum for each seed (``fed/ledger/seed_sums.py``).
      recipe: how it is made from its learning rate, see :meth:`at`; None for a user's own method.

    Raises:
      ValueError: the wire uses few bits for messages that are not scalars, or relays messages although the mean is
        private or the combiner is not the mean.
    """

    tx: optax.GradientTransformation
    measure: Measure | None = None
    send: tuple[Send, ...] = ()
    attack: Attack | None = None
    rescale: tuple[Clip, ...] = ()
    combine: Combine = mean
    wire: Wire = float32
    perturbations: int | None = None
    local_steps: int | None = None
    fewest_perturbations: int = 1
    local_share: float = 1.0
    pooled_rate: optax.ScalarOrSchedule | None = None
    recipe: "Recipe | None" = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the types of the parts and that they are compatible."""
        transformation("tx", self.tx)
        if self.measure is not None:
            of_kind("measure", self.measure, Measure, "a measure, like fed.probes() or fed.projections()")
        for name, number in (("perturbations", self.perturbations), ("local_steps", self.local_steps)):
            if number is not None:
                integer(name, number, 1)
        attack = () if self.attack is None else (self.attack,)
        for name, kind, values in (
            ("send", Send, self.send),
            ("attack", Attack, attack),
            ("rescale", Clip, self.rescale),
            ("combine", Combine, (self.combine,)),
        ):
            for value in values:
                if not isinstance(value, kind) or value.part != name:
                    raise ParameterError(
                        name, f"must be of fed.{kind.__name__}, like fed.{kind.__name__}(function); got {value!r}"
                    )
        if self.wire.is_coded and not self.has_scalars:
            raise ParameterError(
                "wire", "of few bits is for methods that send scalars; this one sends trees like the parameters"
            )
        if self.is_private and self.wire.must_relay:
            raise ParameterError(
                "relay", "must be aggregate for a private mean: relayed messages reveal every client's scalars to all"
            )
        if not self.combine.linear and self.wire.must_relay:
            raise ParameterError("relay", "must be aggregate unless the combiner is the mean")

    def __getattr__(self, name: str) -> Any:
        """Attributes of earlier releases answer with their successors."""
        raise successor("hiso_jax.fed.Algorithm", name)

    def at(self, learning_rate: Any) -> "Algorithm":
        """The same method at another learning rate, which may be traced; parts that were replaced since are kept.

        Programs take the rate as an argument through this method, so that runs at several rates share one program.
        Without a :attr:`recipe` the algorithm is returned as it is.
        """
        if self.recipe is None:
            return self
        first, again = self.recipe.made, self.recipe.make(learning_rate)
        names = [each.name for each in fields(self) if each.name != "recipe"]
        own = {name: getattr(again, name) for name in names if getattr(self, name) is getattr(first, name)}
        return replace(self, recipe=None, **own)

    @property
    def has_scalars(self) -> bool:
        """Whether its messages are scalars, from which a replay can rebuild the model."""
        return self.measure is None or self.measure.has_scalars

    @property
    def is_private(self) -> bool:
        """Whether the server adds noise to the aggregate, and may broadcast nothing else."""
        return self.combine.noise is not None

    @property
    def noise(self) -> Noise | None:
        """The noise that makes it private: the server's, else the clients'; None if it is not private."""
        noises = [self.combine.noise, *(send.noise for send in self.send)]
        return next((noise for noise in noises if noise is not None), None)

    @property
    def needs_secret(self) -> bool:
        """Whether it draws private noise, whose key comes from the run's secret."""
        return self.noise is not None

    @property
    def is_separable(self) -> bool:
        """Whether a perturbation can be aggregated without the others, apart from clipping that seldom acts."""
        attack = () if self.attack is None else (self.attack,)
        alone = all(part.separable for part in (*self.send, *attack, self.combine))
        return self.has_scalars and self.wire.is_exact and alone and all(each.is_rare for each in self.rescale)

    def pool_of(self, state: optax.OptState) -> Pool | None:
        """The pool, if the updates of its rounds are sums over the pool's seeds; else None.

        Args:
          state: the optimizer's state, or its shapes.
        """
        if self.pooled_rate is None:
            return None
        directions = zo_state(state).directions
        # Sign flips by blocks make directions that are not in the pool.
        alone = directions.groups == 1 or directions.block == 0
        return directions.key if isinstance(directions.key, Pool) and alone else None

    @property
    def description(self) -> dict[str, Any]:
        """Its readable description, as in a ledger; :attr:`part_digests` also distinguish other option values."""
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
        """Digests of its parts with all option values in them, see :func:`hiso_jax.fed.part_digests.digest`."""
        parts = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "recipe"}
        return {"optimizer" if name == "tx" else name: digest(part) for name, part in parts.items()}

    @cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """``tx`` with the keyword arguments of a round, and with its state in float32 or wider for any parameters.

        By default optax keeps moments in the parameters' dtype; moments in bfloat16 would hardly change. It is one
        object, so that programs compiled for it are found again.
        """
        tx = optax.with_extra_args_support(self.tx)
        return optax.GradientTransformationExtraArgs(partial(_first_state, tx, self.has_scalars), tx.update)


class Recipe(NamedTuple):
    """How an algorithm is made from its learning rate.

    Attributes:
      make: learning rate, which may be traced → the algorithm.
      learning_rate: the rate that it was made with, a number or a schedule.
      made: the algorithm at this rate.
    """

    make: Callable[[Any], Algorithm]
    learning_rate: optax.ScalarOrSchedule
    made: Algorithm


def made_at(make: Callable[[Any], Algorithm], learning_rate: Any) -> Algorithm:
    """``make(learning_rate)``, with its recipe unless the rate is traced.

    Args:
      make: a function of this package, which computes with the rate as with an array and reads no digit of it.
      learning_rate: a number, a traced scalar or a schedule.
    """
    made = make(learning_rate)
    known = is_real(learning_rate) or callable(learning_rate)
    return replace(made, recipe=Recipe(make, learning_rate, made)) if known else made


Factory = Callable[..., Algorithm]
"""``name(learning_rate, *, options)``: its keywords are its options on the command line. The learning rate is a
number, which may be traced, or a schedule over rounds."""


def default_rates(perturbations: int | None = None, **rates: float) -> Callable[[Factory], Factory]:
    """Declare the default learning rates of a factory's method.

    Args:
      perturbations: P that the rates are for; a run with fewer directions scales its rate down in proportion, because
        its noise grows in proportion. None: the rates hold for any P.
      rates: rates by the name of a task; for language models by ``full``, if all parameters are trained, and
        ``adapters``.
    """

    def declare(factory: Factory) -> Factory:
        factory.default_rates = rates  # type: ignore[attr-defined]
        factory.rates_for = perturbations  # type: ignore[attr-defined]
        return factory

    return declare


def _first_state(tx: optax.GradientTransformationExtraArgs, has_scalars: bool, params: PyTree) -> optax.OptState:
    state = _init_precisely(tx.init, params)
    if not has_scalars:
        return state
    # Raises if there is no head; other optimizers would take the scalars for gradients.
    zo_state(state)
    return settled(tx, state, params)


def _init_precisely(init: Callable[[Any], Any], params: PyTree) -> optax.OptState:
    """Call ``init`` with the parameters in the dtypes of their updates."""

    def is_narrow(leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.promote_types(leaf.dtype, jnp.float32)

    if not any(map(is_narrow, jax.tree.leaves(params))):
        return init(params)

    def widened(given: PyTree) -> optax.OptState:
        return init(jax.tree.map(lambda x: x.astype(working_dtype(x)) if is_narrow(x) else x, given))

    # Compiled, so that only arrays that ``init`` reads get a wider copy: a head reads only shapes.
    return jax.jit(widened)(params)


def _name(part: Any) -> str:
    """The name of a function, or of the type of a callable object."""
    return getattr(part, "__qualname__", type(part).__qualname__)


def as_algorithm(method: Algorithm | optax.GradientTransformation) -> Algorithm:
    """The algorithm itself, or an optimizer wrapped as an algorithm: finite differences and the mean of the scalars.

    Raises:
      ParameterError: ``method`` is neither an algorithm nor an optimizer.
    """
    if isinstance(method, Algorithm):
        return method
    transformation("tx", method)
    return Algorithm(method)


def measured_by(algorithm: Algorithm, difference: Difference | DifferenceName | None) -> Measure:
    """The measure of the algorithm's clients, given the run's ``difference``.

    Raises:
      ValueError: the algorithm has its own measure, and the run gives a difference, too.
    """
    if algorithm.measure is None:
        return probes("forward" if difference is None else difference)
    if difference is not None:
        raise ParameterError(
            "difference", f"must not be given for an algorithm that has a measure of its own, got {difference!r}"
        )
    return algorithm.measure
