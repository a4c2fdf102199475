"""The result of a sweep: its table, its verdict, and JSON."""

from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.reports.text import NEVER, broken, short_names, spread


def _words(result: fed.SweepResult) -> str:
    return result.metric.name.replace("_", " ")


def verdict(name: str, result: fed.SweepResult, target: float | None) -> str:
    """One sentence: the best setting, the reason, and whether the grid may be too narrow."""
    if result.interrupted:
        return f"{name}: interrupted, so no best rate is reported"
    best, metric = result.best(target), _words(result)
    setting = f"{name}: best at rate {best.learning_rate:g}"
    if best.local_rate is not None:
        setting += f", clients' rate {best.local_rate:g}"
    if len(result.mus) > 1:
        setting += f", mu {best.mu:g}"
    if best.rounds_to_target is not None:
        reason = f"{metric} {target:g} after {best.rounds_to_target:.0f} rounds, {best.final:.4f} at the end"
    elif target is not None:
        reason = f"{metric} {best.final:.4f} at the end; no setting reached {target:g} with every seed"
    else:
        reason = f"{metric} {best.final:.4f} at the end"
    edge = " (the edge of the grid: a wider one may do better)" if best.at_edge else ""
    return f"{setting}{edge}, {reason}"


def sweep_as_dict(result: fed.SweepResult, target: float | None) -> dict[str, Any]:
    """A sweep as JSON: its grid, its best setting, and every run's evaluations."""
    return {
        "seeds": list(result.seeds),
        "mus": list(result.mus),
        "learning_rates": list(result.learning_rates),
        "local_learning_rates": None if result.local_rates is None else list(result.local_rates),
        "metric": result.metric.name,
        "metrics": sorted(result.metrics),
        "interrupted": result.interrupted,
        "target": target,
        "best": vars(result.best(target)),
        "rounds": result.rounds.tolist(),
        f"final_{result.metric.name}": result.final().tolist(),
        "rounds_to_target": None if target is None else result.rounds_to(target).tolist(),
        "diverged_at_round": result.diverged_at.tolist(),
        **{name: values.tolist() for name, values in result.metrics.items()},
        "compile_seconds": result.compile_seconds,
        "run_seconds": result.run_seconds,
    }


def sweep_from_dict(content: dict[str, Any]) -> fed.SweepResult:
    """The inverse of :func:`sweep_as_dict`.

    Raises:
      ValueError: the content is not that of a sweep.
    """
    try:
        name = content["metric"]
        metrics = {each: np.array(content[each], np.float64) for each in content["metrics"]}
        grid = tuple(len(content[axis]) for axis in ("seeds", "mus", "learning_rates"))
        diverged_at, rounds = np.array(content["diverged_at_round"]), np.array(content["rounds"])
        if name not in metrics or diverged_at.shape != grid:
            raise ValueError("its arrays are not those of its grid")
        if any(values.shape != (*grid, len(rounds)) for values in metrics.values()):
            raise ValueError("its arrays are not those of its grid")
        local = content.get("local_learning_rates")
        if local is not None and len(local) != grid[2]:
            raise ValueError("its clients' rates are not those of its grid")
        return fed.SweepResult(
            seeds=tuple(content["seeds"]),
            mus=tuple(content["mus"]),
            learning_rates=tuple(content["learning_rates"]),
            rounds=rounds,
            metric=fed.Metric(name, name != "loss"),
            metrics=metrics,
            diverged_at=diverged_at,
            interrupted=bool(content["interrupted"]),
            compile_seconds=float(content["compile_seconds"]),
            run_seconds=float(content["run_seconds"]),
            local_rates=None if local is None else tuple(map(float, local)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ParameterError(
            "resume", f"must be a directory whose sweep.json is as it was written ({error})"
        ) from error


def sweep_table(results: dict[str, fed.SweepResult], target: float | None) -> Table:
    """A table with a row per setting: final validation metric and rounds to the target, means over the seeds."""
    metric = _words(next(iter(results.values())))
    title = f"validation {metric}" if target is None else f"validation {metric}, and rounds to {target:g}"
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    view.add_column("method", overflow="fold")
    names = short_names(list(results))
    several_mus = any(len(result.mus) > 1 for result in results.values())
    local_too = any(result.local_rates for result in results.values())
    for heading in (
        "rate",
        *(["clients'"] if local_too else []),
        *(["mu"] if several_mus else []),
        metric,
        "rounds",
        "diverged",
        "",
    ):
        view.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        best, final = result.best(target), result.final()
        # The initial metric alone is not a final metric.
        final = final if len(result.rounds) > 1 else np.full(final.shape, np.nan)
        first = np.full(final.shape, np.inf) if target is None else result.rounds_to(target)
        for m, mu in enumerate(result.mus):
            for column, rate in enumerate(result.learning_rates):
                runs = (slice(None), m, column)
                diverged = int((result.diverged_at[runs] >= 0).sum())
                local = result.local_rates[column] if result.local_rates else None
                setting = rate, mu, local
                view.add_row(
                    broken(names[name]),
                    f"{rate:g}",
                    *([NEVER if local is None else f"{local:g}"] if local_too else []),
                    *([f"{mu:g}"] if several_mus else []),
                    spread(final[runs], lambda value: f"{value:.4f}") if np.isfinite(final[runs]).all() else NEVER,
                    spread(first[runs], lambda value: f"{value:.0f}") if np.isfinite(first[runs]).all() else NEVER,
                    f"{diverged} of {len(result.seeds)}" if diverged else "",
                    "best"
                    if setting == (best.learning_rate, best.mu, best.local_rate) and not result.interrupted
                    else "",
                )
        view.add_section()
    return view
