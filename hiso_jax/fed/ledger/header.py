"""The header of a ledger: the description of the run before its first round (``docs/formats.md``)."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from hiso_jax.fed.ledger.fingerprint import contents
from hiso_jax.fed.ledger.frames import VERSION
from hiso_jax.fed.ledger.records import Records, layout
from hiso_jax.fed.ledger.storage import environment

# The values of options that earlier releases did not have: how their runs behaved.
UNASKED = {"attackers": 0.0, "attackers_of": "population", "public_cohorts": True, "delta": 1e-5}
# Options of how a run is computed; they change none of its results.
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
      config: the run's configuration, as JSON values.
      seed_key: its seed key.
      params, state: its parameters and optimizer state, or their shapes.
      records: the shapes of some of its rounds.
      said: ``base``, the fingerprints of the initial parameters; ``data``, the fingerprint of the training data, their
        partition and the participation; ``algorithm``, a description of the method, and ``made_of``, digests of its
        parts with their settings; ``about``, the user's description of the run.
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
