"""Clients that measure scalars along shared directions (HiSo, arXiv 2506.02370, Algorithm 1).

Shapes: C clients, K local steps, P perturbations, B examples in a batch. At step 0 every client has the server's
parameters, so the examples of many clients form one flat batch for one shared set of perturbed weights. If the cohort
is assigned to G groups of directions, there is one flat batch and one set of perturbed weights for each group. From
step 1 on, the clients have their own parameters, [C, ...].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from hiso_jax.checks import ParameterError
from hiso_jax.fed.devices import Part, has_few_parameters, in_pieces, keeps_directions, looped_once
from hiso_jax.fed.measure.context import Cohort, Estimator, Measured, RoundContext
from hiso_jax.fed.measure.evaluations import at_clients, at_server, directions_of, gathered
from hiso_jax.zo import (
    Ascent,
    Difference,
    DifferenceName,
    Direction,
    GroupedDirections,
    Hadamard,
    LowRank,
    as_difference,
    by_direction,
    check_regenerated,
    directional_derivatives,
    fold_directions,
    made_dense,
    probe,
    rounded,
    working_dtype,
    zo_state,
)

Mode = Literal["stream", "keep", "regenerate"]
"""The handling of a measured direction: it is added to Δ and dropped, kept for the update, or made again."""


@dataclass(frozen=True)
class Probes:
    """A measure of finite differences along the directions that the head's state defines.

    A message is an array of scalars [K, P], or a tree of such arrays if the difference gives several estimates.

    Attributes:
      difference: the difference, which defines the losses to take and the estimates made of them.
    """

    difference: Difference
    has_scalars: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("perturbations", "mu", "difference", "directions", "local_learning_rate")

    @property
    def description(self) -> list[Any]:
        """The offsets along a direction, in units of μ, at which it takes losses."""
        return list(self.difference.offsets)

    def passes(self, local_steps: int, num_perturbations: int) -> int:
        """The number of forward passes that a round costs a client."""
        return local_steps * self.difference.passes(num_perturbations)

    def check(self, estimator: Estimator, directions: str | None) -> None:
        """Refuse numbers that do not suit.

        Raises:
          ParameterError: K > 1 without a rate for the clients' own steps, or with directions kept.
        """
        if estimator.local_steps == 1:
            return
        if estimator.local_learning_rate is None:
            raise ParameterError(
                "local_steps", f"is {estimator.local_steps}: the clients' own steps need `local_learning_rate`"
            )
        if directions == "keep":
            raise ParameterError("directions", "must be regenerate for several local steps, got keep")

    def directions(self, local_steps: int, num_perturbations: int) -> int:
        """K·P."""
        return local_steps * num_perturbations

    def message_shapes(self, estimator: Estimator, params: PyTree, clients: int, dtype: Any) -> PyTree:
        """The shape of scalars [C, K, P], or a tree of such shapes.

        Raises:
          ValueError: the ledger has no columns for the estimates of the difference.
        """
        shape = clients, estimator.local_steps, estimator.num_perturbations
        losses = [jax.ShapeDtypeStruct(shape, dtype)] * len(self.difference.offsets)
        shapes = jax.eval_shape(lambda losses: self.difference.estimates(losses, 1.0), losses)
        _check_names(shapes)
        return shapes

    def measure(self, context: RoundContext, cohort: Cohort, part: Part) -> Measured:
        """Measure every client's scalars."""
        if context.estimator.local_steps > 1:
            return _measure_local_steps(context, self.difference, cohort.batches, part)
        return _measure_once(context, self.difference, cohort.batches, part)

    def ascent(self, context: RoundContext, measured: Measured, aggregate: PyTree) -> Ascent | None:
        """Δ, computed while the directions were measured or from the directions that were kept."""
        if measured.kept is None:
            return measured.ascent
        kept, directions = measured.kept, directions_of(context, 0)
        assert isinstance(directions, GroupedDirections)
        delta = fold_directions(
            directions,
            by_direction(directional_derivatives(aggregate)[0], context.groups),
            lambda index: directions.again(jax.tree.map(lambda z: z[index], kept), index),
        )
        return Ascent(aggregate, delta)


def probes(difference: Difference | DifferenceName = "forward") -> Probes:
    """Finite differences along shared directions; ``difference`` is a difference or its name."""
    return Probes(as_difference(difference))


def _check_names(numbers: PyTree) -> None:
    """Refuse estimates of a direction for which the ledger has no columns.

    Raises:
      ValueError: the estimates are neither an array nor nested dicts of arrays whose names have no dots.
    """
    for path, _ in jax.tree_util.tree_leaves_with_path(numbers):
        for key in path:
            if not isinstance(key, jax.tree_util.DictKey) or not isinstance(key.key, str) or "." in key.key:
                raise ParameterError(
                    "measure",
                    "must give an array, or a dict of arrays whose names have no dot, for each direction; got "
                    f"{jax.tree.structure(numbers)}",
                )


def _mode(context: RoundContext) -> Mode:
    """The handling of directions: as requested; by default they are kept or added to Δ at once if that pays."""
    streams, params = context.relay is not None, context.params
    directions, asked = zo_state(context.server.state).directions, context.settings.directions
    if isinstance(directions.sampler, Hadamard):
        # Their Δ is made by a transform.
        check_regenerated(directions, asked)
        return "regenerate"
    if not streams and directions.block == 0:
        # The separate draws of all groups, G·P, are too many to keep.
        return "regenerate"
    copies = 2 if streams else context.estimator.num_perturbations + 1
    # Low-rank factors are cheap to make again.
    dear = not isinstance(directions.sampler, LowRank) and context.estimator.local_steps == 1
    if asked is None and dear and keeps_directions(params, context.settings.memory_budget, copies):
        asked = "keep"
    return "regenerate" if asked != "keep" else "stream" if streams else "keep"


def _run(
    context: RoundContext, difference: Difference, evaluate: Callable, step: int | Array, fold: Callable, init: PyTree
) -> tuple[PyTree, Array, PyTree]:
    """Call :func:`hiso_jax.zo.probe` along the directions of a local step."""
    return probe(
        evaluate,
        directions_of(context, step).at,
        difference,
        num_perturbations=context.estimator.num_perturbations,
        mu=context.estimator.mu,
        fold=fold,
        init=init,
    )


def _as_messages(numbers: PyTree) -> PyTree[Shaped[Array, "C 1 P"]]:
    """The outputs of one local step, [P, C], as messages."""
    return jax.tree.map(lambda x: x.T[:, None], numbers)


def _takes_pieces_first(context: RoundContext, clients: int) -> bool:
    """Whether each piece of the cohort is evaluated along all directions before the next piece.

    All forward passes of a piece then share what does not depend on the weights, such as the patches of a first
    convolution, and find it in the cache. Each piece makes the directions again, which costs little for few parameters.
    """
    transformed = isinstance(zo_state(context.server.state).directions.sampler, Hadamard)
    several = context.is_alone or clients > context.execution.flat
    return several and context.groups == 1 and not transformed and has_few_parameters(context.params)


def _measure_once(context: RoundContext, difference: Difference, batches: PyTree, part: Part) -> Measured:
    """Measure every client's message in a round of one local step.

    The outer loop is over directions and the inner loop over pieces of clients, so a direction is made once for the
    measurement; models of few parameters take the pieces first (:func:`_takes_pieces_first`). In the mode "stream",
    each perturbation is aggregated and added to Δ, by the arithmetic of ``zo.accumulate``, before the next direction is
    made.

    Args:
      context: the context of the round.
      batches: the batches of this device's clients, [c, 1, B, ...], or the arguments from which they are drawn.
      part: this device's part of the cohort.
    """
    first = jax.tree.map(lambda a: a[:, 0], context.drawn(batches, context.execution.stream))
    perturbations = context.estimator.num_perturbations
    mode, relay = _mode(context), context.relay
    if mode == "regenerate" and _takes_pieces_first(context, len(part.places)):

        def piece(given: tuple[PyTree, Int[Array, "c"]]) -> tuple[PyTree, Float[Array, "c"]]:
            own, batch = gathered(context._replace(is_alone=False), given[0])
            evaluate = at_server(own, batch, given[1])
            _, losses, numbers = _run(context, difference, evaluate, 0, lambda carry, _, own: (carry, own), None)
            return _as_messages(numbers), losses

        inputs = first, part.places
        if context.is_alone:
            made = looped_once(piece, jax.tree.map(lambda a: a[:, None], inputs), part.places)
            return Measured(*part.join(jax.tree.map(lambda a: a[:, 0], made)))
        return Measured(*part.join(in_pieces(piece, inputs, context.execution.flat)))
    evaluate = at_server(*gathered(context, first), part.places)
    if mode == "stream":
        assert relay is not None

        def fold(carry: tuple[Array, PyTree], direction: Direction, own: PyTree) -> tuple[tuple[Array, PyTree], Any]:
            index, total = carry
            numbers = part.join(own)
            sent, combined = relay(numbers, index)
            # A replay reads the aggregate from the ledger. Here, without rounding, its last product would be contracted
            # into a sum over groups, and the bits would differ.
            received = jax.tree.map(rounded, combined)
            total, terms = direction.add_to(total, directional_derivatives(received), perturbations)
            return (index + 1, total), (numbers, sent, combined, terms)

        directions = directions_of(context, 0)
        assert isinstance(directions, GroupedDirections)
        (_, total), losses, (numbers, sent, combined, terms) = _run(
            context, difference, evaluate, 0, fold, (jnp.int32(0), directions.begin())
        )
        ascent = Ascent(jax.tree.map(lambda x: x.T.reshape(1, -1), combined), directions.finish(total, terms))
        return Measured(_as_messages(numbers), part.join(losses), _as_messages(sent), ascent)
    keep = mode == "keep"
    _, losses, (numbers, kept) = _run(
        context,
        difference,
        evaluate,
        0,
        lambda carry, direction, own: (carry, (own, direction.whole if keep else None)),
        None,
    )
    messages, losses = part.join((_as_messages(numbers), losses))
    return Measured(messages, losses, kept=kept)


def _add_outer(
    context: RoundContext, places: Int[Array, "C"]
) -> Callable[[PyTree, Direction, PyTree], tuple[PyTree, PyTree]]:
    """A fold that adds each client's scalar times its direction to the client's own Σ_p g_p z_p, [C, ...]."""

    # No matrix product, because accelerators would round it to fewer bits.
    def add(d: Array, u: Array, scalars: Array) -> Array:
        each = jnp.expand_dims(scalars.astype(u.dtype), range(scalars.ndim, d.ndim))
        return d + each * jnp.expand_dims(u, range(d.ndim - u.ndim))

    def fold(deltas: PyTree, direction: Direction, numbers: PyTree) -> tuple[PyTree, PyTree]:
        scalars = directional_derivatives(numbers)
        if context.groups == 1:
            return jax.tree.map(lambda d, u: add(d, u, scalars), deltas, made_dense(direction.of(0))), numbers

        def one(delta: PyTree, scalar: Array, place: Array) -> PyTree:
            own = made_dense(direction.of(place % context.groups))
            return jax.tree.map(lambda d, u: add(d, u, scalar), delta, own)

        return jax.vmap(one)(deltas, scalars, places), numbers

    return fold


def _measure_local_steps(context: RoundContext, difference: Difference, batches: PyTree, part: Part) -> Measured:
    """Measure every client's message in a round of several local steps; the client takes a plain step between them.

    Args:
      context: the context of the round.
      batches: the batches of this device's clients, [c, K, B, ...], or the arguments from which they are drawn.
      part: this device's part of the cohort.
    """
    rate = context.estimator.rate_at(zo_state(context.server.state).rounds)

    def move(x: Array, delta: Array) -> Array:
        # A client's own parameters stay in the wider dtype: its steps would be lost in bfloat16.
        return (x - rate / context.estimator.num_perturbations * delta).astype(delta.dtype)

    def all_steps(given: tuple[PyTree, Int[Array, "c"]]) -> tuple[PyTree, Float[Array, "c"]]:
        batches, places = context.batches(given[0]), given[1]
        clients, add = len(places), _add_outer(context, places)
        zero = jax.tree.map(lambda x: jnp.zeros((clients, *x.shape), working_dtype(x)), context.params)

        def local_step(local: PyTree, inputs: tuple[Int[Array, ""], PyTree]) -> tuple[PyTree, PyTree]:
            step, batch = inputs
            own, batch = gathered(context, batch)
            deltas, _, numbers = _run(context, difference, at_clients(own, local, batch, places), step, add, zero)
            return jax.tree.map(move, local, deltas), numbers

        first = jax.tree.map(lambda a: a[:, 0], batches)
        deltas, losses, numbers = _run(context, difference, at_server(*gathered(context, first), places), 0, add, zero)
        local = jax.tree.map(lambda x, delta: move(x[None], delta), context.params, deltas)
        later = jax.tree.map(lambda a: jnp.moveaxis(a[:, 1:], 1, 0), batches)
        _, rest = lax.scan(local_step, local, (jnp.arange(1, context.estimator.local_steps), later))
        join = jax.tree.map(lambda x, y: jnp.transpose(jnp.concatenate([x[None], y]), (2, 0, 1)), numbers, rest)
        return join, losses

    # The outer loop is over clients: their own parameters are in memory for one piece of the cohort at a time.
    return Measured(*part.join(in_pieces(all_steps, (batches, part.places), context.execution.stream)))
