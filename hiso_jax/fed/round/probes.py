"""Clients that measure along shared directions: their scalars (HiSo, arXiv 2506.02370, Algorithm 1).

Shapes: C clients, K local steps, P perturbations, B examples a batch. At step 0 every client stands at the server's
parameters, so many clients' examples are one flat batch through one shared set of perturbed weights; where the cohort
is dealt into G groups with directions of their own, one flat batch and one set of weights for each group. From step 1
on the clients have their own parameters, [C, ...].
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from hiso_jax.fed.devices import Part, filled, in_pieces
from hiso_jax.fed.round.prober import Prober
from hiso_jax.zo import (
    Ascent,
    Direction,
    by_direction,
    fold_directions,
    made_whole,
    rounded,
    slopes,
    working_dtype,
)

Mode = Literal["stream", "keep", "regenerate"]
"""What becomes of a direction once it is measured: it enters Δ and goes, stays for the update, or is made again."""


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

    # Columns that share every product with a matrix are one flat batch.
    together = prober.execution.flat if prober.shares_products() else prober.execution.vmapped
    # Dealt once a round, not once an evaluation.
    each = jax.tree.map(dealt, filled((batch, places), rows * columns)) if groups > 1 else None

    def evaluate(direction: Direction | None, scale: Any) -> Float[Array, "C"]:
        if direction is None or groups == 1:
            return at(prober.moved(prober.params, direction, scale, 0), batch)

        def column(given: tuple[PyTree, Int[Array, "rows"]]) -> Float[Array, "rows"]:
            own, members = given
            return at(prober.moved(prober.params, direction, scale, members[0] % groups), own)

        return _one_by_one(column, each, together // rows).T.reshape(-1)[:clients]

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
            moved = prober.moved(params, direction, scale, place % prober.groups)
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
            index, total = carry
            numbers = part.join(own)
            sent, combined = relay(numbers, index)
            # A replay reads it from the ledger; here its last product would be contracted into a sum over groups.
            told = jax.tree.map(rounded, combined)
            total, terms = direction.add_to(total, slopes(told), perturbations)
            return (index + 1, total), (numbers, sent, combined, terms)

        deal = prober.deal(0)
        (_, total), losses, (numbers, sent, combined, terms) = prober.run(
            evaluate, 0, fold, (jnp.int32(0), deal.begin())
        )
        ascent = Ascent(jax.tree.map(lambda x: x.T.reshape(1, -1), combined), deal.finish(total, terms))
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
        each = jnp.expand_dims(scalars.astype(u.dtype), range(scalars.ndim, d.ndim))
        return d + each * jnp.expand_dims(u, range(d.ndim - u.ndim))

    def fold(deltas: PyTree, direction: Direction, numbers: PyTree) -> tuple[PyTree, PyTree]:
        scalars = slopes(numbers)
        if prober.groups == 1:
            return jax.tree.map(lambda d, u: add(d, u, scalars), deltas, made_whole(direction.of(0))), numbers

        def one(delta: PyTree, scalar: Array, place: Array) -> PyTree:
            own = made_whole(direction.of(place % prober.groups))
            return jax.tree.map(lambda d, u: add(d, u, scalar), delta, own)

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
        deal,
        by_direction(slopes(aggregate)[0], prober.groups),
        lambda index: deal.again(jax.tree.map(lambda z: z[index], kept), index),
    )
    return Ascent(aggregate, delta)
