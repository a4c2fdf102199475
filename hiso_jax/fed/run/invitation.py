"""The clients of a round before it measures: who is invited, who comes, who is hostile, and what they draw."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Key

from hiso_jax.checks import ParameterError
from hiso_jax.fed.keys import attackers_key, backprop_key, cohort_key, presence_key, traits_key
from hiso_jax.fed.population import (
    AnyPopulation,
    Attendance,
    Participation,
    SelectionState,
    Work,
    attend,
    permute,
    sample_cohort,
)
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.state import Inputs
from hiso_jax.fed.run.traffic import NEVER_CAME, Costs, directions_made, download_bytes, upload_bytes
from hiso_jax.zo import fold_in

Probing = Callable[[Int[Array, "C"]], Bool[Array, "C"]]
"""Client ids → which of them cannot backpropagate."""


def draw_batches(config: SimulationConfig) -> Callable[[tuple[AnyPopulation, Key[Array, ""]], Int[Array, "C"]], Array]:
    """The function that draws the batches of a round: ``((population, data key), clients) → int32 [C, K, B]``."""
    return lambda source, clients: source[0].sample(source[1], clients, (config.local_steps or 1, config.batch_size))


class Invited(NamedTuple):
    """The cohort of a round before it measures.

    Attributes:
      clients: the client ids, [C].
      status: the status of each, [C].
      last_synced: the round at which each was last synced, [C].
      seconds: the simulated duration of the round.
    """

    clients: Int[Array, "C"]
    status: Int8[Array, "C"]
    last_synced: Int[Array, "C"]
    seconds: Float[Array, ""]


def invite(
    config: SimulationConfig,
    costs: Costs,
    synced_to: Array | None,
    selection: SelectionState | None,
    number: Array,
    inputs: Inputs,
    clock: Array | None = None,
) -> Invited:
    """The cohort of round ``number``, and who of it comes; ``clock`` as in :class:`RunState`."""
    seed_key = inputs.seed_key
    # Public cohorts follow from the seed, which every client knows.
    drawn_from = seed_key if inputs.secret is None or config.public_cohorts else inputs.secret
    key, rule = cohort_key(drawn_from, number), inputs.participation.select
    if rule is None or selection is None:
        clients = sample_cohort(key, inputs.population.num_clients, config.cohort)
    else:
        clients = rule(key, number, selection).astype(jnp.int32)
    last_synced = jnp.full_like(clients, number) if synced_to is None else synced_to[clients]
    attendance = attendance_of(config, costs, clients, last_synced, number, inputs, clock)
    return Invited(clients, attendance.status, last_synced, attendance.seconds)


def attendance_of(
    config: SimulationConfig,
    costs: Costs,
    clients: Array,
    last_synced: Array,
    number: Array,
    inputs: Inputs,
    clock: Array | None,
) -> Attendance:
    """Who of some clients comes in round ``number``, and when each visit ends.

    Args:
      config: the configuration.
      costs: the costs of a client's visit.
      clients: their ids, [C].
      last_synced: the rounds at which they were last synced, [C].
      number: r.
      inputs: the run's inputs.
      clock: the simulated seconds before the round; None if the availability reads the round.
    """
    missed = (number - jnp.maximum(last_synced, 0)).astype(jnp.float32)
    # The clock does not store how many clients of each round were valid, so it assumes that all were.
    broadcast = missed * float(costs.broadcast.most)
    probing, passes = probing_of(config, inputs), float(costs.passes)
    work = Work(
        download_bytes(broadcast, last_synced == NEVER_CAME, costs, jnp),
        # A float, like the download: the device's integers cannot hold the size of a message of two gigabytes.
        float(upload_bytes(costs)),
        passes if probing is None else jnp.where(probing(clients), float(costs.probe_passes), passes),
        directions_made(broadcast, missed, costs, jnp),
    )
    keys = presence_key(inputs.seed_key, number), traits_key(inputs.seed_key)
    return attend(inputs.participation, *keys, clients, number if clock is None else clock, work)


def hostile_in(config: SimulationConfig, inputs: Inputs, clients: Int[Array, "C"]) -> Bool[Array, "C"]:
    """Which clients of a cohort are hostile: the same clients in every round, or the same places in every cohort."""
    if config.attackers_of == "cohort":
        return jnp.arange(len(clients)) < round(config.attackers * len(clients))
    total = inputs.population.num_clients
    return permute(attackers_key(inputs.seed_key), clients, total) < round(config.attackers * total)


def probing_clients(
    config: SimulationConfig, participation: Participation, seed_key: Key[Array, ""], total: int
) -> Probing | None:
    """Client ids → which of them cannot backpropagate, the same in every round; None if nobody asks.

    Args:
      config: the configuration.
      participation: the participation, whose fleet has the clients' memory.
      seed_key: the run's seed key.
      total: N, the number of clients.

    Raises:
      ParameterError: memory decides, and the fleet has none.
    """
    share, fleet = config.backprop_share, participation.fleet
    if share is None:
        return None
    if share == "memory":
        if fleet is None or fleet.memory is None or fleet.training_bytes is None:
            raise ParameterError("backprop_share", "is memory, which needs a fleet with `memory` and `training_bytes`")
        return lambda clients: ~fleet.can_train(fold_in(traits_key(seed_key), 2), clients)
    able = round(share * total)
    return lambda clients: permute(backprop_key(seed_key), clients, total) >= able


def probing_in(probing: Probing | None, cohorts: Int[Any, "R C"]) -> Bool[np.ndarray, "R C"] | None:
    """Which clients of some cohorts cannot backpropagate, on the host; None if nobody asks."""
    return None if probing is None else np.asarray(probing(jnp.ravel(cohorts))).reshape(cohorts.shape)


def probing_of(config: SimulationConfig, inputs: Inputs) -> Probing | None:
    """:func:`probing_clients` of a run's inputs."""
    return probing_clients(config, inputs.participation, inputs.seed_key, inputs.population.num_clients)
