"""``hiso-jax diagnose``: how good a run's curvature is, and what limits its rounds."""

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
from hiso_jax.cli.options import Run
from hiso_jax.cli.progress import load_task, working
from hiso_jax.cli.restore import Again, base_of, options_of, recorded
from hiso_jax.experiment import build_population, recorded_algorithm
from hiso_jax.fed.diagnosis import Diagnosis, Effort, Examined, Vectors, diagnose, offset_of
from hiso_jax.fed.ledger import LedgerFile, exists
from hiso_jax.reports import as_json, diagnosis_picture, diagnosis_table, write_json

POINTS = 4


@dataclass(frozen=True, kw_only=True)
class Diagnose(Effort, Again):
    """Compare a run's curvature with true derivatives, and tell whether directions or data limit its rounds.

    Attributes:
      run: directory of the run.
      at: rounds after which the model is examined, comma-separated; by default five from beginning to end.
      unfinished: accept a run that has not finished.
      model: where the base checkpoint is now; by default where it was.
      data_dir: where the data are now; by default where they were.
      partition: FILE:NAME of the run's partition, needed if that is user code.
      examples: training examples whose mean loss is the objective.
      exact_up_to: number of parameters up to which the Hessian's diagonal is exact; above it, it is estimated.
      samples: vectors of random signs from which the diagonal is estimated.
      lanczos_steps: products with the Hessian for its spectrum.
      clients: clients whose scalars are compared, at most.
      batches: batches of each of these clients.
      directions: directions along which these scalars are measured.
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
    """Examine the run, report, write the files, and return the exit code.

    Raises:
      UsageError: the run cannot be read or rebuilt, has too few rounds, or matfree is missing.
    """
    with errors.refusing():
        if find_spec("matfree") is None:
            raise ValueError("diagnose needs matfree: pip install '.[diagnostics]'")
        ledger = recorded(options.run, unfinished=options.unfinished)
        rounds = _rounds(options, len(ledger.rows))
        moved = {"model": options.model, "data_dir": None if options.data_dir is None else str(options.data_dir)}
        about = ledger.header["about"] | {name: value for name, value in moved.items() if value is not None}
        run = options_of(about, options.again, ("task", "partition", "schedule"))
        folder = options.out or (options.run if options.run.is_dir() else options.run.parent)
        if options.out is not None and exists(options.out):
            raise ParameterError("out", f"must be a directory that does not exist yet; {options.out} does")
        # The folder is made before the work, which takes a while.
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
    """The rounds after which the model is examined, sorted.

    Raises:
      ValueError: the run has fewer rounds.
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
    """The diagnosis after each of these rounds, and the vectors behind the last one."""
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
