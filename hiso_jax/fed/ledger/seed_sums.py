"""FedKSeed's sums (arXiv 2312.06353): one value for each seed of the pool, however many rounds a client missed.

For plain descent along directions from a pool of S seeds, x_b = x_a + Σ_s A_s u_s with
A_s = −Σ_r η_r Σ_q ĝ_{r,q} / (G·P) over the rounds a ≤ r < b and the scalars q whose direction is s: the sums include
the learning rates. A client that receives the sums has the server's parameters up to rounding, because it adds S terms
where the server applied its rounds one by one.
"""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from hiso_jax import zo
from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.codes import received
from hiso_jax.fed.keys import round_key
from hiso_jax.fed.ledger.records import Updates

APPLIED = struct.Struct("<I")


def sums_bytes(seeds: int) -> int:
    """The bytes of the sums of ``seeds`` seeds and of the number of rounds in them."""
    return APPLIED.size + 4 * seeds


def pack_sums(updates: Updates, first: int, end: int, algorithm: Algorithm, state: optax.OptState) -> bytes:
    """The rounds ``first`` ≤ r < ``end`` as sums.

    Args:
      updates: the run's rounds, from the first.
      first: the round at which the client was last synced.
      end: the round up to which the client is to be synced.
      algorithm: the run's algorithm, which has a pool.
      state: the optimizer's state; only its static part is read.
    """
    pool, rate, missed = algorithm.pool_of(state), algorithm.pooled_rate, updates.between(first, end)
    assert pool is not None
    assert rate is not None
    sums, applied = np.zeros(pool.seeds), np.flatnonzero(missed.applied)
    if len(applied):
        groups = zo.zo_state(state).directions.groups_of(updates.clients)
        numbers = jax.vmap(lambda aggregate: received(aggregate, groups))(
            jax.tree.map(lambda column: jnp.asarray(column)[applied], missed.aggregate)
        )
        _, steps, each = map(jnp.arange, numbers.shape)
        keys = jax.vmap(round_key, (None, 0))(updates.seed_key, jnp.asarray(missed.round[applied]))
        at_step = jax.vmap(pool.number, (None, None, 0))
        seeds = jax.vmap(jax.vmap(at_step, (None, 0, None)), (0, None, None))(keys, steps, each)
        # A schedule counts the applied rounds, as optax does.
        counts = np.count_nonzero(updates.applied[:first]) + np.arange(len(applied))
        rates = np.array([float(rate(count) if callable(rate) else rate) for count in counts])
        np.add.at(sums, np.asarray(seeds), -rates[:, None, None] / len(each) * np.asarray(numbers, np.float64))
    return APPLIED.pack(len(applied)) + sums.astype("<f4").tobytes()


def add_sums(
    body: bytes, params: PyTree, state: optax.OptState, algorithm: Algorithm, seed_key: Key[Array, ""]
) -> tuple[PyTree, optax.OptState]:
    """Parameters and optimizer state after the rounds of :func:`pack_sums`, equal to the server's up to rounding.

    Raises:
      ValueError: the algorithm has no pool, or a pool of another size.
    """
    pool = algorithm.pool_of(state)
    if pool is None or len(body) != sums_bytes(pool.seeds):
        raise ValueError("message must be of the run's algorithm; this one holds the sums of another pool of seeds")
    (applied,), sums = APPLIED.unpack_from(body), jnp.asarray(np.frombuffer(body, "<f4", offset=APPLIED.size))
    in_order = zo.Directions(zo.zo_state(state).directions.sampler, key=zo.in_order)
    # The mean over S directions of S times the sums.
    total = zo.accumulate(seed_key, pool.seeds * sums, params, sampler=in_order)
    # The only state of plain descent is the number of applied rounds.
    return zo.apply_updates(params, total, seed_key), jax.tree.map(lambda count: count + applied, state)
