"""A check for divergence, made on the device so that many rounds can run in one dispatch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from hiso_jax.fed.ledger import Records, RoundRecord
from hiso_jax.fed.population import REPORTED
from hiso_jax.zo import zo_states

HIGH_LOSS_ROUNDS = 3
SILENT_ROUNDS = 10
NEVER = -1
# Stands for a loss before there is one; jax_debug_nans and jax_debug_infs would report NaN or infinity.
NO_LOSS = np.finfo(np.float32).max


class Monitor(NamedTuple):
    """The state of the divergence check, carried from round to round.

    Attributes:
      initial_loss: the mean cohort loss of the first round with a valid client; the largest float before it.
      high: the number of rounds in a row with a loss above max(10 × initial, initial + 10).
      silent: the number of rounds in a row in which clients reported and no report was valid.
      diverged_at: the round at which the run diverged, or -1.
    """

    initial_loss: Float[Array, ""]
    high: Int[Array, ""]
    silent: Int[Array, ""]
    diverged_at: Int[Array, ""]


def start() -> Monitor:
    """The monitor of a run that has not begun."""
    return Monitor(jnp.float32(NO_LOSS), jnp.int32(0), jnp.int32(0), jnp.int32(NEVER))


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _curvatures(state: Any) -> PyTree:
    return [head.curvature for head in zo_states(state)]


def watch(
    monitor: Monitor,
    round_number: Int[Array, ""],
    record: RoundRecord,
    mask: Bool[Array, "C"],
    params: PyTree,
    state: Any,
    private: bool = False,
) -> Monitor:
    """Advance the monitor by one round; ``params`` and ``state`` are those after the round.

    For a ``private`` run it checks only ``params`` and ``state``: the end of a run is public, and must not depend on
    losses without noise.
    """
    finite, loss, valid = _all_finite((params, _curvatures(state))), record.loss, record.valid.any()
    if private:
        loss, valid = jnp.zeros_like(loss), jnp.ones_like(valid)
    return _advance(monitor, round_number, loss, valid, mask.any(), finite)


def rebuilt(records: Records, params: PyTree, state: Any, private: bool = False) -> Monitor:
    """The monitor of a run after ``records``; ``params`` and ``state`` are those after the last round.

    A run ends at the round at which it diverges, so both were finite in all rounds before the last.
    """
    finite = np.ones(len(records.round), bool)
    # As one program, because on a mesh no device may be able to hold an entire parameter.
    finite[-1] = jax.jit(_all_finite)((params, _curvatures(state)))
    reported = (records.attendance == REPORTED).any(1)
    loss, valid = records.loss, records.valid.any(1)
    if private:
        loss, valid = np.zeros_like(loss), np.ones_like(valid)
    columns = records.round, loss, valid, reported, finite
    rounds = tuple(map(jnp.asarray, columns))
    return lax.scan(lambda monitor, each: (_advance(monitor, *each), None), start(), rounds)[0]


def _advance(
    monitor: Monitor,
    round_number: Int[Array, ""],
    loss: Float[Array, ""],
    any_valid: Bool[Array, ""],
    anybody: Bool[Array, ""],
    finite: Bool[Array, ""],
) -> Monitor:
    loss = loss.astype(jnp.float32)
    is_first = any_valid & (monitor.initial_loss == NO_LOSS) & ~jnp.isnan(loss)
    initial = jnp.where(is_first, loss, monitor.initial_loss)
    ceiling = jnp.maximum(10 * initial, initial + 10)
    high = jnp.where(any_valid, jnp.where(loss > ceiling, monitor.high + 1, 0), monitor.high)
    silent = jnp.where(anybody, jnp.where(any_valid, 0, monitor.silent + 1), monitor.silent)
    diverged = ~finite | (high >= HIGH_LOSS_ROUNDS) | (silent >= SILENT_ROUNDS)
    first = diverged & (monitor.diverged_at == NEVER)
    return Monitor(initial, high, silent, jnp.where(first, round_number, monitor.diverged_at))
