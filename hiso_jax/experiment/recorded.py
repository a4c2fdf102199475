"""Settings in the form that a run's files hold."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from hiso_jax import fed
from hiso_jax.algorithms import Method
from hiso_jax.choices import Choice
from hiso_jax.experiment.build import own_local_rate
from hiso_jax.experiment.composed import KINDS, NESTED, choice_of
from hiso_jax.experiment.settings import Settings
from hiso_jax.renamed import IN_FILES


def of_clients(options: Settings, algorithm: fed.Algorithm) -> dict[str, Any]:
    """The local steps and their own rate as the run has them, so that it is resumed whatever later defaults are."""
    steps = options.local_steps or algorithm.local_steps
    return {"local_steps": steps, "local_learning_rate": own_local_rate(options, algorithm)}


def about_of(options: Settings, method: Method) -> dict[str, Any]:
    """The options as a run's ledger holds them: absolute paths, and the SHA-256 of the user's files, if any."""
    found = {"algorithm": method.sha256, **{kind: choice_of(kind, options).sha256 for kind in KINDS}}
    nested = {kind: getattr(options, kind, None) for kind in NESTED}
    found |= {kind: NESTED[kind].load(name).sha256 for kind, name in nested.items() if isinstance(name, str)}
    own = {f"{kind}_sha256": sha256 for kind, sha256 in found.items() if sha256 is not None}
    return {**as_written(options), "resume": None, **own}


def as_written(options: Settings) -> dict[str, Any]:
    """Options as JSON; local paths are absolute, so that the run can be continued from any directory."""
    # Imported only here, because it imports tables.
    from hiso_jax.reports import as_json

    given = {each.name: getattr(options, each.name) for each in fields(options)}
    given |= {name: value.name for name, value in given.items() if isinstance(value, Choice | Method)}
    for name, value in given.items():
        if isinstance(value, Path):
            given[name] = value.resolve()
    if isinstance(given.get("model"), str) and Path(given["model"]).exists():
        given["model"] = Path(given["model"]).resolve()
    return as_json({IN_FILES.get(name, name): value for name, value in given.items()})
