"""The losses of clients at perturbed parameters: those of the server, or the clients' own.

Shapes: C clients, B examples in a batch, G groups of directions.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from hiso_jax.fed.devices import filled, in_pieces, looped_once
from hiso_jax.fed.measure.context import RoundContext
from hiso_jax.zo import Direction, GroupedDirections, HadamardDirections, perturb, shares_matmuls, zo_state

Evaluate = Callable[[Direction | None, Any], Array]
"""(direction p of all groups, or None; scale) → client losses [C]."""


def directions_of(context: RoundContext, step: int | Array) -> GroupedDirections | HadamardDirections:
    """The directions of a local step."""
    perturbations, head = context.estimator.num_perturbations, zo_state(context.server.state)
    return head.grouped_directions(
        context.keys.round, step, context.params, groups=context.groups, num_perturbations=perturbations
    )


def gathered(context: RoundContext, batches: PyTree) -> tuple[RoundContext, PyTree]:
    """The context and batches with the examples of ``batches`` [..., B] gathered, if these fit the memory.

    They are gathered once for all forward passes, because an accelerator read the entire training set for each gather.
    """
    rows = math.prod(jax.tree.leaves(batches)[0].shape[:-1])
    if context.examples is None or rows > context.execution.gathered:
        return context, batches
    return context._replace(examples=None), context.fetch(batches)


def _perturbed(context: RoundContext, params: PyTree, direction: Direction | None, scale: Any, group: Any) -> PyTree:
    """``params`` perturbed along a group's direction, or unchanged if ``direction`` is None."""
    return params if direction is None else perturb(params, direction.of(group), scale, context.perturbed_as)


def at_server(context: RoundContext, batch: PyTree, places: Int[Array, "C"]) -> Evaluate:
    """Client losses [C] at shared parameters perturbed along the direction of each client's group.

    A group's part of ``batch`` [C, B, ...] is one flat batch.

    Args:
      context: the context of the round.
      batch: the batches of these clients.
      places: the consecutive places of these clients in the cohort; place c is in group c mod G.
    """
    clients, groups = len(places), context.groups
    # Places are consecutive, so in rows of ``columns`` places each column holds clients of one group.
    columns = min(clients, groups)
    rows = -(-clients // columns)

    def at(params: PyTree, batch: PyTree) -> Float[Array, "c"]:
        def piece(part: PyTree) -> Float[Array, "c"]:
            examples = context.fetch(part)
            count = jax.tree.leaves(examples)[0].shape[0]
            flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), examples)
            return context.mean_losses(params, flat, count)

        if context.is_alone:
            return looped_once(piece, jax.tree.map(lambda a: a[:, None], batch), places)[:, 0]
        return in_pieces(piece, batch, context.execution.flat)

    def in_groups(a: Array) -> Array:
        return a.reshape(rows, columns, *a.shape[1:]).swapaxes(0, 1)

    # Columns that share every product with a weight matrix form one flat batch.
    direction = jax.eval_shape(lambda: directions_of(context, 0).at(0).of(0))
    shared = shares_matmuls(context.params, direction, context.perturbed_as)
    together = _together(context, context.execution.flat if shared else context.execution.vmapped)
    # Arranged by group once for each round, not for each forward pass.
    each = jax.tree.map(in_groups, filled((batch, places), rows * columns)) if groups > 1 else None

    def evaluate(direction: Direction | None, scale: Any) -> Float[Array, "C"]:
        if direction is None or groups == 1:
            return at(_perturbed(context, context.params, direction, scale, 0), batch)

        def column(given: tuple[PyTree, Int[Array, "rows"]]) -> Float[Array, "rows"]:
            own, members = given
            return at(_perturbed(context, context.params, direction, scale, members[0] % groups), own)

        if context.is_alone:
            return looped_once(column, each, places).T.reshape(-1)
        return _one_by_one(column, each, together // rows).T.reshape(-1)[:clients]

    return evaluate


def _together(context: RoundContext, wanted: int) -> int:
    """The rows in one vmap; 1 if a vmap over groups would change their draws, as with generators such as rbg."""
    draws = context.groups > 1 and zo_state(context.server.state).directions.block == 0
    alike = str(jax.random.key_impl(context.keys.round)) == "threefry2x32"
    return 1 if draws and not alike else wanted


def _one_by_one(function: Callable[[PyTree], PyTree], inputs: PyTree, together: int) -> PyTree:
    """Apply ``function`` to every row of ``inputs``, ``together`` rows in one vmap."""
    # One row at a time does not use vmap: even a vmap over one turns convolutions into grouped ones.
    return lax.map(function, inputs) if together <= 1 else in_pieces(jax.vmap(function), inputs, together)


def at_clients(context: RoundContext, local: PyTree, batch: PyTree, places: Int[Array, "C"]) -> Evaluate:
    """Client losses [C] at the clients' own parameters ``local`` [C, ...], perturbed along their group's direction."""

    def evaluate(direction: Direction | None, scale: Any) -> Float[Array, "C"]:
        def one(client: tuple[PyTree, PyTree, Int[Array, ""]]) -> Float[Array, ""]:
            params, part, place = client
            perturbed = _perturbed(context, params, direction, scale, place % context.groups)
            return context.mean_losses(perturbed, context.fetch(part))[0]

        if context.is_alone:
            return looped_once(one, (local, batch, places), places)
        return _one_by_one(one, (local, batch, places), _together(context, context.execution.vmapped))

    return evaluate
