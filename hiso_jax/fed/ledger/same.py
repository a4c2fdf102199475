"""The header of a ledger, and the check that a run to be continued is the run in the ledger."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.ledger.fingerprint import contents
from hiso_jax.fed.ledger.frames import VERSION
from hiso_jax.fed.ledger.ledger import json_bytes
from hiso_jax.fed.ledger.reading import LedgerFile
from hiso_jax.fed.ledger.records import Records, layout
from hiso_jax.fed.ledger.storage import differences, environment

# The values of options that earlier releases did not have: how their runs behaved.
# The user's own functions that decide who takes part; recorded only if there are any.
RULES = ("availability", "select")
UNASKED = {
    "attackers": 0.0,
    "attackers_of": "population",
    "public_cohorts": True,
    "delta": 1e-5,
    "backprop_share": None,
    "probe_scale": None,
}
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


# The entries of the header that must equal those of the ledger, and their names in error messages.
SAME = {
    "algorithm": "what the method measures, sends, combines or counts",
    "columns": "the numbers of a round",
    "seed": "the seed",
    "prng_impl": "the random number generator",
    "config": "the configuration",
    "flags": "jax's flags",
    "params": "the parameters' paths, shapes or dtypes",
    "state": "the optimizer",
    "base": "the initial parameters",
    "data": "the training data, their partition or who shows up",
}


def check_same(found: LedgerFile, header: Mapping[str, Any], *, from_snapshot: bool) -> bool:
    """Refuse to continue a run other than that of the ledger.

    Args:
      found: the ledger of the run to be continued.
      header: the header that a ledger of the requested run would have.
      from_snapshot: whether the initial parameters may differ.

    Returns:
      Whether the initial parameters differ.

    Raises:
      ValueError: it is another run; the message names the difference.
    """
    before, now = _comparable(found.header), _comparable(json.loads(json_bytes(header)))
    before["config"]["rounds"] = now["config"]["rounds"]
    refused, elsewhere = f"{found.path.parent} cannot be continued: ", False
    for name, meaning in SAME.items():
        if before[name] == now[name]:
            continue
        if name == "base" and from_snapshot:
            elsewhere = True
            continue
        if name in ("config", "flags"):
            other = next(key for key in now[name] if before[name].get(key) != now[name][key])
            was, given = before[name].get(other), now[name][other]
            meaning = "jax's flag" if name == "flags" else "its"
            raise ValueError(f"{refused}{meaning} {other} is {given!r} now, and was {was!r}")
        if name == "base":
            other = "; ".join(next(filter(None, map(differences, found.all_environments)), ()))
            raise ValueError(
                f"{refused}the initial parameters differ from the run's. If they are computed, this processor or "
                f"jaxlib is another ({other or 'of the same name'}): `from_snapshot` continues from the newest "
                "snapshot in place of them. If they are loaded, the checkpoint is another"
            )
        raise ValueError(f"{refused}{meaning} differ from the run's")
    # Other package versions may build the same method from other parts, so digests are compared only if versions agree.
    alike = before["environment"]["versions"] == now["environment"]["versions"]
    made_of = before.get("made_of", {})
    # A rule of the user's that the run did not have is another run, too.
    for name in {**made_of, **{name: None for name in RULES if made_of}} if alike else ():
        if now["made_of"].get(name) != made_of.get(name):
            raise ValueError(f"{refused}its {name} is made of other functions or numbers than the run's")
    return elsewhere


def _comparable(header: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a header that determine a run's results, without options of how they are computed."""
    # Older ledgers lack the precision of matrix products and the attackers; the oldest ledgers lack the method.
    given = {"matmul_precision": "high", **UNASKED, **header["config"]}
    config = {name: value for name, value in given.items() if name not in EXECUTION}
    algorithm = header.get("algorithm", Algorithm(optax.identity()).description)
    return {**header, "algorithm": algorithm, "config": config, "flags": header["environment"]["flags"]}


def more_rounds(found: LedgerFile, rounds: int) -> int:
    """The number of rounds that a run is to have, if it differs from the planned number; otherwise 0.

    Raises:
      ValueError: the run has more rounds already, or diverged.
    """
    if rounds == found.planned:
        return 0
    if found.seal is not None and found.seal["diverged_at"] is not None:
        at = found.seal["diverged_at"]
        raise ParameterError("rounds", f"cannot be added to {found.path.parent}: it diverged at round {at}")
    if rounds < len(found.rows):
        raise ParameterError("rounds", f"must be at least the {len(found.rows)} that the run has, got {rounds}")
    return rounds
