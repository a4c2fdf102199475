"""Options → task, population, algorithm and simulation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

from hiso_jax import fed, tasks
from hiso_jax.algorithms import Method
from hiso_jax.checks import ParameterError
from hiso_jax.cli.language import GENERATES
from hiso_jax.cli.methods import given_to
from hiso_jax.cli.options import Experiment, partition_of
from hiso_jax.cli.privacy import noise_for_budget
from hiso_jax.cli.progress import working
from hiso_jax.fed.population import AnyPopulation
from hiso_jax.fed.run import check_messages, sensitivity
from hiso_jax.reports import plain
from hiso_jax.schedules import inverse_sqrt
from hiso_jax.simulation import Simulation

IMAGE_TASKS = tuple(tasks.NETWORKS)
AnyTask = Any
# Of the training data, where a column names the clients.
CLIENT = "client"


def build_task(options: Experiment, console: Console) -> AnyTask:
    """The task, its data loaded, and its model; what takes long is told on ``console``.

    Raises:
      ValueError: the data or the model cannot be had, or do not belong together.
    """
    if options.task == "digits":
        return tasks.digits(options.model or "mlp")
    if options.task == "mnist":
        return tasks.mnist(options.data_dir, options.model or "cnn")
    if options.task == "fashion-mnist":
        return tasks.fashion_mnist(options.data_dir, options.model or "cnn")
    return _text_task(options, console)


def load_model(options: Experiment) -> tuple[Any, Any]:
    """A language model as it was pretrained, and with what of it is trained.

    Raises:
      ValueError: there is none of that name, or it cannot be tuned so.
    """
    check_model(options)
    assert options.model is not None
    # Imported where they are needed: they need the extra lm.
    from hiso_jax.models import lm
    from hiso_jax.models.lm import tune

    pretrained = lm.load(options.model, revision=options.revision, dtype=options.dtype, param_dtype=options.param_dtype)
    model = tune(
        pretrained,
        options.trainable,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_targets=options.lora_targets,
        prefix_tokens=options.prefix_tokens,
        seed=options.seed,
    )
    return pretrained, model


def _text_task(options: Experiment, console: Console) -> AnyTask:
    from hiso_jax.tasks.text import text_data, text_task

    check_model(options)
    # Before the model: what is wrong with the data is told at once.
    where = "the hub" if options.data_dir is None else options.data_dir
    with working(console, f"reading {options.task} from {where}"):
        data = text_data(
            options.task,
            data_dir=options.data_dir,
            prompts=options.prompts,
            template=options.template,
            verbalizer=options.verbalizer,
            labels=options.labels,
            train_rows=options.train_rows,
            test_rows=options.test_rows,
            client_column=options.column,
            seed=options.seed,
        )
    check_partition(options, options.task not in GENERATES)
    with working(console, f"loading {options.model}"):
        pretrained, model = load_model(options)
        return text_task(data, model, pretrained, max_length=options.max_length, max_new_tokens=options.max_new_tokens)


def check_model(options: Experiment) -> None:
    """Refuse, before anything is loaded, what names no language model.

    Raises:
      ValueError: it names none, or a file or folder that is not there.
    """
    given = options.model
    if given is None or given in ("mlp", "cnn"):
        raise ParameterError(
            "model", f"must name a language model for {options.task}: by hub name, a folder or a .gguf file"
        )
    looks_local = given.endswith(".gguf") or given.startswith((".", "/", "~")) or given.count("/") > 1
    if looks_local and not Path(given).exists():
        raise ParameterError("model", f"must be a hub name, a folder or a .gguf file; there is no {given}")


def check_partition(options: Experiment, has_labels: bool) -> str:
    """How examples are dealt to the clients.

    Raises:
      ValueError: by labels, of a task without any.
    """
    partition = partition_of(options, has_labels=has_labels)
    if partition != "iid" and not has_labels:
        raise ParameterError("partition", f"must be iid for {options.task}, which has no labels; got {partition}")
    return partition


def examples_of(task: AnyTask) -> int:
    """How many training examples the task has."""
    return len(jax.tree.leaves(task.train)[0])


def target_of(options: Experiment, task: AnyTask) -> float | None:
    """The value of the task's metric at which methods are compared: the one asked for, or the task's own."""
    return getattr(task, "target", None) if options.target is None else options.target


def is_virtual(options: Experiment, task: AnyTask) -> bool:
    """Whether the clients draw from the shared pool, since there are more of them than examples or by request."""
    return options.virtual or (options.column is None and options.clients > examples_of(task))


def clients_of(options: Experiment, task: AnyTask) -> int:
    """How many clients there are."""
    return options.clients if options.column is None else len(np.unique(task.train[CLIENT]))


def check_virtual(options: Experiment, task: AnyTask) -> None:
    """Refuse sizes of virtual clients where there are none.

    Raises:
      ValueError: they were asked for, and the clients hold a partition of the examples.
    """
    if options.client_examples != Experiment.client_examples and not is_virtual(options, task):
        raise ParameterError(
            "client_examples",
            f"is read by virtual clients; it would have no effect on {options.clients} clients that "
            f"share {examples_of(task)} examples",
        )


def virtual_note(options: Experiment, task: AnyTask) -> str:
    """What to tell the user of virtual clients."""
    fewest, most = options.client_examples
    return (
        f"{options.clients:,} virtual clients: each draws its own {fewest} to {most} examples from the pool of "
        f"{examples_of(task):,}"
    )


def notes(options: Experiment, task: AnyTask) -> list[str]:
    """What to tell the user of the data before a run."""
    told = [virtual_note(options, task)] if is_virtual(options, task) else []
    words = getattr(task, "label_words", "")
    return [*told, *([f"labels: {plain(words)}"] if words else [])]


def build_population(options: Experiment, task: AnyTask, seed: int) -> AnyPopulation:
    """The population: a partition of the task's training examples, or virtual clients.

    Raises:
      ValueError: more clients than examples, and label shards asked for, or a column that names too few clients.
    """
    if options.column is not None:
        population, names = fed.by_column(task.train[CLIENT])
        if options.cohort > len(names):
            raise ParameterError(
                "cohort",
                f"must be at most the number of clients, {len(names)}, that column {options.column} names; "
                f"got {options.cohort}",
            )
        return population
    clients, total = options.clients, examples_of(task)
    labels = task.train.get("label") if isinstance(task.train, Mapping) else None
    partition = check_partition(options, labels is not None)
    labels = np.zeros(total, np.int32) if labels is None else labels
    if is_virtual(options, task):
        if partition not in ("dirichlet", "iid"):
            raise ParameterError(
                "clients",
                f"must be at most the number of training examples, {total}, for the partition {partition}; "
                f"got {clients}",
            )
        fewest, most = options.client_examples
        alpha = options.alpha if partition == "dirichlet" else None
        return fed.virtual(labels, clients, alpha=alpha, sizes=(fewest, most), seed=seed)
    if partition == "iid":
        return fed.iid(total, clients, seed=seed)
    if partition == "shards":
        return fed.shards(labels, clients, shards_per_client=options.shards_per_client, seed=seed)
    deal = fed.dirichlet if partition == "dirichlet" else fed.dirichlet_balanced
    return deal(labels, clients, alpha=options.alpha, seed=seed)


def build_schedule(options: Experiment, rate: Any) -> optax.ScalarOrSchedule:
    """The learning rate over the rounds; ``rate`` may be traced."""
    if options.schedule == "cosine":
        return optax.cosine_decay_schedule(rate, options.rounds)
    if options.schedule == "inverse-sqrt":
        return inverse_sqrt(rate)
    if options.schedule == "linear":
        return optax.linear_schedule(rate, 0.0, options.rounds)
    return rate


def build_algorithm(
    options: Experiment, method: Method, rate: Any, *, seeds: Sequence[int] | None = None
) -> fed.Algorithm:
    """The method with its options and a learning rate, which may be traced.

    Args:
      options: of the run.
      method: the method.
      rate: its learning rate.
      seeds: of several runs of one algorithm, whose noise is to meet the budget of each; by default the options' own.

    Raises:
      ValueError: one of its options is out of range.
    """
    algorithm = recorded_algorithm(options, method, rate)
    if options.epsilon is None or not method.needs_secret:
        return algorithm
    config = simulation_config(options, options.seed, algorithm)
    noise = noise_for_budget(
        options, method.is_private, seeds or [options.seed], sensitivity(algorithm, config, options.clients)
    )
    return method.build(build_schedule(options, rate), {**given_to(method, options), "noise_multiplier": noise})


def recorded_algorithm(options: Experiment, method: Method, rate: Any) -> fed.Algorithm:
    """The method to rebuild a run with from its ledger: the noise of a budget, which is in its records, is not found.

    Raises:
      ValueError: one of its options is out of range.
    """
    return method.build(build_schedule(options, rate), given_to(method, options))


def simulation_config(options: Experiment, seed: int, algorithm: fed.Algorithm) -> fed.SimulationConfig:
    """The numbers of one run, without the clients' learning rate."""
    numbers = {field.name: getattr(options, field.name) for field in fields(fed.SimulationConfig)}
    if algorithm.measure is not None:
        # Asked for by another method of the command.
        numbers["method"] = None
    return fed.SimulationConfig(**{**numbers, "seed": seed})


def check_methods(options: Experiment, task: AnyTask, methods: Iterable[Method]) -> None:
    """Refuse, before any long work, what does not suit a method.

    Raises:
      ValueError: one of its options is out of range, or does not go with the cohort or the perturbations.
    """
    for method in methods:
        algorithm = build_algorithm(options, method, 1e-3)
        check_messages(task, algorithm, simulation_config(options, options.seed, algorithm))


class Setting(NamedTuple):
    """One method with one rate and one seed.

    Attributes:
      method: the method.
      rate: its learning rate.
      seed: of the run.
    """

    method: Method
    rate: float
    seed: int


def build_simulation(
    options: Experiment,
    task: AnyTask,
    population: AnyPopulation,
    setting: Setting,
    mesh: Mesh | None = None,
    storage: fed.Storage | None = None,
) -> Simulation:
    """The simulation of one setting."""
    algorithm = build_algorithm(replace(options, seed=setting.seed), setting.method, setting.rate)
    config = replace(
        simulation_config(options, setting.seed, algorithm),
        local_learning_rate=build_schedule(options, algorithm.local_share * setting.rate),
    )
    return Simulation(
        task, algorithm, population, config, mesh=mesh, participation=options.participation(), storage=storage
    )
