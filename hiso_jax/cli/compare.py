"""``hiso-jax compare``: several methods from one start on one data set, in one table."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hiso_jax import fed
from hiso_jax.cli import exit_codes
from hiso_jax.cli.experiment import build_population, build_simulation, build_task, grid, is_virtual, virtual_note
from hiso_jax.cli.interrupt import stop_on_interrupt
from hiso_jax.cli.options import Compare
from hiso_jax.cli.plots import curves
from hiso_jax.cli.progress import Display, human_bytes, human_count, human_seconds
from hiso_jax.cli.report import append_evaluation, config_of, create_directory, summarise, write_json
from hiso_jax.cli.sweep import NEVER, Tuning, report, spread


def compare(options: Compare, console: Console) -> int:
    """Run every method with every seed, write the directory, print the table, and return the exit code.

    Methods with the same seed share their initial parameters, their partition, their cohorts and their batches.

    Raises:
      UsageError: the options name data or a directory that cannot be used; nothing has been written then.
    """
    seeds = range(options.seed, options.seed + options.seeds)
    with exit_codes.refusing():
        task = build_task(options)
        populations = {seed: build_population(options, task, seed) for seed in seeds}
        tuning = Tuning(options, task) if options.learning_rate is None else None
        options.participation()
        directory = create_directory(options, f"{options.task}-compare")
    target = task.target if options.target is None else options.target
    config = {**config_of(options), "learning_rates": grid(options), "target": target}
    write_json(directory / "config.json", config)
    if is_virtual(options, task):
        console.print(virtual_note(options, task), soft_wrap=True, highlight=False)
    elif tuning is not None and is_virtual(options, tuning.task):
        console.print(f"tuning with {virtual_note(options, tuning.task)}", soft_wrap=True, highlight=False)
    if tuning is None:
        given = options.learning_rate or ()
        rates = dict(
            zip(options.algorithms, given * len(options.algorithms) if len(given) == 1 else given, strict=True)
        )
        interrupted = False
    else:
        results = tuning.sweep_all(None, console)
        report(results, tuning.target, directory, console)
        rates = {name: result.best(tuning.target).learning_rate for name, result in results.items()}
        interrupted = any(result.interrupted for result in results.values())
    write_json(directory / "config.json", {**config, "learning_rate": rates})
    summaries: dict[str, list[dict[str, Any]]] = {name: [] for name in rates}
    histories: dict[str, list[list[fed.Evaluation]]] = {name: [] for name in rates}
    for seed in seeds:
        for name, rate in rates.items():
            if not interrupted:
                begin = time.perf_counter()
                display = Display(console, f"{name} seed {seed}")
                keep = partial(append_evaluation, directory, algorithm=name, seed=seed)
                simulation = build_simulation(options, task, populations[seed], name, rate, seed)
                simulation.callbacks = (display, keep)
                with display, stop_on_interrupt(simulation.stop):
                    result = simulation.run()
                wall = time.perf_counter() - begin
                interrupted = result.interrupted
                if not interrupted:
                    histories[name].append(result.metrics)
                    summaries[name].append(summarise(options.task, name, rate, seed, target, result, wall))
    write_json(directory / "comparison.json", {"config": config, "runs": summaries})
    finished = {name: runs for name, runs in histories.items() if runs}
    if finished:
        title = f"{options.task}: {options.clients} clients, {options.cohort} a round, {options.schedule} rate"
        curves(finished, directory / "curves.png", title=title, target=target)
        console.print(table(summaries, target))
    console.print(f"written to {directory}", soft_wrap=True, highlight=False)
    if interrupted:
        console.print("interrupted: the table holds the finished runs", soft_wrap=True)
        return exit_codes.INTERRUPTED
    return exit_codes.DONE


def table(summaries: dict[str, list[dict[str, Any]]], target: float | None) -> Table:
    """One row a method: final accuracy, and what it took to the shared target; mean ± spread over seeds."""
    title = None if target is None else f"what it took to test accuracy {target:g} (time: simulated)"
    # Narrow enough for 80 columns.
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    view.add_column("method", no_wrap=True)
    for column in ("rate", "accuracy", "rounds", "passes", "bytes", "time"):
        view.add_column(column, justify="right", no_wrap=True)
    for name, runs in summaries.items():
        if not runs:
            continue
        diverged = sum(run["diverged_at_round"] is not None for run in runs)
        accuracy = spread(np.array([run["accuracy"] for run in runs]), lambda value: f"{value:.4f}")
        view.add_row(
            name,
            f"{runs[0]['learning_rate']:g}",
            f"diverged ({diverged} of {len(runs)})" if diverged else accuracy,
            _to_target(runs, "rounds_to_target", lambda value: f"{value:.0f}"),
            # All three follow the rounds, and so does their spread.
            _to_target(runs, "forward_passes_to_target", human_count, with_spread=False),
            _to_target(runs, "bytes_to_target", human_bytes, with_spread=False),
            _to_target(runs, "simulated_seconds_to_target", human_seconds, with_spread=False),
        )
    return view


def _to_target(
    runs: list[dict[str, Any]], figure: str, show: Callable[[float], str], *, with_spread: bool = True
) -> str:
    reached = np.array([run[figure] for run in runs if run[figure] is not None])
    if len(reached) < len(runs):
        # A mean over the seeds that got there would flatter the method.
        return f"{NEVER} ({len(reached)} of {len(runs)})" if len(reached) and with_spread else NEVER
    return spread(reached if with_spread else reached.mean(keepdims=True), show)
