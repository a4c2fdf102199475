"""Comparisons: several methods, each tuned, run from the same initial parameters and shown in one table."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax import fed
from hiso_jax.algorithms import Method
from hiso_jax.checks import ParameterError, first_line
from hiso_jax.experiment import (
    Experiment,
    as_written,
    build_algorithm,
    build_population,
    build_task,
    check_methods,
    methods_of,
    notes,
    participation_of,
    simulation_config,
    target_of,
    virtual_note,
    with_training_gb,
)
from hiso_jax.fed.ledger import exists, read_regular, write_file
from hiso_jax.reports import (
    Compared,
    Report,
    as_page,
    as_results,
    check_figures,
    evaluation_line,
    number,
    save_picture,
    write_json,
)
from hiso_jax.tune.directory import CONFIG, asked, directory_for, own_method
from hiso_jax.tune.results import Comparison, budget_in_words
from hiso_jax.tune.search import Search, Tuned, how_tuned
from hiso_jax.tune.settings import Compare
from hiso_jax.tune.watcher import Watcher

# Examples read of each client, for the worst tenth of the clients.
READ_OF_A_CLIENT = 64
CALM = "in calm"
FIGURES = "compared.json"


def run_comparison(
    settings: Compare, task: Any, directory: Callable[[], Path], watcher: Watcher | None = None
) -> Comparison:
    """Tune every method, run each with every seed, and write the directory.

    Methods with the same seed share their initial parameters, partition, cohorts and batches. Every trial and every run
    is saved as soon as it ends, so that an interrupted comparison continues where it stopped. Several processes in one
    directory share its methods.

    Args:
      settings: the settings of the comparison.
      task: the task that the settings name.
      directory: creates or finds the directory; called after all checks of the settings.
      watcher: is notified of the progress.

    Raises:
      ValueError: the data or the settings cannot be used, and nothing was written; or a file of the directory was
        altered.
    """
    watcher, settings = watcher or Watcher(), with_training_gb(settings, task)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    populations = [build_population(settings, task, seed) for seed in seeds]
    search = Search(settings, task, watcher) if settings.own_rates is None else None
    methods = methods_of(settings.algorithms)
    check_methods(settings, task, methods.values())
    lengths = _lengths(settings, task, methods, populations[0].num_clients)
    folder = directory()
    if search is not None:
        search.begin(folder)
    config = {**as_written(settings), "target": target_of(settings, task)}
    write_json(folder / CONFIG, config)
    for note in notes(task, populations[0]):
        watcher.say(note)
    if search is not None and not virtual_note(populations[0]):
        for note in virtual_note(search.held.populations[0]):
            watcher.say(f"tuning with {note}")
    runs = _Runs(settings, task, folder, lengths, watcher)
    interrupted, elsewhere = False, list(methods)
    # Twice: another process may have released a method by then.
    for name in (*methods, *methods):
        if interrupted or name not in elsewhere:
            continue
        with own_method(folder, settings.algorithms.index(name)) as is_ours:
            if is_ours:
                tuned = _tuned(settings, search, methods[name], lengths[name], watcher)
                interrupted = tuned is None or runs.add_all(methods[name], tuned)
                elsewhere.remove(name)
    return runs.report(config, interrupted, tuple(elsewhere))


def compare(
    algorithms: Sequence[str] = Compare.algorithms,
    *,
    out: Path | str | None = None,
    watcher: Watcher | None = None,
    **options: Any,
) -> Comparison:
    """Tune several methods with equal numbers of runs, and run each at its best from the same initial parameters.

    This is ``hiso-jax compare``, whose options are keywords: ``task``, ``rounds``, ``seeds``, ``tries``,
    ``learning_rate`` and all others.

    Args:
      algorithms: names of methods.
      out: directory to write; a comparison with the same options in it is continued. None is a temporary directory,
        which is removed.
      watcher: is notified of the progress; ``tune.Progress()`` shows it.
      options: the options of the comparison.

    Raises:
      ParameterError: an option is unknown, out of range or without effect.

    Example:
      >>> from hiso_jax import tune
      >>> numbers = dict(rounds=10, clients=10, cohort=2, perturbations=1, batch_size=4, eval_every=5)
      >>> found = tune.compare(["decomfl", "hiso"], learning_rate=["0.01"], seeds=1, **numbers)
      >>> [(row["algorithm"], row["rounds"]) for row in found.rows()]
      [('decomfl', 10), ('hiso', 10)]
    """
    settings = asked(Compare, "compare", algorithms, options)
    task = build_task(settings)
    with directory_for(settings, out) as directory:
        return run_comparison(settings, task, directory, watcher)


def _lengths(settings: Compare, task: Any, methods: dict[str, Method], clients: int) -> dict[str, tuple[int, int]]:
    """The number of rounds of every method, and the number of rounds between its evaluations.

    Every method may spend the cost of the baseline's ``rounds``, in the budget's unit, and is evaluated equally often.
    """
    costs, participation = {}, participation_of(settings)
    for name, method in methods.items():
        algorithm = build_algorithm(settings, method, 1e-3)
        config = simulation_config(settings, settings.seed, algorithm)
        costs[name] = fed.round_costs(task, algorithm, config, clients, participation)
    base = getattr(costs[settings.reference], settings.budget)
    lengths = {}
    for name, cost in costs.items():
        share = base / getattr(cost, settings.budget)
        lengths[name] = max(1, int(settings.rounds * share)), max(1, round(settings.eval_every * share))
    return lengths


def _tuned(
    settings: Compare, search: Search | None, method: Method, length: tuple[int, int], watcher: Watcher
) -> Tuned | None:
    """The rate and schedule of a method, given or tuned; None if tuning was interrupted."""
    if search is None:
        assert settings.own_rates is not None
        return Tuned(*settings.own_rates[method.name])
    tuned = search.tune(method, *length)
    if tuned is not None:
        assert search.metric is not None
        said = how_tuned(method.name, tuned, search.metric, search.held.target)
        watcher.say(said)
    return tuned


class _Runs:
    """The finished runs of a comparison."""

    def __init__(
        self,
        settings: Compare,
        task: Any,
        directory: Path,
        lengths: dict[str, tuple[int, int]],
        watcher: Watcher,
    ) -> None:
        self.settings, self.task, self.directory, self.watcher = settings, task, directory, watcher
        self.target, self.lengths = target_of(settings, task), lengths
        self.compared: dict[str, Compared] = {}
        self.clients = build_population(settings, task, settings.seed).num_clients

    def add_all(self, method: Method, tuned: Tuned) -> bool:
        """Run a method with every seed, and return whether it was interrupted."""
        settings, done = self.settings, Compared(asdict(tuned))
        self.compared[method.name] = done
        rounds, every = self.lengths[method.name]
        local = settings.local_learning_rate if tuned.local_learning_rate is None else tuned.local_learning_rate
        whole = replace(settings, rounds=rounds, eval_every=every, schedule=tuned.schedule, local_learning_rate=local)
        for seed in range(settings.seed, settings.seed + settings.seeds):
            found = self._run(whole, method, tuned.learning_rate, seed)
            if found is None:
                return True
            calm = None
            if settings.protocol == "robustness":
                calm = self._run(whole.in_calm(), method, tuned.learning_rate, seed, CALM)
                if calm is None:
                    return True
            done.runs.append(found[0] if calm is None else {**found[0], "in_calm": calm[0]})
            done.histories.append(found[1])
        return False

    def _run(
        self, settings: Compare, method: Method, rate: float, seed: int, words: str = ""
    ) -> tuple[dict[str, Any], list[fed.Evaluation]] | None:
        """The figures and evaluations of a run, read from its files if it has ended; None if it was interrupted."""
        place = self.settings.algorithms.index(method.name)
        folder = self.directory / "runs" / f"{place}-{method.title}-seed-{seed}{words.replace(' ', '-')}"
        title = f"{method.name} seed {seed}{' ' if words else ''}{words}"
        kept = self._kept(folder)
        if kept is not None:
            self.watcher.say(f"{title}: all {kept[0]['rounds']:,} rounds are done")
            return kept
        own = {"algorithm": method.name, "learning_rate": rate, "seed": seed, "target": self.target}
        if method.sha256 is not None:
            own["algorithm_sha256"] = method.sha256
        resume = folder.exists()
        folder.parent.mkdir(exist_ok=True)
        about = {**as_written(settings), "schedule": settings.schedule, **own}
        storage = fed.Storage(folder, about, resume=resume)
        experiment = Experiment.of(replace(settings, seed=seed), method, rate, task=lambda _: self.task)
        report = Report()
        simulation = experiment.simulation(storage=storage, callbacks=(report,))
        with self.watcher.running(title, simulation, f"rate {rate:g}, {settings.schedule}"):
            result = simulation.run()
        if result.interrupted:
            return None
        of_clients = self._of_clients(result.params, experiment.population)
        figures = {**report.summary, "rounds_planned": settings.rounds, **of_clients}
        write_json(folder / FIGURES, {"figures": figures, "evaluations": [asdict(row) for row in result.metrics]})
        return figures, result.metrics

    def _of_clients(self, params: Any, population: Any) -> dict[str, Any]:
        """The metric of the clients, each on its own training examples: its deciles, and the mean of the worst tenth.

        Nothing is known for generation, because its training examples have no answers to score.
        """
        train, test = self.task.train, self.task.test
        if virtual_note(population) or (isinstance(train, Mapping) and not {*test} <= {*train}):
            return {"worst_tenth": None}
        each = fed.client_metrics(self.task, params, population, most=READ_OF_A_CLIENT)
        metric = fed.metric_of(self.task, each)
        ordered = np.sort(metric.sign * each[metric.name])
        worst = float(metric.sign * ordered[: max(1, len(ordered) // 10)].mean())
        deciles = np.quantile(each[metric.name], np.linspace(0, 1, 11)).tolist()
        return {"worst_tenth": worst, "client_deciles": deciles if np.isfinite(deciles).all() else None}

    def _kept(self, folder: Path) -> tuple[dict[str, Any], list[fed.Evaluation]] | None:
        if not exists(folder / FIGURES, "resume"):
            return None
        from pydantic import TypeAdapter

        try:
            content = json.loads(read_regular(folder / FIGURES))
            rows = TypeAdapter(list[fed.Evaluation]).validate_python(list(map(_read_back, content["evaluations"])))
            check_figures(content["figures"])
            return {**content["figures"]}, rows
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ParameterError(
                "resume",
                f"must be a directory whose runs are as they were written; {folder.name}/{FIGURES} is not "
                f"({first_line(error)})",
            ) from error

    def report(self, config: dict[str, Any], interrupted: bool, elsewhere: tuple[str, ...]) -> Comparison:
        """Write ``comparison.json``, ``metrics.jsonl`` and the picture, and return their content."""
        settings = self.settings
        compared = {name: self.compared[name] for name in settings.algorithms if name in self.compared}
        lines = [
            evaluation_line(row, algorithm=name, seed=run["seed"])
            for name, done in compared.items()
            for history, run in zip(done.histories, done.runs, strict=True)
            for row in history
        ]
        write_file(self.directory / "metrics.jsonl", "".join(lines).encode())
        finished = {name: done for name, done in compared.items() if done.runs}
        results = as_results(finished, settings.reference)
        write_json(self.directory / "comparison.json", {"config": config, "methods": results})
        metric = None
        if finished:
            metric = fed.metric_of(self.task, next(iter(finished.values())).histories[0][0].metrics)
        found = Comparison(settings, results, finished, metric, self.target, self.directory, interrupted, elsewhere)
        if finished:
            title = f"{settings.task}: {self.clients:,} clients, {settings.cohort} a round, {budget_in_words(settings)}"
            subject = found.subject()
            save_picture(subject, self.directory / "curves.png", title)
            write_file(self.directory / "report.html", as_page([subject]).encode())
        return found


def _read_back(row: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation read from JSON, with the numbers that are not finite."""
    metrics = {name: number(value) for name, value in row["metrics"].items()}
    return {**row, "train_loss": number(row["train_loss"]), "metrics": metrics}
