"""Results of sweeps and comparisons: rows, tables and sentences."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.experiment import as_written, command_of
from hiso_jax.extras import import_extra
from hiso_jax.reports import (
    Compared,
    Subject,
    as_fragment,
    as_text,
    caveats,
    coarse_ratios,
    comparison_table,
    sweep_table,
    verdict,
)
from hiso_jax.tune.settings import Compare

# Evaluations whose mean has to attain the target, see ``fed.first_at_target``.
HELD = 3


class Rows:
    """A result with a row for each run."""

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each run."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """:meth:`rows` as a ``pandas.DataFrame``.

        Raises:
          ParameterError: pandas is not installed.
        """
        pd = import_extra("pandas", "to_pandas", "cannot be called")
        return pd.DataFrame(self.rows())


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Rows):
    """The result of a comparison.

    Attributes:
      settings: the settings of the comparison.
      results: by method its setting, its runs and their ratios to the baseline, as ``comparison.json`` has them.
      compared: the finished runs by method, with their evaluations.
      metric: the metric that counts; None if no run has finished.
      target: the value of the metric up to which costs are counted, or None.
      directory: the directory of all files.
      interrupted: whether the comparison was stopped; it can be continued.
      elsewhere: names of methods that are not done here: another process has them, or the comparison was interrupted.
    """

    settings: Compare
    results: dict[str, dict[str, Any]]
    compared: dict[str, Compared]
    metric: fed.Metric | None
    target: float | None
    directory: Path
    interrupted: bool
    elsewhere: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each run: the method, its schedule, and the figures of its summary that are plain values."""
        plain = (str, int, float, bool, type(None))
        return [
            {
                "algorithm": name,
                "schedule": done.tuned["schedule"],
                **{key: value for key, value in run.items() if isinstance(value, plain) and key != "algorithm"},
            }
            for name, done in self.compared.items()
            for run in done.runs
        ]

    def table(self) -> Any:
        """The ``rich`` table that the command line prints; None if no run has finished."""
        if self.metric is None:
            return None
        return comparison_table(self.compared, self.results, self.metric, self.target, self.settings.reference)

    def facts(self) -> dict[str, str]:
        """The protocol, the tuning and the seeds in words."""
        settings = self.settings
        trials = {len(done.tuned["trials"]) * settings.tuning_seeds for done in self.compared.values()}
        counted = ", ".join(map(str, sorted(trials)))
        return {
            "protocol": f"{settings.protocol.replace('-', ' ')}; {budget_in_words(settings)}",
            "tuned": f"{counted} runs each, other seeds, validation examples" if any(trials) else "no: rates as given",
            "seeds": f"{settings.seeds}, paired" + ("" if settings.seeds > 4 else "; intervals need 5"),
            **self._rounds_planned(),
            **self._doubts(),
            **({"interrupted": f"not done: {', '.join(self.elsewhere) or 'some runs'}"} if self.interrupted else {}),
        }

    def _doubts(self) -> dict[str, str]:
        """What limits the ratios: nobody reached the target, or soon after the start."""
        runs = [run for done in self.compared.values() for run in done.runs]
        if self.target is not None and runs and all(run["rounds_to_target"] is None for run in runs):
            most = max(len(history) for done in self.compared.values() for history in done.histories) - 1
            few = f"; only {most} evaluations were made, take a smaller eval_every" if most < HELD else ""
            words = f"no run held {self.target:g} for three evaluations{few}"
            return {"target": f"{words}: compare the values at the end, or give a lower target"}
        coarse = coarse_ratios(self.compared) if len(self.compared) > 1 else []
        return {"coarse": "; ".join(coarse)} if coarse else {}

    def subject(self) -> Subject:
        """The comparison as the subject of a report.

        Raises:
          ParameterError: no run has finished.
        """
        if self.metric is None:
            raise ParameterError("paths", "must have a finished run; this comparison has none")
        settings = self.settings
        config = {**as_written(settings), "target": self.target}
        runs = next(iter(self.compared.values())).runs
        return Subject(
            f"{config['task']}: {', '.join(self.compared)}",
            self.compared,
            self.metric,
            self.target,
            settings.reference,
            config,
            {"jax": runs[0]["jax_version"], "device": runs[0]["device"]},
            caveats(self.compared, self.elsewhere),
            self.directory if self.directory.exists() else None,
            command_of(config, "compare", Compare) if isinstance(settings.task, str) else "",
        )

    def _repr_html_(self) -> str | None:
        return None if self.metric is None else as_fragment(self.subject())

    def _rounds_planned(self) -> dict[str, str]:
        """How many rounds the budget gives each method, if it gives them different numbers."""
        planned = {name: max(run["rounds_planned"] for run in done.runs) for name, done in self.compared.items()}
        if len(set(planned.values())) < 2:
            return {}
        return {"rounds": ", ".join(f"{name} {rounds:,}" for name, rounds in planned.items())}

    def __repr__(self) -> str:
        """The table and the facts below it, as text."""
        if self.metric is None:
            return f"Comparison({self.directory}: no finished run)"
        return "\n".join([as_text(self.table()), *(f"  {name}: {said}" for name, said in self.facts().items())])


@dataclass(frozen=True, eq=False, repr=False)
class Swept(Rows):
    """The results of sweeps of one or several methods.

    Attributes:
      results: by method, every run's evaluations.
      target: the value of the metric up to which rounds are counted, or None.
      directory: the directory of all files.
    """

    results: dict[str, fed.SweepResult]
    target: float | None
    directory: Path

    @property
    def interrupted(self) -> bool:
        """Whether a sweep was stopped; it can be continued."""
        return any(result.interrupted for result in self.results.values())

    def best(self) -> dict[str, fed.Best]:
        """The best setting of each method that was not interrupted."""
        return {name: each.best(self.target) for name, each in self.results.items() if not each.interrupted}

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each run: the method, its setting, the metric at the end, and rounds to the target."""
        rows = []
        for name, result in self.results.items():
            final = result.final()
            first = None if self.target is None else result.rounds_to(self.target)
            for s, m, rate in np.ndindex(final.shape):
                diverged = int(result.diverged_at[s, m, rate])
                reached = None if first is None or not np.isfinite(first[s, m, rate]) else float(first[s, m, rate])
                rows.append(
                    {
                        "algorithm": name,
                        "seed": result.seeds[s],
                        "mu": result.mus[m],
                        "learning_rate": result.learning_rates[rate],
                        "local_learning_rate": None if result.local_rates is None else result.local_rates[rate],
                        f"final_{result.metric.name}": float(final[s, m, rate]),
                        "rounds_to_target": reached,
                        "diverged_at_round": None if diverged < 0 else diverged,
                    }
                )
        return rows

    def table(self) -> Any:
        """The ``rich`` table that the command line prints."""
        return sweep_table(self.results, self.target)

    def verdicts(self) -> list[str]:
        """A sentence for each method: its best setting and why."""
        return [verdict(name, result, self.target) for name, result in self.results.items()]

    def __repr__(self) -> str:
        """The table and the verdicts, as text."""
        return "\n".join([as_text(self.table()), *self.verdicts()])


def budget_in_words(settings: Compare) -> str:
    """The budget of every method of a comparison, in words."""
    unit = {"passes": "forward passes", "bytes": "bytes up", "seconds": "simulated seconds", "rounds": "rounds"}
    if settings.budget == "rounds":
        return f"{settings.rounds:,} rounds"
    return f"the {unit[settings.budget]} of {settings.rounds:,} rounds of {settings.reference}"
