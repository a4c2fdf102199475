"""``hiso-jax run``: one method, one run directory."""

import time
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from hiso_jax import fed
from hiso_jax.cli import exit_codes
from hiso_jax.cli.experiment import build_population, build_simulation, build_task, learning_rate
from hiso_jax.cli.interrupt import stop_on_interrupt
from hiso_jax.cli.options import Run
from hiso_jax.cli.plots import curves
from hiso_jax.cli.progress import Display, human_bytes
from hiso_jax.cli.report import append_evaluation, config_of, create_directory, summarise, write_json


def run(options: Run, console: Console) -> int:
    """Run, write the run directory, and return the exit code.

    Raises:
      UsageError: the options name data or a directory that cannot be used; nothing has been written then.
    """
    begin = time.perf_counter()
    rate = learning_rate(options, options.algorithm, options.learning_rate)
    with exit_codes.refusing():
        task = build_task(options)
        population = build_population(options, task, options.seed)
        directory = create_directory(options, f"{options.task}-{options.algorithm}")
    target = task.target if options.target is None else options.target
    config = {**config_of(options), "learning_rate": rate, "target": target}
    write_json(directory / "config.json", config)
    display, keep = (
        Display(console, f"{options.task} {options.algorithm}"),
        partial(append_evaluation, directory),
    )
    simulation = build_simulation(options, task, population, options.algorithm, rate, options.seed, (display, keep))
    with display, stop_on_interrupt(simulation.stop):
        result = simulation.run()
    summary = summarise(
        options.task, options.algorithm, rate, options.seed, target, result, time.perf_counter() - begin
    )
    if result.records is not None:
        fed.save(result.records, directory / "ledger.npz", config)
    write_json(directory / "summary.json", summary)
    title = f"{options.task}, {options.algorithm}: {options.clients} clients, {options.cohort} a round"
    curves({options.algorithm: [result.metrics]}, directory / "curves.png", title=title, target=target)
    _print(console, summary, directory)
    if result.diverged_at is not None:
        console.print(
            f"diverged at round {result.diverged_at}: the learning rate {rate:g} is probably too high",
            soft_wrap=True,
        )
        return exit_codes.DIVERGED
    if result.interrupted:
        console.print(f"interrupted after {result.rounds} rounds; what was done is in {directory}", soft_wrap=True)
        return exit_codes.INTERRUPTED
    return exit_codes.DONE


def _print(console: Console, summary: dict, directory: Path) -> None:
    reached = summary["rounds_to_target"]
    at_target = f"at round {reached}" if reached is not None else "not reached"
    rows = {
        "test accuracy": f"{summary['accuracy']:.4f}" if np.isfinite(summary["accuracy"]) else "—",
        "test loss": f"{summary['loss']:.4f}",
        f"accuracy {summary['target']:g}": at_target,
        "rounds": f"{summary['rounds']} ({summary['rounds_per_second']:.3g} rounds/s)",
        "seconds": f"{summary['wall_seconds']:.1f}, of which compiling {summary['compile_seconds']:.1f}",
        "bytes a client": f"up {human_bytes(summary['bytes_up_per_client'])}, "
        f"down {human_bytes(summary['bytes_down_per_client'])} "
        f"(paper's convention: {human_bytes(summary['bytes_paper_convention'])})",
        "written to": str(directory),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        console.print(f"  {name:<{width}}  {value}", soft_wrap=True, highlight=False)
