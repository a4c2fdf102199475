"""What a ledger says of its run before the first round (``docs/formats.md``)."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from hiso_jax.fed.ledger.fingerprint import contents
from hiso_jax.fed.ledger.frames import VERSION
from hiso_jax.fed.ledger.records import Records, layout
from hiso_jax.fed.ledger.storage import environment

# What runs of earlier releases could not be asked for, as they were.
UNASKED = {"attackers": 0.0, "attackers_of": "population", "public_cohorts": True, "delta": 1e-5}
# How a run is computed, which changes none of its numbers.
EXECUTION = ("rounds_per_dispatch", "client_chunk", "memory_budget", "directions")


def header_of(
    config: Mapping[str, Any],
    seed_key: Key[Array, ""],
    params: PyTree,
    state: PyTree,
    records: Records,
    said: Mapping[str, Any],
) -> dict[str, Any]:
    """The header of a run's ledger.

    Args:
      config: the run's numbers, as JSON holds them.
      seed_key: its seed key.
      params, state: its parameters and optimizer state, or their shapes.
      records: the shapes of some of its rounds.
      said: ``base``, the fingerprints of what it begins with; ``data``, that of its training data, their partition and
        who shows up; ``algorithm``, what of the method can be written down, and ``made_of``, digests of its parts with
        their numbers; ``about``, what its owner says of it.
    """
    return {
        "format": VERSION,
        "columns": [list(column) for column in layout(records).columns],
        "seed": np.asarray(jax.random.key_data(seed_key)).tolist(),
        "prng_impl": str(jax.random.key_impl(seed_key)),
        "config": dict(config),
        "params": contents(params),
        "state": contents(state),
        **said,
        "environment": environment(),
    }
