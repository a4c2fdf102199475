"""``hiso-jax run``: one method, one run directory."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from hiso_jax import fed
from hiso_jax.cli import exit_codes
from hiso_jax.cli.experiment import (
    AnyTask,
    build_population,
    build_simulation,
    build_task,
    is_virtual,
    learning_rate,
    virtual_note,
)
from hiso_jax.cli.interrupt import stop_on_interrupt
from hiso_jax.cli.options import Run
from hiso_jax.cli.plots import curves
from hiso_jax.cli.progress import Display, human_bytes, human_seconds
from hiso_jax.cli.report import (
    append_evaluation,
    config_of,
    create_directory,
    params_sha256,
    summarise,
    write_json,
)
from hiso_jax.fed.mesh import all_processes
from hiso_jax.fed.population import Clients

T = TypeVar("T")


def run(options: Run, console: Console) -> int:
    """Run, write the run directory, and return the exit code.

    Of several processes only the first prints and writes; each ends with the same parameters, and says so.

    Raises:
      UsageError: the options name devices, data or a directory that cannot be used; nothing has been written then.
    """
    begin = time.perf_counter()
    rate = learning_rate(options, options.algorithm, options.learning_rate)
    with exit_codes.refusing():
        options.join()
        mesh, task, population = _together(lambda: _ingredients(options))
        simulation = _together(
            lambda: build_simulation(options, task, population, options.algorithm, rate, options.seed, mesh)
        )
        directory = _together(lambda: _directory(options))
    if directory is None:
        with stop_on_interrupt(simulation.stop):
            result = simulation.run()
        own = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"{own}: after {result.rounds} rounds the parameters have SHA-256 {params_sha256(result.params)}")
        return _exit_code(result)

    target = task.target if options.target is None else options.target
    config = {**config_of(options), "learning_rate": rate, "target": target}
    write_json(directory / "config.json", config)
    if is_virtual(options, task):
        console.print(virtual_note(options, task), soft_wrap=True, highlight=False)
    display = Display(console, f"{options.task} {options.algorithm}")
    simulation.callbacks = (display, partial(append_evaluation, directory))
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
    elif result.interrupted:
        console.print(f"interrupted after {result.rounds} rounds; what was done is in {directory}", soft_wrap=True)
    return _exit_code(result)


def _together(step: Callable[[], T]) -> T:
    """``step()``, unless it fails in any process: one that gave up alone would leave the others waiting."""
    value, trouble = None, None
    try:
        value = step()
    except ValueError as error:
        trouble = error
    if not all_processes(trouble is None):
        raise trouble or ValueError("another process could not begin, and says why")
    return cast(T, value)


def _ingredients(options: Run) -> tuple[Mesh | None, AnyTask, Clients]:
    mesh, task = options.mesh(), build_task(options)
    # Files are read here, where one process may fail alone: building the simulation, the processes already talk.
    options.participation()
    return mesh, task, build_population(options, task, options.seed)


def _directory(options: Run) -> Path | None:
    """The run directory, made by the first process; None in the others."""
    if jax.process_index() != 0:
        return None
    return create_directory(options, f"{options.task}-{options.algorithm}")


def _exit_code(result: fed.Result) -> int:
    if result.diverged_at is not None:
        return exit_codes.DIVERGED
    return exit_codes.INTERRUPTED if result.interrupted else exit_codes.DONE


def _print(console: Console, summary: dict, directory: Path) -> None:
    reached = summary["rounds_to_target"]
    at_target = f"at round {reached}" if reached is not None else "not reached"
    attendance = summary["attendance"]
    missing = ", ".join(f"{attendance[name]} {name}" for name in ("absent", "dropped", "late", "invalid"))
    per_device = f"{summary['cohort_per_device']} clients a round each"
    if summary["cohort_padding"]:
        per_device += f" ({summary['cohort_padding']} of them padding)"
    shards = summary["mesh"]["model"]
    split = f", parameters in {shards} parts" if shards > 1 else ""
    rows = {
        "test accuracy": f"{summary['accuracy']:.4f}, before {summary['initial_accuracy']:.4f}"
        if np.isfinite(summary["accuracy"])
        else "—",
        "test loss": f"{summary['loss']:.4f}",
        "target": f"accuracy {summary['target']:g} {at_target}" if summary["target"] is not None else "none",
        "rounds": f"{summary['rounds']} ({summary['rounds_per_second']:.3g} rounds/s)",
        "seconds": f"{summary['wall_seconds']:.1f}, of which compiling {summary['compile_seconds']:.1f}",
        "bytes a client": f"up {human_bytes(summary['bytes_up_per_client'])}, "
        f"down {human_bytes(summary['bytes_down_per_client'])} "
        f"(paper's convention: {human_bytes(summary['bytes_paper_convention'])})",
        "attendance": f"{attendance['reported']} reports, {missing}",
        "simulated time": human_seconds(summary["simulated_seconds"]),
        "devices": f"{summary['device_count']} {summary['device']}: {per_device}{split}",
        "trained": f"{summary['trained_parameters']:,} parameters",
        "written to": str(directory),
    }
    others = {name: value for name, value in summary["metrics"].items() if name not in ("accuracy", "loss")}
    if others:
        rows["test loss"] += "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in others.items())
    if summary["target"] is None:
        del rows["target"]
    if not any(attendance[name] for name in ("absent", "dropped", "late", "invalid")):
        del rows["attendance"]
    width = max(map(len, rows))
    for name, value in rows.items():
        console.print(f"  {name:<{width}}  {value}", soft_wrap=True, highlight=False)
