"""Builders: options → task, population, algorithm, configuration, and their form in a run's files."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import optax

from hiso_jax import fed
from hiso_jax.algorithms import Method
from hiso_jax.algorithms import load as load_method
from hiso_jax.checks import ParameterError
from hiso_jax.choices import Choice
from hiso_jax.experiment.budget import noise_for_budget
from hiso_jax.experiment.composed import KINDS, NESTED, choice_of, given_to
from hiso_jax.experiment.settings import Settings
from hiso_jax.fed.population import AnyPopulation, VirtualPopulation
from hiso_jax.fed.run import check_messages, local_rate_of_projections, sensitivity
from hiso_jax.renamed import IN_FILES

AnyTask = Any
# Metrics that lie between 0 and 1.
SHARES = ("accuracy", "exact_match", "f1", "rougeL")


def is_language_model(task: Choice) -> bool:
    """Whether a task fine-tunes a checkpoint instead of training a network from random parameters."""
    return getattr(task.factory, "from_checkpoint", False)


def build_task(options: Settings, splits: Collection[str] | None = None) -> AnyTask:
    """The task, with its data and its model loaded.

    Args:
      options: the settings.
      splits: those of the splits ``train`` and ``test`` that are read; examples of the same shapes stand in for the
        others. By default, and for tasks that cannot be loaded in parts, all are read.

    Raises:
      ParameterError: the data or the model is not available, or they do not fit together.
    """
    task, objective = choice_of("task", options), choice_of("objective", options)
    partial = getattr(task.factory, "of_splits", None)
    if splits is not None and partial is not None:
        task = replace(task, factory=partial(splits))
    made, value = task.build(given_to(task, options), options.seed), objective.build(given_to(objective, options))
    temperature = getattr(made, "temperature", 0.0)
    if value is None and temperature:
        raise ParameterError(
            "temperature", "is read by objectives of generated answers, f1 say; `objective` loss samples nothing"
        )
    return made if value is None else fed.maximise(made, value)


def target_of(options: Settings, task: AnyTask) -> float | None:
    """The value of the task's metric at which methods are compared: the given one, or the task's own.

    Raises:
      ParameterError: a share above 1 is given.
    """
    if options.target is None:
        return getattr(task, "target", None)
    metric = getattr(task, "metric", None)
    if metric in SHARES and options.target > 1:
        hint = f"; perhaps {options.target / 100:g} is meant" if options.target <= 100 else ""
        raise ParameterError("target", f"must be at most 1 for {metric}, a share; got {options.target:g}{hint}")
    return options.target


def virtual_note(population: AnyPopulation) -> list[str]:
    """A note for the user about virtual clients, if the population has any."""
    if not isinstance(population, VirtualPopulation):
        return []
    fewest, most = population.sizes
    return [
        f"{population.num_clients:,} virtual clients: each draws its own {fewest} to {most} examples from the pool of "
        f"{len(population.pool):,}"
    ]


def notes(task: Any, population: AnyPopulation) -> list[str]:
    """Notes for the user about the data, shown before a run."""
    from hiso_jax.reports import plain

    words, cut = getattr(task, "label_words", ""), getattr(task, "cut", (0, 0))
    said = [f"labels: {plain(words)}"] if words else []
    if any(cut):
        said.append(
            f"to fit --max-length and --max-new-tokens, {cut[0]:,} training prompts lost their beginning and "
            f"{cut[1]:,} answers their end"
        )
    if getattr(task, "is_on_host", False):
        said.append(
            "the objective is Python on the host: every evaluation of a batch waits for it (a function of tokens, "
            "metrics['generated'], is compiled)"
        )
    return [*virtual_note(population), *said]


def build_population(options: Settings, task: AnyTask, seed: int) -> AnyPopulation:
    """The assignment of the task's training examples to clients.

    Raises:
      ParameterError: the partition does not suit the task, or has fewer clients than a cohort.
    """
    partition = choice_of("partition", options)
    population = partition.build(given_to(partition, options), task.train, options.clients, seed)
    if options.cohort > population.num_clients:
        raise ParameterError(
            "cohort",
            f"must be at most the number of clients, {population.num_clients}, of `partition` {partition.name}; "
            f"got {options.cohort}",
        )
    return population


def build_schedule(options: Settings, rate: Any) -> optax.ScalarOrSchedule:
    """The learning rate over the rounds; ``rate`` may be traced, or be a schedule, or be None for a method without."""
    if callable(rate) or rate is None:
        return rate
    schedule = choice_of("schedule", options)
    return schedule.build(given_to(schedule, options), rate, options.rounds)


def build_algorithm(
    options: Settings, method: Method, rate: Any, *, seeds: Sequence[int] | None = None
) -> fed.Algorithm:
    """The method with its options and a learning rate, which may be traced.

    Args:
      options: the settings of the run.
      method: the method.
      rate: its learning rate.
      seeds: the seeds of several runs of one algorithm, whose noise meets the budget of each run; by default the
        options' own seed.

    Raises:
      ValueError: an option of the method is out of range.
    """
    algorithm = recorded_algorithm(options, method, rate)
    if options.epsilon is None or not method.needs_secret:
        return algorithm
    config = simulation_config(options, options.seed, algorithm)
    noise = noise_for_budget(
        options, method.is_private, seeds or [options.seed], sensitivity(algorithm, config, options.clients)
    )
    return method.build(build_schedule(options, rate), {**given_to(method, options), "noise_multiplier": noise})


def recorded_algorithm(options: Settings, method: Method, rate: Any) -> fed.Algorithm:
    """The algorithm that rebuilds a run from its ledger.

    The noise multiplier for a budget is not computed, because the ledger's records already contain the noise.

    Raises:
      ValueError: an option of the method is out of range.
    """
    return method.build(build_schedule(options, rate), given_to(method, options))


def simulation_config(options: Settings, seed: int, algorithm: fed.Algorithm) -> fed.SimulationConfig:
    """The configuration of one run, without the clients' learning rate."""
    numbers = {field.name: getattr(options, field.name) for field in fields(fed.SimulationConfig)}
    if not isinstance(algorithm.measure, fed.Projections):
        # Read by another method of the command, see ``check_read``.
        numbers |= {"backprop_share": None, "probe_scale": None}
    if algorithm.measure is not None:
        # The measure has its own difference, or none: the option is for another method of the command, or for the
        # clients that cannot backpropagate.
        if options.backprop_share is None:
            numbers["difference"] = None
        if "directions" not in algorithm.measure.reads:
            numbers["directions"] = None
    return fed.SimulationConfig(**{**numbers, "seed": seed})


def check_methods(options: Settings, task: AnyTask, methods: Iterable[Method]) -> None:
    """Refuse, before any long computation, options that do not suit a method.

    Raises:
      ValueError: an option of a method is out of range, or does not suit the cohort or the perturbations.
    """
    for method in methods:
        algorithm = build_algorithm(options, method, 1e-3)
        check_messages(task, algorithm, simulation_config(options, options.seed, algorithm))


def kind_of_model(options: Settings) -> str:
    """The kind of the task's model, by which default rates are chosen: images, adapters or full."""
    if not is_language_model(choice_of("task", options)):
        return "images"
    return "adapters" if getattr(options, "trainable", None) in ("lora", "prefix") else "full"


def own_local_rate(options: Settings, algorithm: fed.Algorithm) -> float | None:
    """The constant rate of the clients' own steps; None if it follows the server's rate."""
    if options.local_learning_rate is not None:
        return options.local_learning_rate
    steps = options.local_steps or algorithm.local_steps or 1
    if not isinstance(algorithm.measure, fed.Projections) or steps == 1:
        return None
    task = choice_of("task", options)
    return local_rate_of_projections(kind_of_model(options) if is_language_model(task) else task.name)


def local_rates(options: Settings, algorithm: fed.Algorithm) -> Callable[[Any], Any]:
    """The server's rate → the rate of the clients' own steps, each a number or a schedule."""
    own, share = own_local_rate(options, algorithm), algorithm.local_share

    def rate_of(rate: Any) -> Any:
        if own is not None:
            return own
        return (lambda count: share * rate(count)) if callable(rate) else build_schedule(options, share * rate)

    return rate_of


def of_clients(options: Settings, algorithm: fed.Algorithm) -> dict[str, Any]:
    """The local steps and their own rate as the run has them, so that it is resumed whatever later defaults are."""
    steps = options.local_steps or algorithm.local_steps
    return {"local_steps": steps, "local_learning_rate": own_local_rate(options, algorithm)}


def about_of(options: Settings, method: Method) -> dict[str, Any]:
    """The options as a run's ledger holds them."""
    own = {} if method.sha256 is None else {"algorithm_sha256": method.sha256}
    return {**as_written(options), "resume": None, **own}


def as_written(options: Settings) -> dict[str, Any]:
    """Options as JSON: absolute paths, so that the run can be continued from any directory, and digests of user code.

    ``partition_sha256``, for example, is the SHA-256 of the user's file with the partition; ``algorithms_sha256``, of
    an option with several names, has the SHA-256 by name.
    """
    # Imported only here, because it imports tables.
    from hiso_jax.reports import as_json

    given = {each.name: getattr(options, each.name) for each in fields(options)}
    given |= {name: value.name for name, value in given.items() if isinstance(value, Choice | Method)}
    for name, value in given.items():
        if isinstance(value, Path):
            given[name] = value.resolve()
    model = given.get("model")
    if isinstance(model, str) and is_language_model(choice_of("task", options)) and Path(model).exists():
        given["model"] = Path(model).resolve()
    return as_json({IN_FILES.get(name, name): value for name, value in given.items()} | _digests(options))


def _digests(options: Settings) -> dict[str, Any]:
    """The SHA-256 of the user's files that options name, if there are any."""
    found: dict[str, Any] = {kind: choice_of(kind, options).sha256 for kind in KINDS}
    nested = {kind: getattr(options, kind, None) for kind in NESTED}
    found |= {kind: NESTED[kind].load(name).sha256 for kind, name in nested.items() if isinstance(name, str)}
    loaders: dict[str, Callable[[str], Any]] = {"algorithms": load_method, "schedules": KINDS["schedule"].load}
    for several, load in loaders.items():
        each = {name: load(name).sha256 for name in getattr(options, several, ())}
        found[several] = {name: sha256 for name, sha256 in each.items() if sha256 is not None} or None
    return {f"{name}_sha256": sha256 for name, sha256 in found.items() if sha256 is not None}
