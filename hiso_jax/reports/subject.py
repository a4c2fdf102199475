"""What a report or a figure shows: a run or a comparison, from memory or from the files of its directory."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax import fed
from hiso_jax.checks import ParameterError, is_real
from hiso_jax.fed.ledger import LEDGER, exists, read_regular
from hiso_jax.reports.comparison import Compared, as_results
from hiso_jax.reports.directory import number
from hiso_jax.reports.paired import FEWEST_PAIRS, baseline_of, check_figures, interval

COMPARISON = "comparison.json"
METRICS = "metrics.jsonl"
# What ``comparison.json`` holds of a method's runs, beside its setting.
OF_RUNS = ("runs", "reached", "diverged", "ratios", "cost_of_trouble")
# A target that is reached within fewer evaluations is known too coarsely for a ratio.
COARSE = 4
# Options that tell no runs apart, options that do whatever the methods are, and most of them in a label.
NOT_IN_LABELS = ("out", "resume", "algorithm", "algorithm_sha256", "log", "target")
OF_EVERY_METHOD = (
    "alpha",
    "clients",
    "cohort",
    "partition",
    "rounds",
    "seed",
    "model",
    "attack",
    "attackers",
    "availability",
)
MOST_IN_LABEL = 2
# An axis of a chart → its title.
AXES = {
    "round": "rounds",
    "bytes_up": "bytes up, all clients",
    "forward_passes": "forward passes, all clients",
    "simulated_seconds": "simulated seconds",
}


@dataclass(frozen=True)
class Subject:
    """A run, or a comparison of methods.

    Attributes:
      title: its name: of a comparison its task and methods, of a run its task, method and directory.
      compared: method → its runs and their evaluations.
      metric: the metric that counts.
      target: the value of the metric up to which costs are counted, or None.
      baseline: the method whose costs are 1; None for a run.
      config: the options, as the directory has them.
      made_with: versions and device.
      left_out: sentences on what is not in the figures: runs that are not done or diverged, messages left out.
      path: the directory; None if it is gone.
      command: the command that makes it again; empty if it is unknown.
    """

    title: str
    compared: Mapping[str, Compared]
    metric: fed.Metric
    target: float | None
    baseline: str | None
    config: Mapping[str, Any] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    path: Path | None = None
    command: str = ""

    @cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """By method its setting, its runs and its costs relative to the baseline; empty for a run."""
        return {} if self.baseline is None else as_results(self.compared, self.baseline)


@dataclass(frozen=True)
class Line:
    """The runs of a method as a line of a chart.

    Attributes:
      at: the position on the axis at each evaluation: the mean over the runs, [E].
      mean: the mean of the metric over the runs, [E].
      low, high: the 95 % interval of the mean by Student's t for five or more runs, else the lowest and the highest
        run, [E].
      runs: the number of runs.
    """

    at: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: int


def line_of(histories: Sequence[Sequence[fed.Evaluation]], axis: str, metric: str) -> Line | None:
    """The line of a method's runs, up to the end of the shortest run; None if the axis or the metric is not recorded.

    Args:
      histories: the evaluations of each run.
      axis: a name in :data:`AXES`.
      metric: name of a metric, or ``train_loss``.
    """
    length = min(map(len, histories))
    at = np.array([[getattr(row, axis) for row in run[:length]] for run in histories], dtype=float)
    values = np.array(
        [
            [row.train_loss if metric == "train_loss" else row.metrics.get(metric) for row in run[:length]]
            for run in histories
        ],
        dtype=float,
    )
    if np.isnan(at).any() or np.isnan(values).all():
        return None
    low, high = values.min(0), values.max(0)
    if len(values) >= FEWEST_PAIRS:
        each = [interval(column) for column in values.T]
        low, high = (np.array([one[place] for one in each], dtype=float) for place in (1, 2))
    return Line(at.mean(0), values.mean(0), low, high, len(values))


def spread_in_words(runs: int) -> str:
    """What the band of a line shows, for a number of runs."""
    if runs < 2:
        return ""
    if runs < FEWEST_PAIRS:
        return f"lines: means of {runs} seeds; bands: lowest to highest seed"
    return f"lines: means of {runs} seeds; bands: 95 % intervals of the mean"


def coarse_ratios(compared: Mapping[str, Compared]) -> list[str]:
    """Sentences on methods whose rounds to the target are hardly more than the rounds between evaluations."""
    said = []
    for name, done in compared.items():
        reached = [run["rounds_to_target"] for run in done.runs if run.get("rounds_to_target") is not None]
        rounds = [row.round for row in done.histories[0]] if done.histories else []
        if reached and len(rounds) > 1 and float(np.mean(reached)) < COARSE * (rounds[1] - rounds[0]):
            said.append(
                f"{name}: it reached the target within about {float(np.mean(reached)) / (rounds[1] - rounds[0]):.0f} "
                "evaluations, so its ratio is coarse; take a smaller eval_every, or a higher target"
            )
    return said


def caveats(compared: Mapping[str, Compared], missing: Sequence[str] = ()) -> list[str]:
    """Sentences on what the figures leave out.

    Args:
      compared: the runs.
      missing: names of methods without a finished run.
    """
    said = [f"{name}: no finished run" for name in missing]
    fewest = min((len(done.runs) for done in compared.values()), default=0)
    if len(compared) > 1 and fewest < FEWEST_PAIRS:
        said.append(f"{fewest} seeds: ratios have no intervals, which need {FEWEST_PAIRS}")
    if len(compared) > 1:
        said += coarse_ratios(compared)
    for name, done in compared.items():
        diverged = [str(run["seed"]) for run in done.runs if run.get("diverged_at_round") is not None]
        if diverged:
            said.append(f"{name}: diverged with seed {', '.join(diverged)}, whose later rounds do not exist")
        if any(run.get("interrupted") for run in done.runs):
            said.append(f"{name}: a run was interrupted")
        for kind, words in (
            ("absent", "clients were absent"),
            ("dropped", "clients dropped out"),
            ("late", "messages were late"),
            ("invalid", "messages were not finite"),
        ):
            count = sum(run.get("attendance", {}).get(kind, 0) for run in done.runs)
            if count:
                said.append(f"{name}: {count:,} times {words}, and did not count")
        said += list(dict.fromkeys(f"{name}: {sentence}" for run in done.runs for sentence in run.get("concerns", ())))
    return said


def read_subject(path: Path) -> Subject:
    """The run or the comparison in a directory.

    Raises:
      ParameterError: there is neither, or a file was altered.
    """
    if exists(path / COMPARISON):
        return _comparison(path)
    if exists(path / LEDGER) or path.name == LEDGER:
        return _run(path)
    raise ParameterError("paths", f"must be directories of runs or comparisons; {path} holds neither")


def _comparison(path: Path) -> Subject:
    try:
        written = json.loads(read_regular(path / COMPARISON))
        config, methods = written["config"], written["methods"]
        compared = {}
        for name, method in methods.items():
            for run in method["runs"]:
                check_figures(run)
            tuned = {key: value for key, value in method.items() if key not in OF_RUNS}
            _check_tuned(tuned)
            compared[name] = Compared(tuned, method["runs"])
        _read_histories(path / METRICS, compared)
        runs = [run for done in compared.values() for run in done.runs]
        if not runs:
            raise ParameterError("paths", f"must be directories with a finished run; {path} has none yet")
        baseline = baseline_of(config["algorithms"], config.get("baseline"))
        made_with = {"jax": runs[0].get("jax_version", "?"), "device": runs[0].get("device", "?")}
    except ParameterError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ParameterError(
            "paths", f"must be directories whose files are as they were written; {path / COMPARISON} is not"
        ) from error
    metric = runs[0]["metric"]
    missing = [name for name in config["algorithms"] if name not in compared]
    title = f"{config['task']}: {', '.join(compared)}"
    return Subject(
        title,
        compared,
        fed.Metric(metric, metric != "loss"),
        config.get("target"),
        baseline,
        config,
        made_with,
        caveats(compared, missing),
        path,
    )


def _check_tuned(tuned: Mapping[str, Any]) -> None:
    """Refuse a method's setting that was edited.

    Raises:
      ValueError, TypeError, KeyError: a value is missing, or is none.
    """
    settings = [tuned, *tuned["trials"]]
    if not all(is_real(each["learning_rate"]) and isinstance(each["schedule"], str) for each in settings):
        raise ValueError("a setting must have a rate and a schedule")
    finals = [end for trial in tuned["trials"] for end in trial["final"]]
    if not all(end is None or is_real(end) for end in finals):
        raise ValueError("the final values of trials must be numbers")


def _read_histories(path: Path, compared: Mapping[str, Compared]) -> None:
    """Read the evaluations of a comparison's runs, in the order of its runs."""
    known = {each.name for each in fields(fed.Evaluation)}
    found: dict[tuple[str, int], list[fed.Evaluation]] = {}
    for text in read_regular(path).decode().splitlines():
        row = json.loads(text)
        key = row.pop("algorithm"), row.pop("seed")
        metrics = {name: number(value) for name, value in row.items() if name not in known}
        costs = {name: value for name, value in row.items() if name in known}
        costs["train_loss"] = number(costs["train_loss"])
        found.setdefault(key, []).append(fed.Evaluation(**costs, metrics=metrics))
    for name, done in compared.items():
        done.histories.extend(found[name, run["seed"]] for run in done.runs)


def _check_summary(summary: Any) -> None:
    """Refuse a run's summary that was edited.

    Raises:
      ValueError, TypeError, AttributeError: a figure is missing, or is none.
    """
    check_figures({"rounds_planned": summary["rounds"], "worst_tenth": None, **summary})
    if any(not isinstance(count, int) for count in summary.get("attendance", {}).values()):
        raise ValueError("attendance must be counts")
    if any(not isinstance(sentence, str) for sentence in summary.get("concerns", [])):
        raise ValueError("concerns must be sentences")


def _run(path: Path) -> Subject:
    ledger = fed.load(path, unfinished=True)
    folder = ledger.path.parent
    if not ledger.evaluations:
        raise ParameterError("paths", f"must be runs with an evaluation; {path} has none yet")
    about, header = ledger.about, ledger.header
    summary: dict[str, Any] = {}
    if exists(folder / "summary.json"):
        try:
            summary = json.loads(read_regular(folder / "summary.json"))
            _check_summary(summary)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ParameterError(
                "paths", f"must be runs whose files are as they were written; {folder / 'summary.json'} is not"
            ) from error
    names = list(ledger.evaluations[0].metrics)
    # The task that names the metric is not loaded for an unfinished run.
    metric = summary.get("metric") or ("loss" if "loss" in names else names[0])
    task, algorithm = about.get("task", "a program of its own"), about.get("algorithm") or "a method of its own"
    last = ledger.evaluations[-1]
    figures = {
        **{name: value for name, value in last.metrics.items()},
        "metric": metric,
        "seed": header["config"]["seed"],
        "rounds": len(ledger.rows),
        "rounds_planned": ledger.planned,
        "bytes_up": last.bytes_up,
        "bytes_down": last.bytes_down,
        "forward_passes": last.forward_passes,
        "simulated_seconds": last.simulated_seconds,
        "diverged_at_round": None if ledger.seal is None else ledger.seal["diverged_at"],
        "params_sha256": None if ledger.seal is None else ledger.seal["params_sha256"],
        **summary,
    }
    compared = {algorithm: Compared({"learning_rate": about.get("learning_rate")}, [figures], [ledger.evaluations])}
    left_out = caveats(compared)
    if ledger.seal is None:
        left_out.append(f"{algorithm}: {len(ledger.rows):,} of {ledger.planned:,} rounds are done")
    made = header["environment"]
    made_with = {**made["versions"], "device": made["device"]}
    title = f"{task}: {algorithm}, {folder.name}"
    target = summary.get("target", about.get("target"))
    return Subject(
        title, compared, fed.Metric(metric, metric != "loss"), target, None, about, made_with, left_out, folder
    )


def side_by_side(subjects: Sequence[Subject]) -> list[Subject]:
    """The same, with all runs of one task and metric side by side as one subject, named by their directories."""
    groups: dict[Any, list[Subject]] = {}
    for place, subject in enumerate(subjects):
        own = place if subject.baseline is not None else (subject.config.get("task"), subject.metric)
        groups.setdefault(own, []).append(subject)
    return [_together(group) if len(group) > 1 else group[0] for group in groups.values()]


def _together(runs: Sequence[Subject]) -> Subject:
    compared: dict[str, Compared] = {}
    labels = _labels(runs)
    for place, run in enumerate(runs):
        ((_, done),) = run.compared.items()
        label = labels[place]
        while label in compared:
            label += "'"
        compared[label] = done
    targets = {run.target for run in runs}
    made_with = {
        key: value for key, value in runs[0].made_with.items() if all(run.made_with.get(key) == value for run in runs)
    }
    return replace(
        runs[0],
        title=f"{runs[0].config.get('task', 'a program of its own')}: {len(runs)} runs",
        compared=compared,
        target=targets.pop() if len(targets) == 1 else None,
        config=_shared([run.config for run in runs]),
        made_with=made_with | {label: str(run.path) for label, run in zip(compared, runs, strict=True) if run.path},
        left_out=[sentence for run in runs for sentence in run.left_out],
        path=None,
        command="\n".join(run.command for run in runs if run.command),
    )


def _labels(runs: Sequence[Subject]) -> list[str]:
    """The method of each run with the options in which the runs differ; its directory's name if that is no label."""
    methods = [next(iter(run.compared)) for run in runs]
    configs = [run.config for run in runs]
    known = [name for name in configs[0] if name not in NOT_IN_LABELS and all(name in config for config in configs)]
    labels = []
    for method, run in zip(methods, runs, strict=True):
        # Methods differ in defaults of their own, which their names stand for.
        alike = [each.config for each, other in zip(runs, methods, strict=True) if other == method]
        own = [
            name
            for name in known
            if any(config[name] != run.config[name] for config in (configs if name in OF_EVERY_METHOD else alike))
        ]
        labels.append(
            ", ".join([method, *(f"{name.replace('_', ' ')} {run.config[name]}" for name in own[:MOST_IN_LABEL])])
        )
    return [
        label if labels.count(label) == 1 else f"{method}, {run.path.name if run.path else 'run'}"
        for label, method, run in zip(labels, methods, runs, strict=True)
    ]


def _shared(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of several runs; where they differ, their values in order."""
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name) for config in configs] for name in names}
    return {
        name: each[0] if all(one == each[0] for one in each) else " | ".join(map(str, each))
        for name, each in values.items()
    }
