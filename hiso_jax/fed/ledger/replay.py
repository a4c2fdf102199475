"""Replay: rebuild parameters and optimizer state from the scalars of a run."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from hiso_jax.checks import ParameterError, of_kind
from hiso_jax.checks import arrays as check_arrays
from hiso_jax.fed.algorithm import Algorithm, as_algorithm
from hiso_jax.fed.devices import on_all_devices, owned
from hiso_jax.fed.keys import round_key, visits_of
from hiso_jax.fed.ledger.records import Records, Updates
from hiso_jax.fed.update import AtHand, server_update
from hiso_jax.program_cache import keep_compiled

# One program serves every number of rounds: entries past the end are padding that changes nothing.
ROUNDS_PER_DISPATCH = 64
# A round: its number, the aggregate, whether it was applied, the mean loss, or None if it is not kept, and the visits'
# rounds and places, or None in a synchronous run.
Entry = tuple[Array, PyTree, Array, Array | None, Array | None, Array | None]


def _block(tx: optax.GradientTransformationExtraArgs, clients: int) -> Callable[..., tuple[PyTree, Any]]:
    def run(params: PyTree, state: Any, seed_key: Array, entries: Entry) -> tuple[PyTree, Any]:
        def one(carry: tuple[PyTree, Any], entry: Entry) -> tuple[tuple[PyTree, Any], None]:
            number, aggregate, applied, loss, version, place = entry
            key = round_key(seed_key, number)
            visits = None if version is None or place is None else visits_of(seed_key, version, place, carry[1])
            return server_update(tx, *carry, aggregate, applied, key, clients, AtHand(loss, None, visits)), None

        return lax.scan(one, (params, state), entries)[0]

    return run


def _block_of(column: np.ndarray, *, begin: int, size: int) -> Array:
    """``size`` rows of a column from ``begin`` on, padded with zeros."""
    rows = jnp.asarray(column[begin : begin + size])
    return jnp.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))


@lru_cache(maxsize=8)
def _program(tx: optax.GradientTransformationExtraArgs, clients: int) -> Callable[..., tuple[PyTree, Any]]:
    return jax.jit(_block(tx, clients), donate_argnums=(0, 1))


def _sharded_program(
    tx: optax.GradientTransformationExtraArgs, clients: int, mesh: Mesh, carry: tuple[PyTree, Any]
) -> Callable[..., tuple[PyTree, Any]]:
    own = jax.tree.map(lambda x: x.sharding, carry)
    return jax.jit(on_all_devices(_block(tx, clients), mesh), donate_argnums=(0, 1), out_shardings=own)


def replay(
    params: PyTree,
    tx: Algorithm | optax.GradientTransformation,
    records: Records | Updates | None,
    *,
    state: optax.OptState | None = None,
    rounds_per_dispatch: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[PyTree, optax.OptState]:
    """Rebuild the parameters and the optimizer state of a run from its scalars.

    On the run's backend and jaxlib the result equals the run's, bit for bit, because both compute their updates with
    the same function (:func:`hiso_jax.zo.accumulate`, then ``tx``). DeComFL with ``rademacher`` directions and plain
    SGD is exact on every backend, because its draws are made of integers and its products are exact.

    Args:
      params: the parameters before the first of the rounds.
      tx: the optimizer of the run, or its algorithm.
      records: the rounds: ``Result.records``, or the rounds that a client receives.
      state: the optimizer's state before the first of the rounds; None for the beginning of a run.
      rounds_per_dispatch: the number of rounds to scan in one dispatch.
      mesh: the devices that ``params`` and ``state`` are split over; None if they are not split.

    Returns:
      (params, state) after the last round.

    Raises:
      ValueError: ``rounds_per_dispatch`` < 1, ``tx`` has no zeroth-order head, the records are of a method without
        scalars, or the optimizer reads the loss and the rounds do not hold it.
    """
    keep_compiled()
    if records is None:
        raise ParameterError("records", "must be of a run with at least one round, got None")
    of_kind("records", records, (Records, Updates), "the `records` of a result or the `updates` of a delta")
    check_arrays("params", params)
    if rounds_per_dispatch is not None and rounds_per_dispatch < 1:
        raise ParameterError("rounds_per_dispatch", f"must be at least 1, got {rounds_per_dispatch}")
    updates = records.updates_with_losses if isinstance(records, Records) else records
    tx = as_algorithm(tx).optimizer
    state = tx.init(params) if state is None else state
    total, size = len(updates.round), rounds_per_dispatch or ROUNDS_PER_DISPATCH
    params, state = owned((params, state))
    own = tx, updates.clients
    program = _program(*own) if mesh is None else _sharded_program(*own, mesh, (params, state))
    columns = updates.round, updates.aggregate, updates.applied, updates.loss, updates.version, updates.place
    for begin in range(0, total, size):
        entries = jax.tree.map(partial(_block_of, begin=begin, size=size), columns)
        params, state = program(params, state, updates.seed_key, entries)
    return params, state
