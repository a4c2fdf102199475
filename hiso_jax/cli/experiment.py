"""Options → task, population, optimizer and simulation."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh

from hiso_jax import fed, tasks, zo
from hiso_jax.cli.options import Experiment, Grid
from hiso_jax.fed.population import AnyPopulation

SAMPLERS = {"gaussian": zo.gaussian, "rademacher": zo.rademacher, "sphere": zo.sphere}

# The best constant rates of benchmarks/best_rates.py, chosen on a validation split; see benchmarks/README.md.
LEARNING_RATES = {
    ("digits", "hiso"): 0.01,
    ("digits", "decomfl"): 0.03,
    ("mnist", "hiso"): 0.001,
    ("mnist", "decomfl"): 0.001,
}
# The authors' rates for language models, all of whose parameters are trained; with adapters a guess to tune from.
TEXT_LEARNING_RATES = {
    ("full", "hiso"): 5e-5,
    ("full", "decomfl"): 5e-6,
    ("adapters", "hiso"): 1e-3,
    ("adapters", "decomfl"): 1e-3,
}
IMAGE_TASKS = ("digits", "mnist")
GRIDS = {
    "images": (0.001, 0.003, 0.01, 0.03, 0.1),
    "full": (2e-6, 1e-5, 5e-5, 2e-4),
    "adapters": (3e-4, 1e-3, 3e-3, 1e-2),
}
AnyTask = Any


def build_task(options: Experiment) -> AnyTask:
    """The task, its data loaded, and its model.

    Raises:
      ValueError: the data or the model cannot be had, or do not belong together.
    """
    if options.task == "digits":
        return tasks.digits(options.model or "mlp")
    if options.task == "mnist":
        return tasks.mnist(options.data_dir, options.model or "cnn")
    return _text_task(options)


def load_model(options: Experiment) -> tuple[Any, Any]:
    """A language model as it was pretrained, and with what of it is trained.

    Raises:
      ValueError: there is none of that name, or it cannot be tuned so.
    """
    if options.model is None or options.model in ("mlp", "cnn"):
        raise ValueError(f"model must name a language model for {options.task}: by hub name, a folder or a .gguf file")
    # Imported where they are needed: they need the extra lm.
    from hiso_jax.models import lm
    from hiso_jax.models.lm import tune

    pretrained = lm.load(options.model, dtype=options.dtype, param_dtype=options.param_dtype)
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


def _text_task(options: Experiment) -> AnyTask:
    pretrained, model = load_model(options)
    # After the model, whose absence is told first; it needs the extra lm, too.
    from hiso_jax.tasks.text import text_task

    return text_task(
        options.task,
        model,
        pretrained,
        data_dir=options.data_dir,
        prompts=options.prompts,
        template=options.template,
        verbalizer=options.verbalizer,
        max_length=options.max_length,
        max_new_tokens=options.max_new_tokens,
        train_rows=options.train_rows,
        test_rows=options.test_rows,
        seed=options.seed,
    )


def examples_of(task: AnyTask) -> int:
    """How many training examples the task has."""
    return len(next(iter(task.train.values())))


def is_virtual(options: Experiment, task: AnyTask) -> bool:
    """Whether the clients draw from the shared pool, since there are more of them than examples or by request."""
    return options.virtual or options.clients > examples_of(task)


def virtual_note(options: Experiment, task: AnyTask) -> str:
    """What to tell the user of virtual clients."""
    fewest, most = options.client_examples
    return (
        f"{options.clients:,} virtual clients: each draws its own {fewest} to {most} examples from the pool of "
        f"{examples_of(task):,}"
    )


def build_population(options: Experiment, task: AnyTask, seed: int) -> AnyPopulation:
    """The population: a partition of the task's training examples, or virtual clients.

    Raises:
      ValueError: more clients than examples, and label shards asked for.
    """
    clients, total = options.clients, examples_of(task)
    labels = task.train.get("label")
    partition = options.partition or ("iid" if labels is None else "dirichlet")
    if labels is None:
        if partition != "iid":
            raise ValueError(f"partition must be iid for {options.task}, which has no labels; got {partition}")
        labels = np.zeros(total, np.int32)
    if is_virtual(options, task):
        if partition not in ("dirichlet", "iid"):
            raise ValueError(
                f"clients must be at most the number of training examples, {total}, for the partition {partition}; "
                f"got {clients}"
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


def _kind(options: Experiment) -> str:
    if options.task in IMAGE_TASKS:
        return "images"
    return "adapters" if options.trainable in ("lora", "prefix") else "full"


def grid(options: Grid) -> tuple[float, ...]:
    """The learning rates to try: those asked for, or those for the kind of model."""
    return options.learning_rates or GRIDS[_kind(options)]


def learning_rate(options: Experiment, algorithm: str, given: float | None) -> float:
    """The rate asked for, or the one tuned for the task and the algorithm."""
    if given is not None:
        return given
    if options.task in IMAGE_TASKS:
        return LEARNING_RATES[options.task, algorithm]
    return TEXT_LEARNING_RATES[_kind(options), algorithm]


def build_schedule(options: Experiment, rate: Any) -> optax.ScalarOrSchedule:
    """The learning rate over the rounds; ``rate`` may be traced."""
    if options.schedule == "cosine":
        return optax.cosine_decay_schedule(rate, options.rounds)
    if options.schedule == "linear":
        return optax.linear_schedule(rate, 0.0, options.rounds)
    return rate


def build_optimizer(
    options: Experiment, algorithm: str, schedule: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """The server's rule: a zeroth-order head, then whatever of optax the options ask for."""
    sampler = SAMPLERS[options.sampler]
    if algorithm == "hiso":
        head = zo.scale_by_hiso(
            decay=options.curvature_decay,
            curvature_update=options.curvature_update,
            curvature_dtype=None if options.curvature_dtype == "float32" else options.curvature_dtype,
            sampler=sampler,
        )
    else:
        head = zo.scale_by_zo(sampler=sampler)
    decay = [optax.add_decayed_weights(options.weight_decay)] if options.weight_decay else []
    momentum = [optax.trace(options.momentum, accumulator_dtype=np.float32)] if options.momentum else []
    return optax.chain(head, *decay, *momentum, optax.scale_by_learning_rate(schedule))


def simulation_config(options: Experiment, seed: int) -> fed.SimulationConfig:
    """The numbers of one run, without the clients' learning rate."""
    numbers = {field.name: getattr(options, field.name) for field in fields(fed.SimulationConfig)}
    return fed.SimulationConfig(**{**numbers, "seed": seed})


def build_simulation(
    options: Experiment,
    task: AnyTask,
    population: AnyPopulation,
    algorithm: str,
    rate: float,
    seed: int,
    mesh: Mesh | None = None,
    storage: fed.Storage | None = None,
) -> fed.Simulation:
    """The simulation of one method with one seed."""
    schedule = build_schedule(options, rate)
    config = replace(simulation_config(options, seed), local_learning_rate=schedule)
    tx = build_optimizer(options, algorithm, schedule)
    return fed.Simulation(
        task, tx, population, config, mesh=mesh, participation=options.participation(), storage=storage
    )
