"""Options → task, population, optimizer and simulation."""

from dataclasses import fields, replace
from typing import Any

import optax
from jax.sharding import Mesh

from hiso_jax import fed, tasks, zo
from hiso_jax.cli.options import Experiment
from hiso_jax.fed.population import Clients
from hiso_jax.tasks import Classification

SAMPLERS = {"gaussian": zo.gaussian, "rademacher": zo.rademacher, "sphere": zo.sphere}

# The best constant rates of benchmarks/best_rates.py, chosen on a validation split; see benchmarks/README.md.
LEARNING_RATES = {
    ("digits", "hiso"): 0.01,
    ("digits", "decomfl"): 0.03,
    ("mnist", "hiso"): 0.001,
    ("mnist", "decomfl"): 0.001,
}


def build_task(options: Experiment) -> Classification:
    """The task, its data loaded."""
    if options.task == "digits":
        return tasks.digits(options.model or "mlp")
    return tasks.mnist(options.data_dir, options.model or "cnn")


def is_virtual(options: Experiment, task: Classification) -> bool:
    """Whether the clients draw from the shared pool, since there are more of them than examples or by request."""
    return options.virtual or options.clients > len(task.train["label"])


def virtual_note(options: Experiment, task: Classification) -> str:
    """What to tell the user of virtual clients."""
    fewest, most = options.client_examples
    return (
        f"{options.clients:,} virtual clients: each draws its own {fewest} to {most} examples from the pool of "
        f"{len(task.train['label']):,}"
    )


def build_population(options: Experiment, task: Classification, seed: int) -> Clients:
    """The population: a partition of the task's training examples, or virtual clients.

    Raises:
      ValueError: more clients than examples, and label shards asked for.
    """
    labels, clients = task.train["label"], options.clients
    if is_virtual(options, task):
        if options.partition == "shards":
            raise ValueError(
                f"clients must be at most the number of training examples, {len(labels)}, for label shards; "
                f"got {clients}"
            )
        alpha = options.alpha if options.partition == "dirichlet" else None
        fewest, most = options.client_examples
        return fed.virtual(labels, clients, alpha=alpha, sizes=(fewest, most), seed=seed)
    if options.partition == "iid":
        return fed.iid(len(labels), clients, seed=seed)
    if options.partition == "shards":
        return fed.shards(labels, clients, shards_per_client=options.shards_per_client, seed=seed)
    return fed.dirichlet(labels, clients, alpha=options.alpha, seed=seed)


def learning_rate(options: Experiment, algorithm: str, given: float | None) -> float:
    """The rate asked for, or the one tuned for the task and the algorithm."""
    return LEARNING_RATES[options.task, algorithm] if given is None else given


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
            decay=options.curvature_decay, curvature_update=options.curvature_update, sampler=sampler
        )
    else:
        head = zo.scale_by_zo(sampler=sampler)
    decay = [optax.add_decayed_weights(options.weight_decay)] if options.weight_decay else []
    momentum = [optax.trace(options.momentum)] if options.momentum else []
    return optax.chain(head, *decay, *momentum, optax.scale_by_learning_rate(schedule))


def simulation_config(options: Experiment, seed: int) -> fed.SimulationConfig:
    """The numbers of one run, without the clients' learning rate."""
    numbers = {field.name: getattr(options, field.name) for field in fields(fed.SimulationConfig)}
    return fed.SimulationConfig(**{**numbers, "seed": seed})


def build_simulation(
    options: Experiment,
    task: Classification,
    population: Clients,
    algorithm: str,
    rate: float,
    seed: int,
    mesh: Mesh | None = None,
) -> fed.Simulation:
    """The simulation of one method with one seed."""
    schedule = build_schedule(options, rate)
    config = replace(simulation_config(options, seed), local_learning_rate=schedule)
    tx = build_optimizer(options, algorithm, schedule)
    return fed.Simulation(task, tx, population, config, mesh=mesh, participation=options.participation())
