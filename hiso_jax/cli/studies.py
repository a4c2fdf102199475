"""``hiso-jax compare`` and ``hiso-jax sweep``: studies of several runs, and their tables."""

from rich.console import Console

from hiso_jax.cli import errors
from hiso_jax.cli.interrupt import exit_code
from hiso_jax.cli.progress import StudyProgress, load_task
from hiso_jax.cli.resume import continuing, resumed_study
from hiso_jax.experiment import choice_of
from hiso_jax.reports import create_directory, print_rows
from hiso_jax.tune import Compare, Sweep, run_comparison, run_sweep


def compare(options: Compare, console: Console) -> int:
    """Compare, print the table, and return the exit code; see :func:`hiso_jax.tune.compare`.

    Raises:
      UsageError: the options name data or a directory that cannot be used; in that case nothing has been written.
    """
    with errors.refusing():
        options = options if options.resume is None else resumed_study(options)
        task, name = load_task(options, console), f"{choice_of('task', options).title}-compare"
        found = run_comparison(
            options, task, lambda: options.resume or create_directory(options.out, name), StudyProgress(console)
        )
    if found.metric is not None:
        console.print(found.table())
        print_rows(console, found.facts())
    if found.elsewhere and not found.interrupted:
        names = ", ".join(found.elsewhere)
        console.print(f"other processes are at {names}; --resume tells of all when they have ended")
    console.print(f"written to {found.directory}", soft_wrap=True, highlight=False)
    if found.interrupted:
        again = continuing("compare", options, found.directory)
        console.print(f"interrupted: the table holds the finished runs; go on with: {again}", soft_wrap=True)
        return exit_code()
    return errors.DONE


def sweep(options: Sweep, console: Console) -> int:
    """Sweep, print the table, and return the exit code; see :func:`hiso_jax.tune.sweep`.

    Raises:
      UsageError: the options name data or a directory that cannot be used; in that case nothing has been written.
    """
    with errors.refusing():
        options = options if options.resume is None else resumed_study(options)
        task, name = load_task(options, console), f"{choice_of('task', options).title}-sweep"
        swept = run_sweep(
            options, task, lambda: options.resume or create_directory(options.out, name), StudyProgress(console)
        )
    console.print(swept.table())
    for sentence in swept.verdicts():
        console.print(sentence, soft_wrap=True, highlight=False)
    console.print(f"written to {swept.directory}", soft_wrap=True, highlight=False)
    if swept.interrupted:
        again = continuing("sweep", options, swept.directory)
        console.print(f"interrupted: the settings are compared as far as they got; go on with: {again}", soft_wrap=True)
        return exit_code()
    return errors.DONE
