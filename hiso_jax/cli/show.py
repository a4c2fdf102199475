"""``hiso-jax show``: the contents of a run or a delta, and its integrity."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.cli import errors
from hiso_jax.cli.arguments import Positional
from hiso_jax.cli.options import Run
from hiso_jax.experiment import as_words, changed_options
from hiso_jax.fed.ledger import LEDGER, LedgerFile, exists, load_delta, salvage
from hiso_jax.fed.population import ABSENT
from hiso_jax.reports import human_bytes, print_rows

# Most characters shown of a value.
LONGEST = 120


@dataclass(frozen=True, kw_only=True)
class Show:
    """Show the contents of a run's directory or a delta: configuration, rounds, bytes, metrics and integrity.

    Attributes:
      path: a run's directory, its ledger, or a delta.
      salvage: directory to create for a new ledger, which has the rounds of an altered ledger before the damage and no
        seal; hiso-jax run --resume continues from it.
    """

    path: Annotated[Path, Positional]
    salvage: Path | None = None


def show(options: Show, console: Console) -> int:
    """Print the contents, and return the exit code.

    Raises:
      UsageError: the file cannot be read, or was altered.
    """
    with errors.refusing():
        if options.salvage is not None:
            rows = _salvaged(options.path, options.salvage)
        elif options.path.suffix == ".safetensors":
            rows = _of_delta(options.path)
        else:
            rows = _of_ledger(fed.load(options.path, unfinished=True))
    print_rows(console, rows)
    return errors.DONE


def _salvaged(path: Path, out: Path) -> dict[str, str]:
    if exists(out, "salvage"):
        raise ParameterError("salvage", f"must be a directory that does not exist yet; {out} does")
    found = fed.load(path, salvage=True)
    try:
        out.mkdir(parents=True)
        salvage(found, out / LEDGER)
    except OSError as error:
        raise ParameterError("salvage", f"cannot be made: {errors.described(error)}") from error
    return _of_ledger(fed.load(out, unfinished=True)) | {"written to": str(out)}


def _of_ledger(ledger: LedgerFile) -> dict[str, str]:
    records, seal = ledger.records, ledger.seal
    came = records.cohort[records.attendance != ABSENT]
    distinct = len(np.unique(came))
    up, down = int(records.bytes_up.sum()), int(records.bytes_down.sum())
    last = ledger.evaluations[-1] if ledger.evaluations else None
    if seal is None:
        torn = f", {human_bytes(ledger.torn)} of an unfinished frame behind them" if ledger.torn else ""
        integrity = f"every round verified{torn}; not sealed: continue with hiso-jax run --resume {ledger.path.parent}"
    else:
        integrity = f"every byte verified, sealed by {seal['head'][:16]}…"
    ended = "" if seal is None or seal["diverged_at"] is None else f", diverged at round {seal['diverged_at']}"
    return {
        **_common(ledger.header, ledger.about),
        "rounds": f"{len(ledger.rows):,} of {ledger.planned:,}{ended}",
        "clients": f"{distinct:,} took part, {len(came):,} times",
        "bytes": f"up {human_bytes(up)}, down {human_bytes(down)}",
        "evaluated": "never" if last is None else _metrics({"round": last.round, **last.metrics}),
        "ledger": human_bytes(ledger.size + ledger.torn),
        "integrity": integrity,
    }


def _of_delta(path: Path) -> dict[str, str]:
    delta = load_delta(path)
    evaluation, digest = delta.header["evaluation"], delta.header["params_sha256"]
    return {
        **_common(delta.header, delta.header["about"]),
        "rounds": f"{delta.header['rounds']:,}",
        "evaluated": "never" if evaluation is None else _metrics(evaluation),
        "base": f"SHA-256 {delta.header['base']['trained']}",
        "parameters": "of an unfinished run, no SHA-256 noted" if digest is None else f"SHA-256 {digest}",
        "size": human_bytes(path.stat().st_size),
        "file": f"SHA-256 {delta.sha256}",
        "integrity": "every byte verified",
    }


def _metrics(evaluation: Mapping[str, Any]) -> str:
    numbers = {name: math.nan if value is None else value for name, value in evaluation.items() if name != "round"}
    named = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items()]
    rounds = evaluation.get("round")
    return f"after round {int(rounds or 0):,}: {', '.join(named)}"


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _common(header: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, str]:
    config, made = header["config"], header["environment"]
    scalars = any(name.split(".")[0] == "scalars" for name, *_ in header.get("columns", [["scalars"]]))
    messages = f"P = {config['perturbations']}" if scalars else "messages as large as the model, not kept"
    bits = [kind.removeprefix("int") for name, kind, _ in header.get("columns", []) if name == "scalars.codes"]
    messages += f", {bits[0]} bits a scalar" if bits else ""
    trained = sum(int(np.prod(shape)) for _, shape, _ in header["params"])
    changed = changed_options(about, Run)
    settings = " ".join(as_words({name: _shown(value) for name, value in changed.items()}))
    rows = {
        "task": f"{_shown(about.get('task', 'a program of its own'))}, {_shown(about.get('algorithm', ''))}".rstrip(
            ", "
        ),
        "model": f"{_shown(about['model'])}, " if about.get("model") else "",
        "rounds of": f"{_clients(config)}, K = {config['local_steps']}, {messages}",
        "options": settings,
        "made with": f"jax {made['versions'].get('jax', '?')} on {made['device']}",
    }
    rows["model"] += f"{trained:,} trained parameters"
    return {name: value for name, value in rows.items() if value}


def _clients(config: Mapping[str, Any]) -> str:
    """The clients of a round; with a buffer, its answers and the clients at work."""
    cohort, buffer = config["cohort"], config.get("buffer")
    return f"{cohort} clients" if buffer is None else f"{buffer} answers from {cohort} clients at work"
