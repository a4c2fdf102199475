"""``hiso-jax run``: run one method and write one run directory."""

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.cli import errors
from hiso_jax.cli.interrupt import exit_code, stop_on_interrupt
from hiso_jax.cli.options import Run
from hiso_jax.cli.progress import load_task, working
from hiso_jax.cli.resume import continuing, resumed
from hiso_jax.cli.summary import hint, print_samples, print_summary, warn_of_offset
from hiso_jax.experiment import Experiment, choice_of, notes, tried_rates
from hiso_jax.fed.devices import in_all_processes
from hiso_jax.fed.ledger import Lost, lock
from hiso_jax.reports import Progress, Report, create_directory, human_bytes, human_count, loggers


def run(options: Run, console: Console) -> int:
    """Start or continue a run, write its directory, and return the exit code.

    Of several processes, only the first prints progress and writes files. All end with the same parameters, and each
    prints their SHA-256.

    Raises:
      UsageError: the options name devices, data or a directory that cannot be used; in that case nothing has been
        written.
    """
    begin = time.perf_counter()
    with ExitStack() as held:
        with errors.refusing():
            options.join()
            if options.resume is not None:
                options = in_all_processes(resumed, options)
            mesh = in_all_processes(options.mesh)
            experiment = in_all_processes(_experiment, options, console)
            directory = in_all_processes(_directory, options, experiment)
            in_all_processes(_hold, directory, held)
            if experiment.learning_rate == "auto":
                experiment = _found(experiment, console)
            resume = options.resume is not None
            storage = fed.Storage(directory, experiment.about, options.snapshot_every, resume, options.from_snapshot)
            simulation = in_all_processes(partial(experiment.simulation, mesh=mesh, storage=storage))
        try:
            return _run(options, experiment, simulation, directory, begin, console)
        except OSError as error:
            if error.filename is None:
                raise  # not about a file of the run
            if isinstance(error, Lost):
                raise errors.Stopped(
                    f"{errors.described(error)}; what the run has done is gone, so it cannot continue"
                ) from error
            raise errors.Stopped(
                f"{errors.described(error)}: it cannot be written; what was done before is kept; make room and go on "
                f"with: {continuing('run', options, directory)}"
            ) from error
        except KeyboardInterrupt:
            if jax.process_index() == 0:
                console.print(f"interrupted; go on with: {continuing('run', options, directory)}", soft_wrap=True)
            raise


def _experiment(options: Run, console: Console) -> Experiment:
    """The experiment, with all files read: one process may fail alone here, and not while the simulation is built.

    Raises:
      ParameterError: an option is out of range, or auto cannot search for a rate.
    """
    experiment = Experiment.of(options, task=lambda settings: load_task(settings, console))
    if experiment.learning_rate == "auto" and (jax.process_count() > 1 or options.model_shards > 1):
        raise ParameterError(
            "learning_rate", "must be a number where several processes or shards of a model run; got auto"
        )
    return experiment


def _found(experiment: Experiment, console: Console) -> Experiment:
    """The experiment with the learning rate that a search finds."""
    tried = tried_rates(experiment.settings, experiment.method)
    with working(console, f"trying learning rates {', '.join(f'{rate:g}' for rate in tried)}"):
        probe = experiment.find_rate()
    losses = ", ".join(f"{loss:.3f}" if np.isfinite(loss) else "diverged" for loss in probe.losses)
    console.print(
        f"from loss {probe.start:.3f}, {probe.rounds} rounds of each lead to {losses}; {probe.learning_rate:g} is "
        f"taken, {probe.reason}; it cost the clients {human_bytes(probe.bytes_up + probe.bytes_down)} and "
        f"{human_count(probe.forward_passes)} forward passes",
        soft_wrap=True,
        highlight=False,
    )
    return experiment.at(probe)


def _run(
    options: Run, experiment: Experiment, simulation: fed.Simulation, directory: Path, begin: float, console: Console
) -> int:
    primary, report = jax.process_index() == 0, Report(began=begin)
    rate = f"{experiment.learning_rate:g}"
    asked = f"rate {rate}, {options.schedule}" if options.schedule != "constant" else f"rate {rate}"
    title = f"{options.task} {experiment.method.name}"
    if primary:
        for note in notes(simulation.task, simulation.population):
            console.print(note, soft_wrap=True, highlight=False)
        taking_up = [_TakingUp(console)] if options.resume is not None else []
        with errors.refusing():
            also = loggers(options.log, directory, experiment.about)
        simulation.callbacks = (report, *taking_up, Progress(title, console, asked), *also)
    with stop_on_interrupt(simulation.stop), errors.refusing():
        result = simulation.run()
    if not primary:
        own = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"{own}: after {result.rounds} rounds the parameters have SHA-256 {fed.fingerprint(result.params)}")
        return _exit_code(result)
    print_summary(console, report.summary, directory)
    print_samples(console, directory)
    if result.interrupted:
        again = continuing("run", options, directory)
        console.print(f"interrupted after {result.rounds} rounds; go on with: {again}", soft_wrap=True)
    hint(experiment.learning_rate, result, console)
    warn_of_offset(simulation.algorithm, options.difference, result, console)
    return _exit_code(result)


def _hold(directory: Path, held: ExitStack) -> None:
    """Lock the directory in the first process until ``held`` is closed, so that it has one writer."""
    if jax.process_index() == 0:
        held.callback(lock(directory).release)


class _TakingUp(fed.Callback):
    """Prints the round from which a run continues."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, session: fed.Session) -> None:
        if session.round < session.rounds:
            self.console.print(f"going on after {session.round:,} rounds", highlight=False)


def _directory(options: Run, experiment: Experiment) -> Path:
    """The run's directory. The first process makes it unless the run is resumed; the others do not write."""
    if options.resume is not None:
        return options.resume
    if jax.process_index() != 0:
        return options.out or Path()
    name = f"{choice_of('task', options).title}-{experiment.method.title}"
    return create_directory(options.out, name, experiment.about)


def _exit_code(result: fed.Result) -> int:
    if result.diverged_at is not None:
        return errors.DIVERGED
    return exit_code() if result.interrupted else errors.DONE
