"""``hiso-jax compare``: several methods, each at its best, from the same starts, in one table."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hiso_jax import fed
from hiso_jax.algorithms import Method
from hiso_jax.checks import ParameterError, first_line
from hiso_jax.cli import exit_codes
from hiso_jax.cli.claims import claimed
from hiso_jax.cli.comparing import Compare
from hiso_jax.cli.interrupt import exit_code, stop_on_interrupt
from hiso_jax.cli.loading import load_task, notes, virtual_note
from hiso_jax.cli.progress import Display
from hiso_jax.cli.restore import CONFIG, resumed_study
from hiso_jax.cli.tuning import Search, Tuned, how_tuned
from hiso_jax.experiment import (
    Setting,
    as_written,
    build_algorithm,
    build_population,
    build_simulation,
    check_methods,
    choice_of,
    methods_of,
    participation_of,
    simulation_config,
    target_of,
)
from hiso_jax.fed.ledger import exists, read_regular, write_whole
from hiso_jax.reports import (
    Compared,
    as_results,
    check_figures,
    comparison_picture,
    comparison_table,
    create_directory,
    evaluation_line,
    print_rows,
    write_json,
)

# Of a client's examples, for the worst tenth of the clients.
READ_OF_A_CLIENT = 64
CALM = "in calm"
FIGURES = "compared.json"


def compare(options: Compare, console: Console) -> int:
    """Tune every method, run each with every seed, write the directory, print the table, and return the exit code.

    Methods with the same seed share their initial parameters, their partition, their cohorts and their batches. Every
    trial and every run is kept as soon as it has ended, so that a comparison that was ended goes on where it was.
    Several processes that resume one comparison share its methods.

    Raises:
      UsageError: the options name data or a directory that cannot be used; nothing has been written then.
    """
    with exit_codes.refusing():
        options = options if options.resume is None else resumed_study(options)
        task = load_task(options, console)
        populations = [
            build_population(options, task, seed) for seed in range(options.seed, options.seed + options.seeds)
        ]
        search = Search(options, task, None, console) if options.own_rates is None else None
        participation_of(options)
        methods = methods_of(options.algorithms)
        check_methods(options, task, methods.values())
        lengths = _lengths(options, task, methods, populations[0].num_clients)
        directory = options.resume or create_directory(options.out, f"{choice_of('task', options).title}-compare")
        if search is not None:
            search.begin(directory)
    config = {**as_written(options), "target": target_of(options, task)}
    write_json(directory / CONFIG, config)
    for note in notes(task, populations[0]):
        console.print(note, soft_wrap=True, highlight=False)
    if search is not None and not virtual_note(populations[0]):
        for note in virtual_note(search.held.populations[0]):
            console.print(f"tuning with {note}", soft_wrap=True, highlight=False)
    runs = _Runs(options, task, directory, lengths, console)
    interrupted, elsewhere = False, list(methods)
    # Twice: what another process had in hand may be done by then.
    for name in (*methods, *methods):
        if interrupted or name not in elsewhere:
            continue
        with claimed(directory, options.algorithms.index(name)) as is_ours:
            if is_ours:
                tuned = _tuned(options, search, methods[name], lengths[name], console)
                interrupted = tuned is None or runs.add_all(methods[name], tuned)
                elsewhere.remove(name)
    runs.report(config)
    if elsewhere and not interrupted:
        console.print(f"other processes are at {', '.join(elsewhere)}; --resume tells of all when they have ended")
    console.print(f"written to {directory}", soft_wrap=True, highlight=False)
    if interrupted:
        again = f"hiso-jax compare --resume {directory}"
        console.print(f"interrupted: the table holds the finished runs; go on with: {again}", soft_wrap=True)
        return exit_code()
    return exit_codes.DONE


def _lengths(options: Compare, task: Any, methods: dict[str, Method], clients: int) -> dict[str, tuple[int, int]]:
    """How many rounds every method may run, and how many lie between its evaluations.

    Each gets of the budget's unit what the baseline's ``rounds`` cost, and is evaluated as often.
    """
    costs = {}
    for name, method in methods.items():
        algorithm = build_algorithm(options, method, 1e-3)
        config = simulation_config(options, options.seed, algorithm)
        costs[name] = fed.round_costs(task, algorithm, config, clients, participation_of(options))
    base = getattr(costs[options.reference], options.budget)
    lengths = {}
    for name, cost in costs.items():
        share = base / getattr(cost, options.budget)
        lengths[name] = max(1, int(options.rounds * share)), max(1, round(options.eval_every * share))
    return lengths


def _tuned(
    options: Compare, search: Search | None, method: Method, length: tuple[int, int], console: Console
) -> Tuned | None:
    """What a method runs with, asked for or tuned; None if tuning was interrupted."""
    if search is None:
        assert options.own_rates is not None
        return Tuned(*options.own_rates[method.name])
    tuned = search.tune(method, *length)
    if tuned is not None:
        assert search.metric is not None
        said = how_tuned(method.name, tuned, search.metric, search.held.target)
        console.print(said, soft_wrap=True, highlight=False)
    return tuned


class _Runs:
    """The finished runs of a comparison."""

    def __init__(
        self,
        options: Compare,
        task: Any,
        directory: Path,
        lengths: dict[str, tuple[int, int]],
        console: Console,
    ) -> None:
        self.options, self.task, self.directory, self.console = options, task, directory, console
        self.target, self.lengths = target_of(options, task), lengths
        self.compared: dict[str, Compared] = {}
        self.clients = build_population(options, task, options.seed).num_clients

    def add_all(self, method: Method, tuned: Tuned) -> bool:
        """Run a method with every seed, and return whether it was interrupted."""
        options, done = self.options, Compared(asdict(tuned))
        self.compared[method.name] = done
        rounds, every = self.lengths[method.name]
        whole = replace(options, rounds=rounds, eval_every=every, schedule=tuned.schedule)
        for seed in range(options.seed, options.seed + options.seeds):
            found = self._run(whole, Setting(method, tuned.learning_rate, seed))
            if found is None:
                return True
            calm = None
            if options.protocol == "robustness":
                calm = self._run(whole.in_calm(), Setting(method, tuned.learning_rate, seed), CALM)
                if calm is None:
                    return True
            done.runs.append(found[0] if calm is None else {**found[0], "in_calm": calm[0]})
            done.histories.append(found[1])
        return False

    def _run(
        self, options: Compare, setting: Setting, words: str = ""
    ) -> tuple[dict[str, Any], list[fed.Evaluation]] | None:
        """One run, or what was kept of it: its figures and evaluations; None if it was interrupted."""
        method, rate, seed = setting
        place = self.options.algorithms.index(method.name)
        folder = self.directory / "runs" / f"{place}-{method.title}-seed-{seed}{words.replace(' ', '-')}"
        title = f"{method.name} seed {seed}{' ' if words else ''}{words}"
        kept = self._kept(folder)
        if kept is not None:
            self.console.print(f"{title}: all {kept[0]['rounds']:,} rounds are done", highlight=False)
            return kept
        display = Display(self.console, title, self.task, f"rate {rate:g}, {options.schedule}", terse=True)
        own = {"algorithm": method.name, "learning_rate": rate, "seed": seed, "target": self.target}
        with exit_codes.refusing():
            resume = folder.exists()
            folder.parent.mkdir(exist_ok=True)
            about = {**as_written(options), "schedule": options.schedule, **own}
            storage = fed.Storage(folder, about, resume=resume)
            population = build_population(options, self.task, seed)
            simulation = build_simulation(options, self.task, population, setting, storage=storage)
            simulation.callbacks = (display,)
            with display, stop_on_interrupt(simulation.stop):
                result = simulation.run()
        if result.interrupted:
            return None
        worst = None if virtual_note(population) else self._worst_tenth(result.params, population)
        figures = {**simulation.summary, "rounds_planned": options.rounds, "worst_tenth": worst}
        write_json(folder / FIGURES, {"figures": figures, "evaluations": [asdict(row) for row in result.metrics]})
        return figures, result.metrics

    def _worst_tenth(self, params: Any, population: Any) -> float | None:
        """The mean of the metric over the tenth of the clients that fare worst on their own training examples.

        None of generation, whose training examples have no answers to score.
        """
        train, test = self.task.train, self.task.test
        if isinstance(train, Mapping) and not {*test} <= {*train}:
            return None
        each = fed.client_metrics(self.task, params, population, most=READ_OF_A_CLIENT)
        metric = fed.metric_of(self.task, each)
        ordered = np.sort(metric.sign * each[metric.name])
        return float(metric.sign * ordered[: max(1, len(ordered) // 10)].mean())

    def _kept(self, folder: Path) -> tuple[dict[str, Any], list[fed.Evaluation]] | None:
        with exit_codes.refusing():
            if not exists(folder / FIGURES, "resume"):
                return None
            from pydantic import TypeAdapter

            try:
                content = json.loads(read_regular(folder / FIGURES))
                rows = TypeAdapter(list[fed.Evaluation]).validate_python(list(map(_finite, content["evaluations"])))
                check_figures(content["figures"])
                return {**content["figures"]}, rows
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
                raise ParameterError(
                    "resume",
                    f"must be a directory whose runs are as they were written; {folder.name}/{FIGURES} is not "
                    f"({first_line(error)})",
                ) from error

    def report(self, config: dict[str, Any]) -> None:
        """Write ``comparison.json``, ``metrics.jsonl`` and the picture, and print the table."""
        options = self.options
        compared = {name: self.compared[name] for name in options.algorithms if name in self.compared}
        lines = [
            evaluation_line(row, algorithm=name, seed=run["seed"])
            for name, done in compared.items()
            for history, run in zip(done.histories, done.runs, strict=True)
            for row in history
        ]
        write_whole(self.directory / "metrics.jsonl", "".join(lines).encode())
        finished = {name: done for name, done in compared.items() if done.runs}
        results = as_results(finished, options.reference)
        write_json(self.directory / "comparison.json", {"config": config, "methods": results})
        if not finished:
            return
        metric = fed.metric_of(self.task, next(iter(finished.values())).histories[0][0].metrics)
        title = f"{options.task}: {self.clients:,} clients, {options.cohort} a round, {_budget(options)}"
        comparison_picture(
            finished, results, self.directory / "curves.png", title=title, metric=metric, target=self.target
        )
        self.console.print(comparison_table(finished, results, metric, self.target, options.reference))
        trials = {len(done.tuned["trials"]) * options.tuning_seeds for done in finished.values()}
        counted = ", ".join(map(str, sorted(trials)))
        rows = {
            "protocol": f"{options.protocol.replace('-', ' ')}; {_budget(options)}",
            "tuned": f"{counted} runs each, other seeds, validation examples" if any(trials) else "no: rates as given",
            "seeds": f"{options.seeds}, paired" + ("" if options.seeds > 4 else "; intervals need 5"),
        }
        print_rows(self.console, rows)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation as JSON held it, in which what is not finite is null."""
    nan = float("nan")
    metrics = {name: nan if value is None else value for name, value in row["metrics"].items()}
    return {**row, "train_loss": nan if row["train_loss"] is None else row["train_loss"], "metrics": metrics}


def _budget(options: Compare) -> str:
    unit = {"passes": "evaluations", "bytes": "bytes up", "seconds": "simulated seconds", "rounds": "rounds"}
    if options.budget == "rounds":
        return f"{options.rounds:,} rounds"
    return f"the {unit[options.budget]} of {options.rounds:,} rounds of {options.reference}"
