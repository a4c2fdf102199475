"""``hiso-jax run``: one method, one run directory."""

import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from hiso_jax import algorithms, fed
from hiso_jax.algorithms import Method
from hiso_jax.cli import exit_codes
from hiso_jax.cli.experiment import (
    AnyTask,
    Setting,
    build_algorithm,
    build_population,
    build_simulation,
    build_task,
    check_virtual,
    learning_rate,
    notes,
    target_of,
)
from hiso_jax.cli.interrupt import exit_code, stop_on_interrupt
from hiso_jax.cli.methods import is_foreign
from hiso_jax.cli.options import Run
from hiso_jax.cli.progress import Display
from hiso_jax.cli.restore import about_of, resumed
from hiso_jax.fed.devices import in_all_processes
from hiso_jax.fed.ledger import Lost, lock
from hiso_jax.fed.population import AnyPopulation
from hiso_jax.reports import (
    create_directory,
    human_bytes,
    human_count,
    human_seconds,
    print_rows,
)
from hiso_jax.simulation import Simulation

# In standard deviations. Of Gaussian scalars, 1 bit then tells 9 % less of them, 2 bits 3 %.
LARGE_OFFSET = 0.5


class _Going(NamedTuple):
    """A run that is set up.

    Attributes:
      options: its options.
      simulation: what runs.
      directory: where it is written.
      setting: the method, its rate and the seed.
      begin: when the command began, of ``time.perf_counter``.
    """

    options: Run
    simulation: Simulation
    directory: Path
    setting: Setting
    begin: float


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
                options = in_all_processes(resumed, options)
            method = algorithms.load(options.algorithm)
            rate = learning_rate(options, method, options.learning_rate)
            # Before any long work.
            build_algorithm(options, method, rate)
            mesh, task, population = in_all_processes(_ingredients, options)
            about = about_of(options, method) | {"learning_rate": rate, "target": target_of(options, task)}
            directory = in_all_processes(_directory, options, method, about)
            in_all_processes(_hold, directory, held)
            resume = options.resume is not None
            storage = fed.Storage(directory, about, options.snapshot_every, resume, options.from_snapshot)
            setting = Setting(method, rate, options.seed)
            simulation = in_all_processes(build_simulation, options, task, population, setting, mesh, storage)
        try:
            return _run(_Going(options, simulation, directory, setting, begin), console)
        except OSError as error:
            if error.filename is None:
                raise  # of no file of the run's
            if isinstance(error, Lost):
                raise exit_codes.Stopped(
                    f"{exit_codes.told(error)}; what the run has done is not there any more, and it cannot go on"
                ) from error
            raise exit_codes.Stopped(
                f"{exit_codes.told(error)}: it cannot be written; what was done before is kept; make room and go on "
                f"with: {_again(options, directory)}"
            ) from error
        except KeyboardInterrupt:
            if jax.process_index() == 0:
                console.print(f"interrupted; go on with: {_again(options, directory)}", soft_wrap=True)
            raise


def _again(options: Run, directory: Path) -> str:
    """The command that goes on with a run."""
    own = f" --algorithm {options.algorithm}" if is_foreign(options.algorithm) else ""
    return f"hiso-jax run --resume {directory}{own}"


def _run(going: _Going, console: Console) -> int:
    options, simulation, directory, setting = going.options, going.simulation, going.directory, going.setting
    primary = jax.process_index() == 0
    display = Display(console, f"{options.task} {setting.method.name}", simulation.task) if primary else nullcontext()
    if primary:
        for note in notes(options, simulation.task):
            console.print(note, soft_wrap=True, highlight=False)
        taking_up = [_TakingUp(console)] if options.resume is not None else []
        simulation.callbacks = (*taking_up, cast(Display, display))
    simulation.began = going.begin
    with display, stop_on_interrupt(simulation.stop), exit_codes.refusing():
        result = simulation.run()
    if not primary:
        own = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"{own}: after {result.rounds} rounds the parameters have SHA-256 {fed.fingerprint(result.params)}")
        return _exit_code(result)
    print_summary(console, simulation.summary, directory)
    if result.diverged_at is not None:
        console.print(
            f"diverged at round {result.diverged_at}: the learning rate {setting.rate:g} is probably too high",
            soft_wrap=True,
        )
    elif result.interrupted:
        console.print(
            f"interrupted after {result.rounds} rounds; go on with: {_again(options, directory)}", soft_wrap=True
        )
    _warn_of_offset(simulation.algorithm, options, result, console)
    return _exit_code(result)


def _warn_of_offset(algorithm: fed.Algorithm, options: Run, result: fed.Result, console: Console) -> None:
    """Say so if forward differences have spent the few bits of a scalar on what all scalars have in common."""
    few = isinstance(algorithm.wire, fed.FewBits) and not algorithm.wire.is_exact
    if few and options.method != "central" and abs(result.offset or 0.0) > LARGE_OFFSET:
        console.print(
            f"the scalars of a message have {result.offset:.2f} of their spread in common, which few bits lose their "
            "range on: --method central removes it, for 2·P evaluations in place of P + 1",
            soft_wrap=True,
        )


def _hold(directory: Path, held: ExitStack) -> None:
    """Be the directory's one writer, in the first process, until ``held`` is let go."""
    if jax.process_index() == 0:
        held.callback(lock(directory).release)


class _TakingUp:
    """Says where a run goes on."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, progress: fed.Progress) -> None:
        if not progress.session.is_told:
            over = progress.round == progress.rounds
            words = f"all {progress.round:,} rounds are done" if over else f"going on after {progress.round:,} rounds"
            self.console.print(words, highlight=False)


def _ingredients(options: Run) -> tuple[Mesh | None, AnyTask, AnyPopulation]:
    mesh, task = options.mesh(), build_task(options)
    check_virtual(options, task)
    # Files are read here, where one process may fail alone: building the simulation, the processes already talk.
    options.participation()
    return mesh, task, build_population(options, task, options.seed)


def _directory(options: Run, method: Method, about: Mapping[str, Any]) -> Path:
    """The run's directory, made by the first process unless the run goes on; the others do not write."""
    if options.resume is not None:
        return options.resume
    if jax.process_index() != 0:
        return options.out or Path()
    return create_directory(options.out, f"{options.task}-{method.title}", about)


def _exit_code(result: fed.Result) -> int:
    if result.diverged_at is not None:
        return exit_codes.DIVERGED
    return exit_code() if result.interrupted else exit_codes.DONE


def print_summary(console: Console, summary: dict, directory: Path) -> None:
    """Print the figures of a run that has ended."""
    reached = summary["rounds_to_target"]
    at_target = f"at round {reached}" if reached is not None else "not reached"
    attendance = summary["attendance"]
    missing = ", ".join(f"{attendance[name]} {name}" for name in ("absent", "dropped", "late", "invalid"))
    per_device = f"{summary['cohort_per_device']} clients a round each"
    if summary["cohort_padding"]:
        per_device += f" ({summary['cohort_padding']} of them padding)"
    shards = summary["mesh"]["model"]
    split = f", parameters in {shards} parts" if shards > 1 else ""
    metric = summary["metric"]
    words = metric.replace("_", " ")
    others = {name: value for name, value in summary["metrics"].items() if name != metric}
    rows = {
        f"test {words}": f"{summary[metric]:.4f}, before {summary[f'initial_{metric}']:.4f}"
        if np.isfinite(summary[metric])
        else "—",
        "also": ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in others.items()),
        "target": f"{words} {summary['target']:g} {at_target}" if summary["target"] is not None else "none",
        "rounds": f"{summary['rounds']} ({summary['rounds_per_second']:.3g} rounds/s)",
        "seconds": f"{summary['wall_seconds']:.1f}, of which compiling {summary['compile_seconds']:.1f}",
        "bytes a client": f"up {human_bytes(summary['bytes_up_per_client'])}, "
        f"down {human_bytes(summary['bytes_down_per_client'])} "
        f"(paper's convention: {human_bytes(summary['bytes_paper_convention'])})",
        "attendance": f"{attendance['reported']} reports, {missing}",
        "simulated time": human_seconds(summary["simulated_seconds"]),
        "devices": f"{summary['device_count']} {summary['device']}: {per_device}{split}",
        "directions": f"{human_count(summary['directions'])} made by all clients, to measure along and to catch up",
        "trained": f"{summary['trained_parameters']:,} parameters",
        "written to": str(directory),
    }
    if not summary["directions"]:
        del rows["directions"]
    if not others:
        del rows["also"]
    if summary["target"] is None:
        del rows["target"]
    if not any(attendance[name] for name in ("absent", "dropped", "late", "invalid")):
        del rows["attendance"]
    print_rows(console, rows)
