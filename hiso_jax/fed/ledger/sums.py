"""FedKSeed's catch-up message (arXiv 2312.06353): a sum for each seed of the pool, whatever was missed.

With plain descent along directions of a pool of S, x_b = x_a + Σ_s A_s u_s, A_s = −Σ_r η_r Σ_q ĝ_{r,q} / (G·P) over the
rounds a ≤ r < b and the scalars q whose direction is s: rates are folded into the sums. The message:

    header   8 bytes: the first round, and 0xFFFFFFFE, two uint32, little-endian
    seed     8 bytes, once per client: the words of the seed key
    applied  4 bytes: of how many rounds something was applied, uint32
    sums     4·S bytes, float32

Who catches up so stands where the server is but for rounding: it adds S terms where the server made its rounds.
"""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from hiso_jax import zo
from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.codes import told
from hiso_jax.fed.keys import round_key
from hiso_jax.fed.ledger.messages import HEADER, SEED_BYTES
from hiso_jax.fed.ledger.records import Updates

SUMS = 2**32 - 2
APPLIED = struct.Struct("<I")


def sums_bytes(seeds: int) -> int:
    """Of a message of ``seeds`` sums, without header and seed."""
    return APPLIED.size + 4 * seeds


def sums_message(
    updates: Updates, synced_to: int | None, round_number: int, algorithm: Algorithm, params: PyTree
) -> bytes:
    """What a server sends a client that it invites to a round, in place of all rounds that it missed.

    Args:
      updates: the run's rounds so far, from the first.
      synced_to: the round before which the client knows all; None for one that never came.
      round_number: r.
      algorithm: of the run.
      params: only shapes are read.

    Raises:
      ValueError: the algorithm's rounds are not sums over a pool.
    """
    first, state = synced_to or 0, jax.eval_shape(algorithm.optimizer.init, params)
    (pool, rate), before = _pooled(algorithm, state), int(np.count_nonzero(updates.applied[:first]))
    groups = zo.zo_state(state).directions.groups_of(updates.clients)
    missed = updates.between(first, round_number)
    sums = np.zeros(pool.seeds)
    # Counted by rounds that were applied, as optax does.
    counts = before + np.cumsum(missed.applied) - 1
    for row in np.flatnonzero(missed.applied):
        numbers = told(jax.tree.map(lambda column, row=row: column[row], missed.aggregate), groups)
        steps, each = (jnp.arange(size) for size in numbers.shape)
        key = round_key(updates.seed_key, int(missed.round[row]))
        of_step = jax.vmap(pool.number, (None, None, 0))
        seeds = jax.vmap(of_step, (None, 0, None))(key, steps, each)
        step_size = float(rate(counts[row]) if callable(rate) else rate) / numbers.shape[1]
        np.add.at(sums, np.asarray(seeds), -step_size * np.asarray(numbers, np.float64))
    own = np.asarray(jax.random.key_data(updates.seed_key)).astype("<u4").tobytes() if synced_to is None else b""
    applied = APPLIED.pack(np.count_nonzero(missed.applied))
    return HEADER.pack(first, SUMS) + own + applied + sums.astype("<f4").tobytes()


def catch_up_by_sums(
    message: bytes, params: PyTree, state: optax.OptState, algorithm: Algorithm, *, seed_key: Key[Array, ""] | None
) -> tuple[PyTree, optax.OptState, Key[Array, ""]]:
    """A client's parameters and optimizer state after what it was sent, the server's but for rounding.

    Args:
      message: of :func:`sums_message`.
      params: what it had.
      state: what it had.
      algorithm: of the run.
      seed_key: of the run; None for a client that never came, which is sent it.

    Returns:
      (params, state, seed key).

    Raises:
      ValueError: the message is another, or the algorithm's rounds are not sums over a pool.
    """
    body, (pool, _) = message[HEADER.size :], _pooled(algorithm, state)
    if seed_key is None:
        seed_key = jax.random.wrap_key_data(jnp.asarray(np.frombuffer(body, "<u4", 2)))
        body = body[SEED_BYTES:]
    if HEADER.unpack_from(message)[1] != SUMS or len(body) != sums_bytes(pool.seeds):
        raise ValueError(f"message must hold the sums of {pool.seeds} seeds; got one of {len(message)} bytes")
    (applied,), sums = APPLIED.unpack_from(body), jnp.asarray(np.frombuffer(body, "<f4", offset=APPLIED.size))
    params = zo.apply_updates(params, _total(sums, params, pool, zo.zo_state(state).directions), seed_key)
    # All that plain descent remembers is how many rounds there were.
    return params, jax.tree.map(lambda count: count + applied, state), seed_key


def _pooled(algorithm: Algorithm, state: optax.OptState) -> tuple[zo.Pool, optax.ScalarOrSchedule]:
    """The pool, and η."""
    pool = algorithm.pool_of(state)
    if pool is None or algorithm.pooled_rate is None:
        raise ValueError("algorithm must be plain descent along the directions of a pool, as fed_kseed is")
    return pool, algorithm.pooled_rate


def _total(sums: Float[Array, "S"], params: PyTree, pool: zo.Pool, directions: zo.Directions) -> PyTree:
    """Σ_s A_s u_s."""

    def add(total: PyTree, term: tuple[Array, Array]) -> tuple[PyTree, None]:
        seed, number = term
        u = zo.direction(pool.member(seed), params, sampler=directions.sampler)
        return jax.tree.map(lambda a, z: a + number.astype(z.dtype) * z, total, u), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, zo.working_dtype(x)), params)
    return jax.jit(lambda sums: lax.scan(add, zero, (jnp.arange(len(sums)), sums))[0])(sums)
