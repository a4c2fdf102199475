"""``hiso-jax diagnose``: what a run's curvature is worth, and what limits its rounds."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import jax
from rich.console import Console

from hiso_jax import algorithms, fed
from hiso_jax.checks import ParameterError
from hiso_jax.choices import Listed
from hiso_jax.cli import errors
from hiso_jax.cli.arguments import Positional
from hiso_jax.cli.loading import load_task
from hiso_jax.cli.options import Run
from hiso_jax.cli.progress import working
from hiso_jax.cli.restore import Again, base_of, options_of, recorded
from hiso_jax.experiment import build_population, recorded_algorithm
from hiso_jax.fed.diagnosis import Diagnosis, Effort, Examined, Vectors, diagnose, offset_of
from hiso_jax.fed.ledger import LedgerFile, exists
from hiso_jax.reports import as_json, diagnosis_picture, diagnosis_table, write_json

POINTS = 4


@dataclass(frozen=True, kw_only=True)
class Diagnose(Effort, Again):
    """Tell what a run's curvature resembles, and whether directions or data limit its rounds, by true derivatives.

    Attributes:
      run: directory of the run.
      at: rounds after which to look, comma-separated; by default five from its beginning to its end.
      unfinished: look at a run that has not finished, too.
      model: where the base checkpoint is now; by default where it was.
      data_dir: where the data are now; by default where they were.
      partition: FILE:NAME of its partition again, if it is its user's own.
      examples: training examples whose mean loss is the objective.
      exact_up_to: parameters up to which the Hessian's diagonal is exact; beyond, it is estimated.
      samples: random signs of which it is estimated.
      lanczos_steps: products with the Hessian for its spectrum.
      clients: whose scalars are compared, at most.
      batches: of each of them.
      directions: along which.
      together: examples whose gradients are in memory at a time.
      out: directory for diagnosis.json and diagnosis.png; by default the run's.
    """

    run: Annotated[Path, Positional]
    at: Annotated[tuple[int, ...], Listed(int, "R,R,…")] = ()
    unfinished: bool = False
    model: str | None = None
    data_dir: Path | None = None
    partition: str | None = None
    out: Path | None = None


def diagnose_run(options: Diagnose, console: Console) -> int:
    """Look, report, write, and return the exit code.

    Raises:
      UsageError: the run cannot be read or rebuilt, has not so many rounds, or matfree is missing.
    """
    with errors.refusing():
        if find_spec("matfree") is None:
            raise ValueError("diagnose needs matfree: pip install 'hiso-jax[diagnostics]'")
        ledger = recorded(options.run, unfinished=options.unfinished)
        rounds = _rounds(options, len(ledger.rows))
        moved = {"model": options.model, "data_dir": None if options.data_dir is None else str(options.data_dir)}
        about = ledger.header["about"] | {name: value for name, value in moved.items() if value is not None}
        run = options_of(about, options.again, ("task", "partition", "schedule"))
        folder = options.out or (options.run if options.run.is_dir() else options.run.parent)
        if options.out is not None and exists(options.out):
            raise ParameterError("out", f"must be a directory that does not exist yet; {options.out} does")
        # Before the work, which takes a while.
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found, last = _along(options, run, ledger, rounds, console)
        except BaseException:
            if options.out is not None:
                folder.rmdir()
            raise
        write_json(
            folder / "diagnosis.json", {"effort": _effort(options), "rounds": [as_json(x._asdict()) for x in found]}
        )
        diagnosis_picture(found, last, folder / "diagnosis.png", title=f"{run.task}, {run.algorithm}")
    console.print(diagnosis_table(found))
    for each in (found[0], found[-1]) if len(found) > 1 else found:
        console.print(f"after {each.round:,} rounds {each.words}", soft_wrap=True, highlight=False)
    console.print(f"written to {folder}/diagnosis.json and .png", soft_wrap=True, highlight=False)
    return errors.DONE


def _rounds(options: Diagnose, total: int) -> list[int]:
    """After which rounds to look.

    Raises:
      ValueError: the run has not so many.
    """
    wanted = options.at or tuple(total * place // POINTS for place in range(POINTS + 1))
    for each in wanted:
        if not 0 <= each <= total:
            raise ParameterError("at", f"must be between 0 and the {total} rounds of the ledger, got {each}")
    return sorted(set(wanted))


def _effort(options: Diagnose) -> dict[str, int]:
    return {name: getattr(options, name) for name in Effort.__dataclass_fields__}


def _along(
    options: Diagnose, run: Run, ledger: LedgerFile, rounds: list[int], console: Console
) -> tuple[list[Diagnosis], Vectors]:
    """What is found after each of these rounds, and what it is made of after the last."""
    task = load_task(run, console)
    population = build_population(run, task, run.seed)
    params, updates = base_of(run, ledger.header["base"], "model").params, ledger.records.updates_with_losses
    algorithm = recorded_algorithm(run, algorithms.load(run.algorithm), run.learning_rate)
    state, done, found, last = algorithm.optimizer.init(params), 0, [], None
    effort = Effort(**_effort(options))
    for place, at in enumerate(rounds):
        with working(console, f"looking at the model after {at:,} rounds, {place + 1} of {len(rounds)}"):
            params, state = fed.replay(params, algorithm, updates.between(done, at), state=state)
            done = at
            offset = offset_of(ledger.records.scalars, ledger.records.valid, at)
            examined = Examined(task, population, run.cohort, run.batch_size, params, state, at)
            one, last = diagnose(examined, jax.random.key(run.seed), effort, offset)
        found.append(one)
    assert last is not None
    return found, last
