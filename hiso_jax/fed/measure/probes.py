"""Clients that measure along shared directions: their scalars (HiSo, arXiv 2506.02370, Algorithm 1).

Shapes: C clients, K local steps, P perturbations, B examples a batch. At step 0 every client stands at the server's
parameters, so many clients' examples are one flat batch through one shared set of perturbed weights; where the cohort
is dealt into G groups with directions of their own, one flat batch and one set of weights for each group. From step 1
on the clients have their own parameters, [C, ...].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from hiso_jax.checks import ParameterError
from hiso_jax.fed.devices import Part, filled, in_pieces, keeps_directions
from hiso_jax.fed.measure.context import Cohort, Estimator, Measured, RoundContext
from hiso_jax.zo import (
    Ascent,
    Difference,
    DifferenceName,
    Direction,
    GroupedDirections,
    LowRank,
    as_difference,
    by_direction,
    directional_derivatives,
    fold_directions,
    made_dense,
    perturb,
    probe,
    rounded,
    shares_matmuls,
    working_dtype,
    zo_state,
)

Mode = Literal["stream", "keep", "regenerate"]
"""What becomes of a direction once it is measured: it enters Δ and goes, stays for the update, or is made again."""


@dataclass(frozen=True)
class Probes:
    """A client measures finite differences along the directions that the head's state names, and sends the numbers.

    Its message is an array of scalars [K, P], or a tree of such arrays if the difference gives several numbers.

    Attributes:
      difference: which losses, and the numbers that are made of them.
    """

    difference: Difference
    has_scalars: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("perturbations", "mu", "difference", "directions")

    @property
    def description(self) -> list[Any]:
        """The places, in units of μ, at which it takes losses."""
        return list(self.difference.offsets)

    def passes(self, local_steps: int, num_perturbations: int) -> int:
        """Evaluations of its loss that a client makes in a round."""
        return local_steps * self.difference.passes(num_perturbations)

    def message_shapes(self, estimator: Estimator, params: PyTree, clients: int, dtype: Any) -> PyTree:
        """Scalars [C, K, P], or a tree of them.

        Raises:
          ValueError: a difference whose numbers the ledger has no columns for.
        """
        shape = clients, estimator.local_steps, estimator.num_perturbations
        losses = [jax.ShapeDtypeStruct(shape, dtype)] * len(self.difference.offsets)
        shapes = jax.eval_shape(lambda losses: self.difference.estimates(losses, 1.0), losses)
        _check_names(shapes)
        return shapes

    def measure(self, context: RoundContext, cohort: Cohort, part: Part) -> Measured:
        """Every client's scalars."""
        if context.estimator.local_steps > 1:
            return _measure_local_steps(context, self.difference, cohort.batches, part)
        return _measure_once(context, self.difference, cohort.batches, part)

    def ascent(self, context: RoundContext, measured: Measured, aggregate: PyTree) -> Ascent | None:
        """Δ, made while the directions were measured, or of those that were kept."""
        if measured.kept is None:
            return measured.ascent
        kept, directions = measured.kept, _directions(context, 0)
        delta = fold_directions(
            directions,
            by_direction(directional_derivatives(aggregate)[0], context.groups),
            lambda index: directions.again(jax.tree.map(lambda z: z[index], kept), index),
        )
        return Ascent(aggregate, delta)


def probes(difference: Difference | DifferenceName = "forward") -> Probes:
    """Finite differences along shared directions; ``difference`` itself or by name."""
    return Probes(as_difference(difference))


def _check_names(numbers: PyTree) -> None:
    """Refuse numbers of a direction that the ledger has no columns for.

    Raises:
      ValueError: they are neither an array nor nested dicts of arrays, with names without dots.
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
    """What becomes of directions: as asked for; else they stay or enter Δ at once where that pays."""
    streams, params = context.relay is not None, context.params
    directions, asked = zo_state(context.server.state).directions, context.settings.directions
    if not streams and directions.block == 0:
        # Every group's own draws, G·P of them, are too many to stay.
        return "regenerate"
    copies = 2 if streams else context.estimator.num_perturbations + 1
    # Factors cost nothing to be made again.
    dear = not isinstance(directions.sampler, LowRank) and context.estimator.local_steps == 1
    if asked is None and dear and keeps_directions(params, context.settings.memory_budget, copies):
        asked = "keep"
    return "regenerate" if asked != "keep" else "stream" if streams else "keep"


def _gathered(context: RoundContext, batches: PyTree) -> tuple[RoundContext, PyTree]:
    """The examples of ``batches`` [..., B], if they fit the memory, and the context that reads such batches.

    Once for all evaluations: an accelerator went through the whole training set for each.
    """
    rows = math.prod(jax.tree.leaves(batches)[0].shape[:-1])
    if context.examples is None or rows > context.execution.gathered:
        return context, batches
    return context._replace(examples=None), context.fetch(batches)


def _perturbed(context: RoundContext, params: PyTree, direction: Direction | None, scale: Any, group: Any) -> PyTree:
    """``params`` perturbed along a group's direction, or as they are."""
    return params if direction is None else perturb(params, direction.of(group), scale, context.perturbed_as)


def _directions(context: RoundContext, step: int | Array) -> GroupedDirections:
    """The directions of a local step."""
    perturbations, head = context.estimator.num_perturbations, zo_state(context.server.state)
    return head.grouped_directions(
        context.keys.round, step, context.params, groups=context.groups, num_perturbations=perturbations
    )


def _run(
    context: RoundContext, difference: Difference, evaluate: Callable, step: int | Array, fold: Callable, init: PyTree
) -> tuple[PyTree, Array, PyTree]:
    """:func:`hiso_jax.zo.probe` along the directions of a local step."""
    return probe(
        evaluate,
        _directions(context, step).at,
        difference,
        num_perturbations=context.estimator.num_perturbations,
        mu=context.estimator.mu,
        fold=fold,
        init=init,
    )


Evaluate = Callable[[Direction | None, Any], Array]
"""(a direction as every group has it, or None; scale) → client losses [C]."""


def _at_server(context: RoundContext, batch: PyTree, places: Int[Array, "C"]) -> Evaluate:
    """Client losses [C] at shared parameters perturbed along the direction of each client's group.

    A group's part of ``batch`` [C, B, ...] is evaluated flat.

    Args:
      context: of the round.
      batch: of these clients.
      places: of these clients in the cohort, consecutive; place c is in group c mod G.
    """
    clients, groups = len(places), context.groups
    # Consecutive places: column j of rows of n holds one group.
    columns = min(clients, groups)
    rows = -(-clients // columns)

    def at(params: PyTree, batch: PyTree) -> Float[Array, "c"]:
        def piece(part: PyTree) -> Float[Array, "c"]:
            examples = context.fetch(part)
            count = jax.tree.leaves(examples)[0].shape[0]
            flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), examples)
            return context.mean_losses(params, flat, count)

        return in_pieces(piece, batch, context.execution.flat)

    def dealt(a: Array) -> Array:
        return a.reshape(rows, columns, *a.shape[1:]).swapaxes(0, 1)

    # Columns that share every product with a matrix are one flat batch.
    direction = jax.eval_shape(lambda: _directions(context, 0).at(0).of(0))
    shared = shares_matmuls(context.params, direction, context.perturbed_as)
    together = context.execution.flat if shared else context.execution.vmapped
    # Dealt once a round, not once an evaluation.
    each = jax.tree.map(dealt, filled((batch, places), rows * columns)) if groups > 1 else None

    def evaluate(direction: Direction | None, scale: Any) -> Float[Array, "C"]:
        if direction is None or groups == 1:
            return at(_perturbed(context, context.params, direction, scale, 0), batch)

        def column(given: tuple[PyTree, Int[Array, "rows"]]) -> Float[Array, "rows"]:
            own, members = given
            return at(_perturbed(context, context.params, direction, scale, members[0] % groups), own)

        return _one_by_one(column, each, together // rows).T.reshape(-1)[:clients]

    return evaluate


def _one_by_one(function: Callable[[PyTree], PyTree], inputs: PyTree, together: int) -> PyTree:
    """``function`` of every row of ``inputs``, so many in one vmap."""
    # Not a vmap of one where one row is asked for: even that makes convolutions grouped.
    return lax.map(function, inputs) if together <= 1 else in_pieces(jax.vmap(function), inputs, together)


def _at_clients(context: RoundContext, local: PyTree, batch: PyTree, places: Int[Array, "C"]) -> Evaluate:
    """Client losses [C] at the clients' own parameters ``local`` [C, ...], perturbed along their groups' direction."""

    def evaluate(direction: Direction | None, scale: Any) -> Float[Array, "C"]:
        def one(client: tuple[PyTree, PyTree, Int[Array, ""]]) -> Float[Array, ""]:
            params, part, place = client
            perturbed = _perturbed(context, params, direction, scale, place % context.groups)
            return context.mean_losses(perturbed, context.fetch(part))[0]

        return _one_by_one(one, (local, batch, places), context.execution.vmapped)

    return evaluate


def _as_messages(numbers: PyTree) -> PyTree[Shaped[Array, "C 1 P"]]:
    """The outputs of one local step, [P, C], as messages."""
    return jax.tree.map(lambda x: x.T[:, None], numbers)


def _measure_once(context: RoundContext, difference: Difference, batches: PyTree, part: Part) -> Measured:
    """Every client's message of a round of one local step.

    The directions stand outside and the clients inside: however many pieces, a direction is made once to be measured.
    To stream is to aggregate each perturbation before the next direction is made; Δ then grows by the arithmetic of
    ``zo.accumulate`` meanwhile.

    Args:
      context: of the round.
      batches: of this device's clients, [c, 1, B, ...], or what they are drawn for.
      part: this device's place among others.
    """
    first = jax.tree.map(lambda a: a[:, 0], context.drawn(batches, context.execution.stream))
    evaluate = _at_server(*_gathered(context, first), part.places)
    perturbations = context.estimator.num_perturbations
    mode, relay = _mode(context), context.relay
    if mode == "stream":
        assert relay is not None

        def fold(carry: tuple[Array, PyTree], direction: Direction, own: PyTree) -> tuple[tuple[Array, PyTree], Any]:
            index, total = carry
            numbers = part.join(own)
            sent, combined = relay(numbers, index)
            # A replay reads it from the ledger; here its last product would be contracted into a sum over groups.
            received = jax.tree.map(rounded, combined)
            total, terms = direction.add_to(total, directional_derivatives(received), perturbations)
            return (index + 1, total), (numbers, sent, combined, terms)

        directions = _directions(context, 0)
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
    """Add each client's scalar times its direction to its own Σ_p g_p z_p, [C, ...]."""

    # Not as a matrix product, which accelerators would round to fewer bits.
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
    """Every client's message of a round of several local steps, between which it takes plain steps of its own.

    Args:
      context: of the round.
      batches: of this device's clients, [c, K, B, ...], or what they are drawn for.
      part: this device's place among others.
    """
    rate = context.estimator.rate_at(zo_state(context.server.state).rounds)

    def move(x: Array, delta: Array) -> Array:
        # In the wider dtype, which a client's own parameters keep: bfloat16 would lose its steps.
        return (x - rate / context.estimator.num_perturbations * delta).astype(delta.dtype)

    def all_steps(given: tuple[PyTree, Int[Array, "c"]]) -> tuple[PyTree, Float[Array, "c"]]:
        batches, places = context.batches(given[0]), given[1]
        clients, add = len(places), _add_outer(context, places)
        zero = jax.tree.map(lambda x: jnp.zeros((clients, *x.shape), working_dtype(x)), context.params)

        def local_step(local: PyTree, inputs: tuple[Int[Array, ""], PyTree]) -> tuple[PyTree, PyTree]:
            step, batch = inputs
            own, batch = _gathered(context, batch)
            deltas, _, numbers = _run(context, difference, _at_clients(own, local, batch, places), step, add, zero)
            return jax.tree.map(move, local, deltas), numbers

        first = jax.tree.map(lambda a: a[:, 0], batches)
        deltas, losses, numbers = _run(
            context, difference, _at_server(*_gathered(context, first), places), 0, add, zero
        )
        local = jax.tree.map(lambda x, delta: move(x[None], delta), context.params, deltas)
        later = jax.tree.map(lambda a: jnp.moveaxis(a[:, 1:], 1, 0), batches)
        _, rest = lax.scan(local_step, local, (jnp.arange(1, context.estimator.local_steps), later))
        join = jax.tree.map(lambda x, y: jnp.transpose(jnp.concatenate([x[None], y]), (2, 0, 1)), numbers, rest)
        return join, losses

    # The clients outside: their own parameters exist for one piece of the cohort at a time.
    return Measured(*part.join(in_pieces(all_steps, (batches, part.places), context.execution.stream)))
