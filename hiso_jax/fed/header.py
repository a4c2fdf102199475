"""What a ledger says of its run before the first round (``docs/formats.md``)."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from hiso_jax.fed.config import SimulationConfig
from hiso_jax.fed.fingerprint import contents
from hiso_jax.fed.frames import VERSION
from hiso_jax.fed.ledger import as_columns
from hiso_jax.fed.records import layout
from hiso_jax.fed.round import RoundRecord
from hiso_jax.fed.storage import environment

# How a run is computed, which changes none of its numbers.
EXECUTION = ("rounds_per_dispatch", "client_chunk", "memory_budget", "directions")


def header_of(
    config: SimulationConfig,
    seed_key: Key[Array, ""],
    params: PyTree,
    state: PyTree,
    *,
    base: Mapping[str, str | None],
    data: str,
    record: RoundRecord,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The header of a run's ledger.

    Args:
      config: the run's numbers.
      seed_key: its seed key.
      params, state: its parameters and optimizer state, or their shapes.
      base: the fingerprints of what it begins with.
      data: the fingerprint of its training data, their partition and who shows up.
      record: the shapes of a dispatch's rounds.
      about: what its owner says of it.
    """
    rate = config.local_learning_rate
    return {
        "format": VERSION,
        "columns": as_columns(layout(record)),
        "seed": np.asarray(jax.random.key_data(seed_key)).tolist(),
        "prng_impl": str(jax.random.key_impl(seed_key)),
        "config": asdict(config) | {"local_learning_rate": "a schedule" if callable(rate) else rate},
        "about": dict(about),
        "params": contents(params),
        "state": contents(state),
        "base": dict(base),
        "data": data,
        "environment": environment(),
    }
