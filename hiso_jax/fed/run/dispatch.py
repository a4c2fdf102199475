"""Many rounds in one program: invite, attend, measure, update, watch; scanned on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int8, Key, PyTree

from hiso_jax.fed.devices import repeated
from hiso_jax.fed.keys import cohort_key, data_key, presence_key, round_key, traits_key
from hiso_jax.fed.ledger import RoundRecord
from hiso_jax.fed.population import ABSENT, REPORTED, AnyPopulation, Participation, attend, sample_cohort
from hiso_jax.fed.round import Round
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.traffic import NEVER_CAME, download_bytes, upload_bytes


class Inputs(NamedTuple):
    """What a program reads and does not change.

    Attributes:
      seed_key: of the run.
      train: the training examples.
      population: who holds which of them.
      participation: who shows up.
      frozen: what the model needs beside its trained parameters, or None.
    """

    seed_key: Key[Array, ""]
    train: PyTree
    population: AnyPopulation
    participation: Participation
    frozen: PyTree | None = None


class RunState(NamedTuple):
    """What a run carries from round to round on the device.

    Attributes:
      params: the server's parameters.
      state: its optimizer's state.
      monitor: whether the run has diverged.
      synced_to: the round at which each client last came, int32 [N]: four bytes a client are all that a
        population costs. None where nobody counts the bytes: everyone then is a client that has missed nothing.
    """

    params: PyTree
    state: optax.OptState
    monitor: monitoring.Monitor
    synced_to: Int[Array, "N"] | None


class RoundLog(NamedTuple):
    """What a round tells the host.

    Attributes:
      clients: the cohort, [C].
      attendance: what became of it, [C].
      synced_to: where each stood when it was invited, [C].
      seconds: how long the round took, simulated.
      record: the scalars and what was made of them.
    """

    clients: Int[Array, "C"]
    attendance: Int8[Array, "C"]
    synced_to: Int[Array, "C"]
    seconds: Float[Array, ""]
    record: RoundRecord


Dispatch = Callable[[RunState, Any, Any, Inputs], tuple[RunState, RoundLog]]


def newcomers(clients: int) -> Int[Array, "N"]:
    """``synced_to`` of a population that nobody has been invited from yet."""
    return jnp.full(clients, NEVER_CAME, jnp.int32)


def forward_passes_per_client(config: SimulationConfig) -> int:
    """Evaluations of its loss that a client makes in a round: K·(P + 1) forward, 2·K·P central."""
    each = config.perturbations + 1 if config.method == "forward" else 2 * config.perturbations
    return config.local_steps * each


def checkpoint_bytes(params: PyTree, state: optax.OptState) -> int:
    """The size of parameters and optimizer state, in bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))


def draw_batches(config: SimulationConfig) -> Callable[[tuple[AnyPopulation, Key[Array, ""]], Int[Array, "C"]], Array]:
    """How clients draw the batches of a round: ``((population, data key), clients) → int32 [C, K, B]``."""
    return lambda source, clients: source[0].sample(source[1], clients, (config.local_steps, config.batch_size))


def make_dispatch(run_round: Round, config: SimulationConfig, length: int, mesh: Mesh | None = None) -> Dispatch:
    """A program for up to ``length`` rounds: ``(carry, begin, end, inputs) → (carry, RoundLog [length, ...])``.

    Rounds begin ≤ r < end are run; the length is fixed, and rounds past ``end`` or past divergence do nothing.

    Args:
      run_round: of ``make_round`` with ``draw=draw_batches(config)``.
      config: the run's numbers.
      length: the most rounds of one call.
      mesh: the round's.
    """
    scalars = config.local_steps * config.perturbations

    def invite(checkpoint: int, synced_to: Array | None, number: Array, inputs: Inputs) -> tuple[Array, ...]:
        seed_key, population, participation = inputs.seed_key, inputs.population, inputs.participation
        clients = sample_cohort(cohort_key(seed_key, number), population.num_clients, config.cohort)
        stood = jnp.full_like(clients, number) if synced_to is None else synced_to[clients]
        attendance = attend(
            participation,
            presence_key(seed_key, number),
            traits_key(seed_key),
            clients,
            number,
            bytes_down=download_bytes(number, stood, scalars, checkpoint, jnp),
            bytes_up=upload_bytes(scalars),
            forward_passes=forward_passes_per_client(config),
        )
        return clients, attendance.status, stood, attendance.seconds

    def live(
        run: tuple[PyTree, Any, monitoring.Monitor], number: Array, clients: Array, status: Array, inputs: Inputs
    ) -> tuple[tuple[PyTree, Any, monitoring.Monitor], RoundRecord]:
        params, state, monitor = run
        reported = status == REPORTED
        weights = reported.astype(jnp.float32)
        if config.weighting == "examples":
            weights *= inputs.population.sizes_of(clients)
        data = inputs.train, (inputs.population, data_key(inputs.seed_key, number))
        key = round_key(inputs.seed_key, number)
        params, state, record = run_round(params, state, clients, weights, key, data, inputs.frozen)
        return (params, state, monitoring.watch(monitor, number, record, reported, params, state)), record

    def dispatch(
        carry: RunState, begin: Int[Array, ""], end: Int[Array, ""], inputs: Inputs
    ) -> tuple[RunState, RoundLog]:
        # Jitted, so that each is traced once, for the branch that runs it and the shapes of the branch that does not.
        inviting, living = jax.jit(partial(invite, checkpoint_bytes(carry.params, carry.state))), jax.jit(live)

        def blank(function: Callable, *arguments: Any) -> PyTree:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))

        def step(carry: RunState, number: Array) -> tuple[RunState, RoundLog]:
            # Apart from the round's own conditional, and ``end`` apart from divergence: in a sweep settings diverge
            # one by one and the conditional becomes a selection, but the end is the same for all.
            asked = carry.synced_to, number, inputs
            clients, status, stood, seconds = lax.cond(number < end, inviting, lambda *a: blank(inviting, *a), *asked)
            came = (number < end) & (status != ABSENT)
            synced_to = carry.synced_to
            if synced_to is not None:
                # Outside any conditional, so that N numbers are changed in place and never copied.
                synced_to = synced_to.at[jnp.where(came, clients, len(synced_to))].set(number, mode="drop")
            run = (carry.params, carry.state, carry.monitor), number, clients, status, inputs

            def idle(*arguments: Any) -> tuple[Any, RoundRecord]:
                return arguments[0], blank(living, *arguments)[1]

            def unless_diverged(*arguments: Any) -> tuple[Any, RoundRecord]:
                return lax.cond(carry.monitor.diverged_at == monitoring.NEVER, living, idle, *arguments)

            (params, state, monitor), record = lax.cond(number < end, unless_diverged, idle, *run)
            carry = RunState(params, state, monitor, synced_to)
            return carry, RoundLog(clients, status, stood, seconds, record)

        return lax.scan(step, carry, begin + jnp.arange(length, dtype=jnp.int32))

    return repeated(dispatch, mesh)
