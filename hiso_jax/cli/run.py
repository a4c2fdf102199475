"""``hiso-jax run``: one method, one run directory."""

import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

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
    print_rows,
    summarise,
    write_json,
    write_metrics,
)
from hiso_jax.cli.restore import resumed
from hiso_jax.fed.devices import together
from hiso_jax.fed.ledger import LEDGER, lock
from hiso_jax.fed.population import AnyPopulation


def run(options: Run, console: Console) -> int:
    """Run, or go on with a run, write its directory, and return the exit code.

    Of several processes only the first prints and writes; each ends with the same parameters, and says so.

    Raises:
      UsageError: the options name devices, data or a directory that cannot be used; nothing has been written then.
    """
    begin = time.perf_counter()
    with ExitStack() as held:
        with exit_codes.refusing():
            options.join()
            if options.resume is not None:
                options = together(resumed, options)
            rate = learning_rate(options, options.algorithm, options.learning_rate)
            mesh, task, population = together(_ingredients, options)
            target = task.target if options.target is None else options.target
            about = {**config_of(options), "learning_rate": rate, "target": target, "resume": None}
            directory = together(_directory, options, about)
            together(_hold, directory, held)
            resume = options.resume is not None
            storage = fed.Storage(directory, about, options.snapshot_every, resume)
            seed, method = options.seed, options.algorithm
            simulation = together(build_simulation, options, task, population, method, rate, seed, mesh, storage)
        try:
            if resume:
                together(_take_up, directory, simulation.config.eval_every, console)
            return _run(options, console, simulation, task, directory, rate, target, begin)
        except OSError as error:
            raise exit_codes.Stopped(
                f"{directory} cannot be written ({error.strerror or error}); what was done before is kept: make room "
                f"and go on with: hiso-jax run --resume {directory}"
            ) from error


def _run(
    options: Run,
    console: Console,
    simulation: fed.Simulation,
    task: AnyTask,
    directory: Path,
    rate: float,
    target: float | None,
    begin: float,
) -> int:
    primary = jax.process_index() == 0
    display = Display(console, f"{options.task} {options.algorithm}") if primary else nullcontext()
    if primary:
        if is_virtual(options, task):
            console.print(virtual_note(options, task), soft_wrap=True, highlight=False)
        simulation.callbacks = (cast(Display, display), partial(append_evaluation, directory))
    with display, stop_on_interrupt(simulation.stop), exit_codes.refusing():
        result = simulation.run()
    if not primary:
        own = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"{own}: after {result.rounds} rounds the parameters have SHA-256 {fed.fingerprint(result.params)}")
        return _exit_code(result)
    wall = time.perf_counter() - begin
    summary = summarise(options.task, options.algorithm, rate, options.seed, target, result, wall)
    write_json(directory / "summary.json", summary)
    write_metrics(directory, result.metrics)
    title = f"{options.task}, {options.algorithm}: {options.clients} clients, {options.cohort} a round"
    curves({options.algorithm: [result.metrics]}, directory / "curves.png", title=title, target=target)
    _print(console, summary, directory)
    if result.diverged_at is not None:
        console.print(
            f"diverged at round {result.diverged_at}: the learning rate {rate:g} is probably too high",
            soft_wrap=True,
        )
    elif result.interrupted:
        console.print(
            f"interrupted after {result.rounds} rounds; go on with: hiso-jax run --resume {directory}", soft_wrap=True
        )
    return _exit_code(result)


def _hold(directory: Path, held: ExitStack) -> None:
    """Be the directory's one writer, in the first process, until ``held`` is let go."""
    if jax.process_index() == 0:
        held.callback(lock(directory).release)


def _take_up(directory: Path, eval_every: int, console: Console) -> None:
    """Say where a run goes on, and write the evaluations of its ledger: the file may have lost some, or half a line."""
    if jax.process_index() == 0 and (directory / LEDGER).exists():
        ledger = fed.load(directory, unfinished=True)
        write_metrics(directory, [row for row in ledger.evaluations if row.round % eval_every == 0])
        console.print(f"going on after {len(ledger.rows):,} rounds", highlight=False)


def _ingredients(options: Run) -> tuple[Mesh | None, AnyTask, AnyPopulation]:
    mesh, task = options.mesh(), build_task(options)
    # Files are read here, where one process may fail alone: building the simulation, the processes already talk.
    options.participation()
    return mesh, task, build_population(options, task, options.seed)


def _directory(options: Run, about: Mapping[str, Any]) -> Path:
    """The run's directory, made by the first process unless the run goes on; the others do not write."""
    if options.resume is not None:
        return options.resume
    if jax.process_index() != 0:
        return options.out or Path()
    return create_directory(options, f"{options.task}-{options.algorithm}", about)


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
    print_rows(console, rows)
