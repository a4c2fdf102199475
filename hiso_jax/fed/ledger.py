"""The scalar log of a run, and the replay that rebuilds the run from it."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8, Key, PyTree, UInt32

from hiso_jax.fed.keys import round_key
from hiso_jax.fed.round import RoundRecord, server_update

FORMAT = 2


class Records(NamedTuple):
    """The rounds of a run, in order: with its initial parameters and its ``tx``, all that rebuilds it.

    Attributes:
      seed_key: the run's seed key.
      round: round numbers, [R].
      cohort: the clients invited to each round, [R, C].
      attendance: what became of them, ABSENT, DROPPED, LATE or REPORTED, int8 [R, C].
      scalars: [R, C, K, P].
      valid: [R, C].
      aggregate: what was applied, [R, K, P].
      loss: [R].
    """

    seed_key: Key[Array, ""]
    round: Int[np.ndarray, "R"]
    cohort: Int[np.ndarray, "R C"]
    attendance: Int8[np.ndarray, "R C"]
    scalars: Float[np.ndarray, "R C K P"]
    valid: Bool[np.ndarray, "R C"]
    aggregate: Float[np.ndarray, "R K P"]
    loss: Float[np.ndarray, "R"]


class Ledger:
    """The growing log of a run, held in memory and written at its end or at an interrupt."""

    def __init__(self, seed_key: Key[Array, ""]) -> None:
        """An empty log of the run whose seed key is ``seed_key``."""
        self.seed_key = seed_key
        self._blocks: list[tuple[np.ndarray, ...]] = []

    def append(
        self,
        rounds: Int[np.ndarray, "R"],
        cohorts: Int[np.ndarray, "R C"],
        attendance: Int8[np.ndarray, "R C"],
        record: RoundRecord,
    ) -> None:
        """Append a block of rounds; the fields of ``record`` have a leading axis R."""
        self._blocks.append((rounds, cohorts, attendance, *(np.asarray(field) for field in record)))

    @property
    def records(self) -> Records:
        """All rounds so far.

        Raises:
          ValueError: there is none.
        """
        if not self._blocks:
            raise ValueError("the ledger is empty: no round has been run")
        return Records(self.seed_key, *(np.concatenate(column) for column in zip(*self._blocks, strict=True)))


def save(records: Records, path: Path, config: Mapping[str, Any]) -> None:
    """Write the records and the configuration of their run as an npz without pickled objects."""
    columns = {name: value for name, value in records._asdict().items() if name != "seed_key"}
    np.savez(
        path,
        format=np.int32(FORMAT),
        config=np.array(json.dumps(dict(config))),
        prng_impl=np.array(str(jax.random.key_impl(records.seed_key))),
        seed_key_data=np.asarray(jax.random.key_data(records.seed_key)),
        **columns,
    )


def load(path: Path) -> tuple[Records, dict[str, Any]]:
    """Read what :func:`save` wrote: the records and the configuration.

    Raises:
      ValueError: the file is not such a log.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            version = int(file["format"])
            if version != FORMAT:
                raise ValueError(f"ledger format {version}; this version reads {FORMAT}")
            config = json.loads(str(file["config"]))
            key_data: UInt32[np.ndarray, ...] = file["seed_key_data"]
            seed_key = jax.random.wrap_key_data(jnp.asarray(key_data), impl=str(file["prng_impl"]))
            columns = [file[name] for name in Records._fields if name != "seed_key"]
    except (KeyError, OSError, EOFError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path} is not a ledger that can be read here: {error}") from error
    return Records(seed_key, *columns), config


@partial(jax.jit, static_argnames="tx")
def _replay_block(
    params: PyTree, state: Any, seed_key: Array, block: tuple[Array, Array, Array], *, tx: Any
) -> tuple[PyTree, Any]:
    def one(carry: tuple[PyTree, Any], entry: tuple[Array, Array, Array]) -> tuple[tuple[PyTree, Any], None]:
        number, aggregate, any_valid = entry
        return server_update(tx, *carry, aggregate, any_valid, round_key(seed_key, number)), None

    return lax.scan(one, (params, state), block)[0]


def replay(
    params: PyTree,
    tx: optax.GradientTransformation,
    records: Records,
    *,
    rounds_per_dispatch: int | None = None,
) -> tuple[PyTree, optax.OptState]:
    """Rebuild the parameters and the optimizer state of a run from its scalars.

    On the backend and jaxlib of the run the result is the run's, bit for bit: both make their updates by the same
    function (:func:`hiso_jax.zo.accumulate`, and ``tx`` after it).

    Args:
      params: the initial parameters of the run.
      tx: the optimizer of the run.
      records: the rounds, as in ``Result.records``.
      rounds_per_dispatch: how many rounds to scan in one dispatch; None means all.

    Returns:
      (params, state) after the last round.

    Raises:
      ValueError: ``rounds_per_dispatch`` < 1, or a ``tx`` without a zeroth-order head.
    """
    if rounds_per_dispatch is not None and rounds_per_dispatch < 1:
        raise ValueError(f"rounds_per_dispatch must be at least 1, got {rounds_per_dispatch}")
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    entries = (records.round, records.aggregate, np.any(records.valid, axis=1))
    size = rounds_per_dispatch or max(len(records.round), 1)
    for begin in range(0, len(records.round), size):
        number, aggregate, any_valid = (jnp.asarray(column[begin : begin + size]) for column in entries)
        params, state = _replay_block(params, state, records.seed_key, (number, aggregate, any_valid), tx=tx)
    return params, state
