"""Clients that measure along shared directions: their scalars (HiSo, arXiv 2506.02370, Algorithm 1).

Shapes: C clients, K local steps, P perturbations, B examples a batch. At step 0 every client stands at the server's
parameters, so many clients' examples are one flat batch through one shared set of perturbed weights; where the cohort
is dealt into G groups with directions of their own, one flat batch and one set of weights for each group. From step 1
on the clients have their own parameters, [C, ...].
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from hiso_jax.fed.devices import Execution, Part, filled, in_pieces
from hiso_jax.fed.round.inputs import Data, Estimator
from hiso_jax.zo import (
    Ascent,
    Deal,
    Difference,
    Direction,
    ScaleByZoState,
    by_direction,
    fold_directions,
    perturb,
    probe,
    slopes,
    working_dtype,
    zero_direction,
)

Mode = Literal["stream", "keep", "regenerate"]
"""What becomes of a direction once it is measured: it enters Δ and goes, stays for the update, or is made again."""


class Prober(NamedTuple):
    """All that a cohort needs to measure in a round.

    Attributes:
      estimator: how to measure.
      difference: of which losses.
      execution: how many clients to take through memory at a time.
      data: where batches come from.
      params: x_r.
      head: the optimizer's, which names the directions.
      round_key: from which they are made.
      groups: G, into which the cohort is dealt.
    """

    estimator: Estimator
    difference: Difference
    execution: Execution
    data: Data
    params: PyTree
    head: ScaleByZoState
    round_key: Any
    groups: int

    def gathered(self, batches: PyTree) -> tuple["Prober", PyTree]:
        """The examples of ``batches`` [..., B], if they fit the memory, and the prober that reads such batches.

        Once for all evaluations: an accelerator went through the whole training set for each.
        """
        if self.data.examples is None or math.prod(jax.tree.leaves(batches)[0].shape[:-1]) > self.execution.gathered:
            return self, batches
        return self._replace(data=self.data._replace(examples=None)), self.data.fetch(batches)

    def deal(self, step: int | Array) -> Deal:
        """The directions of a local step."""
        perturbations = self.estimator.num_perturbations
        return self.head.deal(self.round_key, step, self.params, groups=self.groups, num_perturbations=perturbations)

    def run(self, evaluate: Callable, step: int | Array, fold: Callable, init: PyTree) -> tuple[PyTree, Array, PyTree]:
        """:func:`hiso_jax.zo.probe` along the directions of a local step."""
        return probe(
            evaluate,
            self.deal(step).at,
            self.difference,
            num_perturbations=self.estimator.num_perturbations,
            mu=self.estimator.mu,
            fold=fold,
            init=init,
        )


class Measured(NamedTuple):
    """What a cohort measured.

    Attributes:
      messages: every client's numbers, a tree of [C, K, P] arrays.
      losses: every client's where the round began, [C].
      sent: the messages after the channels, if they were sent while the directions went by.
      ascent: the aggregate and Δ, if they were made while the directions went by.
      kept: the draws of the directions, a tree of [P, ...] arrays, if they stay for the update.
    """

    messages: PyTree[Shaped[Array, "C K P"]]
    losses: Float[Array, "C"]
    sent: PyTree[Shaped[Array, "C K P"]] | None = None
    ascent: Ascent | None = None
    kept: PyTree | None = None


Evaluate = Callable[[Direction | None, Any], Array]
"""(a direction as every group has it, or None; scale) → client losses [C]."""


def _moved(prober: Prober, params: PyTree, direction: Direction | None, scale: Any, group: Any) -> PyTree:
    return params if direction is None else perturb(params, direction.of(group), scale)


def _at_server(prober: Prober, batch: PyTree, places: Int[Array, "C"]) -> Evaluate:
    """Client losses [C] at shared parameters moved along the direction of each client's group.

    A group's part of ``batch`` [C, B, ...] is evaluated flat.

    Args:
      prober: what the cohort needs.
      batch: of these clients.
      places: of these clients in the cohort, consecutive; place c is in group c mod G.
    """
    clients, groups = len(places), prober.groups
    # Consecutive places: column j of rows of n holds one group.
    columns = min(clients, groups)
    rows = -(-clients // columns)

    def at(params: PyTree, batch: PyTree) -> Float[Array, "c"]:
        def piece(part: PyTree) -> Float[Array, "c"]:
            examples = prober.data.fetch(part)
            count = jax.tree.leaves(examples)[0].shape[0]
            flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), examples)
            return prober.data.mean_losses(params, flat, count)

        return in_pieces(piece, batch, prober.execution.flat)

    def dealt(a: Array) -> Array:
        return a.reshape(rows, columns, *a.shape[1:]).swapaxes(0, 1)

    # Dealt once a round, not once an evaluation.
    each = jax.tree.map(dealt, filled((batch, places), rows * columns)) if groups > 1 else None

    def evaluate(direction: Direction | None, scale: Any) -> Float[Array, "C"]:
        if direction is None or groups == 1:
            return at(_moved(prober, prober.params, direction, scale, 0), batch)

        def column(given: tuple[PyTree, Int[Array, "rows"]]) -> Float[Array, "rows"]:
            own, members = given
            return at(_moved(prober, prober.params, direction, scale, members[0] % groups), own)

        return _one_by_one(column, each, prober.execution.vmapped // rows).T.reshape(-1)[:clients]

    return evaluate


def _one_by_one(function: Callable[[PyTree], PyTree], inputs: PyTree, together: int) -> PyTree:
    """``function`` of every row of ``inputs``, so many in one vmap."""
    # Not a vmap of one where one row is asked for: even that makes convolutions grouped.
    return lax.map(function, inputs) if together <= 1 else in_pieces(jax.vmap(function), inputs, together)


def _at_clients(prober: Prober, local: PyTree, batch: PyTree, places: Int[Array, "C"]) -> Evaluate:
    """Client losses [C] at the clients' own parameters ``local`` [C, ...], moved along their groups' direction."""

    def evaluate(direction: Direction | None, scale: Any) -> Float[Array, "C"]:
        def one(client: tuple[PyTree, PyTree, Int[Array, ""]]) -> Float[Array, ""]:
            params, part, place = client
            moved = _moved(prober, params, direction, scale, place % prober.groups)
            return prober.data.mean_losses(moved, prober.data.fetch(part))[0]

        return _one_by_one(one, (local, batch, places), prober.execution.vmapped)

    return evaluate


def _as_messages(numbers: PyTree) -> PyTree[Shaped[Array, "C 1 P"]]:
    """The outputs of one local step, [P, C], as messages."""
    return jax.tree.map(lambda x: x.T[:, None], numbers)


def measure_once(
    prober: Prober,
    batches: PyTree,
    part: Part,
    mode: Mode,
    relay: Callable[[PyTree[Shaped[Array, "C"]], Array], tuple[PyTree, PyTree]],
) -> Measured:
    """Every client's message of a round of one local step.

    The directions stand outside and the clients inside: however many pieces, a direction is made once to be measured.

    Args:
      prober: what the cohort needs.
      batches: of this device's clients, [c, 1, B, ...], or what they are drawn for.
      part: this device's place among others.
      mode: ``"stream"`` aggregates each perturbation before the next direction is made, and Δ grows by the arithmetic
        of ``zo.accumulate`` while the directions go by; ``"keep"`` holds all P of them.
      relay: (one number of all clients, p) → (what is sent, its aggregate); called to stream only.
    """
    first = jax.tree.map(lambda a: a[:, 0], prober.data.drawn(batches, prober.execution.stream))
    evaluate = _at_server(*prober.gathered(first), part.places)
    perturbations = prober.estimator.num_perturbations
    if mode == "stream":

        def fold(carry: tuple[Array, PyTree], direction: Direction, own: PyTree) -> tuple[tuple[Array, PyTree], Any]:
            index, delta = carry
            numbers = part.join(own)
            sent, combined = relay(numbers, index)
            return (index + 1, direction.add_to(delta, slopes(combined), perturbations)), (numbers, sent, combined)

        start = jnp.int32(0), zero_direction(prober.params)
        (_, delta), losses, (numbers, sent, combined) = prober.run(evaluate, 0, fold, start)
        ascent = Ascent(jax.tree.map(lambda x: x.T.reshape(1, -1), combined), delta)
        return Measured(_as_messages(numbers), part.join(losses), _as_messages(sent), ascent)
    keep = mode == "keep"
    _, losses, (numbers, kept) = prober.run(
        evaluate, 0, lambda carry, direction, own: (carry, (own, direction.whole if keep else None)), None
    )
    messages, losses = part.join((_as_messages(numbers), losses))
    return Measured(messages, losses, kept=kept)


def _add_outer(prober: Prober, places: Int[Array, "C"]) -> Callable[[PyTree, Direction, PyTree], tuple[PyTree, PyTree]]:
    """Add each client's scalar times its direction to its own Σ_p g_p z_p, [C, ...]."""

    # Not as a matrix product, which accelerators would round to fewer bits.
    def add(d: Array, u: Array, scalars: Array) -> Array:
        return d + jnp.expand_dims(scalars.astype(u.dtype), range(scalars.ndim, d.ndim)) * u

    def fold(deltas: PyTree, direction: Direction, numbers: PyTree) -> tuple[PyTree, PyTree]:
        scalars = slopes(numbers)
        if prober.groups == 1:
            return jax.tree.map(lambda d, u: add(d, u, scalars), deltas, direction.of(0)), numbers

        def one(delta: PyTree, scalar: Array, place: Array) -> PyTree:
            return jax.tree.map(lambda d, u: add(d, u, scalar), delta, direction.of(place % prober.groups))

        return jax.vmap(one)(deltas, scalars, places), numbers

    return fold


def measure_local_steps(prober: Prober, batches: PyTree, part: Part) -> Measured:
    """Every client's message of a round of several local steps, between which it takes plain steps of its own.

    Args:
      prober: what the cohort needs.
      batches: of this device's clients, [c, K, B, ...], or what they are drawn for.
      part: this device's place among others.
    """
    rate = prober.estimator.rate_at(prober.head.rounds)

    def move(x: Array, delta: Array) -> Array:
        # In the wider dtype, which a client's own parameters keep: bfloat16 would lose its steps.
        return (x - rate / prober.estimator.num_perturbations * delta).astype(delta.dtype)

    def all_steps(given: tuple[PyTree, Int[Array, "c"]]) -> tuple[PyTree, Float[Array, "c"]]:
        batches, places = prober.data.batches(given[0]), given[1]
        clients, add = len(places), _add_outer(prober, places)
        zero = jax.tree.map(lambda x: jnp.zeros((clients, *x.shape), working_dtype(x)), prober.params)

        def local_step(local: PyTree, inputs: tuple[Int[Array, ""], PyTree]) -> tuple[PyTree, PyTree]:
            step, batch = inputs
            own, batch = prober.gathered(batch)
            deltas, _, numbers = prober.run(_at_clients(own, local, batch, places), step, add, zero)
            return jax.tree.map(move, local, deltas), numbers

        first = jax.tree.map(lambda a: a[:, 0], batches)
        deltas, losses, numbers = prober.run(_at_server(*prober.gathered(first), places), 0, add, zero)
        local = jax.tree.map(lambda x, delta: move(x[None], delta), prober.params, deltas)
        later = jax.tree.map(lambda a: jnp.moveaxis(a[:, 1:], 1, 0), batches)
        _, rest = lax.scan(local_step, local, (jnp.arange(1, prober.estimator.local_steps), later))
        join = jax.tree.map(lambda x, y: jnp.transpose(jnp.concatenate([x[None], y]), (2, 0, 1)), numbers, rest)
        return join, losses

    # The clients outside: their own parameters exist for one piece of the cohort at a time.
    return Measured(*part.join(in_pieces(all_steps, (batches, part.places), prober.execution.stream)))


def ascent_of(prober: Prober, measured: Measured, aggregate: PyTree) -> Ascent | None:
    """The Δ that is at hand, with the scalars that it was made of; None if it has to be made again."""
    if measured.kept is None:
        return measured.ascent
    kept, deal = measured.kept, prober.deal(0)
    delta = fold_directions(
        lambda index: deal.again(jax.tree.map(lambda z: z[index], kept), index),
        by_direction(slopes(aggregate)[0], prober.groups),
        zero_direction(prober.params),
    )
    return Ascent(aggregate, delta)
