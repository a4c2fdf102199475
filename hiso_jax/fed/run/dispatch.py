"""Many rounds in one program: invite, attend, measure, update and watch, scanned on the device."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.devices import ExecutionSettings, on_all_devices
from hiso_jax.fed.keys import channel_key, data_key, round_key
from hiso_jax.fed.ledger import RoundRecord
from hiso_jax.fed.measure import Cohort, Estimator, Keys
from hiso_jax.fed.population import ABSENT, REPORTED
from hiso_jax.fed.round import Loss, Round, RoundInputs, client_answers, groups_of, server_round, server_settle
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.buffered import Buffer, make_buffered_dispatch
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.invitation import Invited, draw_batches, hostile_in, invite, probing_of
from hiso_jax.fed.run.state import Dispatch, Inputs, RoundLog, RunState, blank
from hiso_jax.fed.run.traffic import Costs
from hiso_jax.fed.update import ServerState

Live = tuple[ServerState, monitoring.Monitor]


def _live(
    run_round: Round, config: SimulationConfig, run: Live, number: Array, invited: Invited, inputs: Inputs
) -> tuple[Live, RoundRecord]:
    server, monitor = run
    reported = invited.status == REPORTED
    weights = reported.astype(jnp.float32)
    if config.weighting == "examples":
        weights *= inputs.population.sizes_of(invited.clients)
    hostile = hostile_in(config, inputs, invited.clients) if config.attackers else None
    probing = probing_of(config, inputs)
    limited = None if probing is None else probing(invited.clients)
    cohort = Cohort(invited.clients, weights, invited.clients, hostile, limited)
    secret = None if inputs.secret is None else channel_key(inputs.secret, number)
    keys = Keys(round_key(inputs.seed_key, number), channel_key(inputs.seed_key, number), number, secret)
    given = RoundInputs(inputs.train, (inputs.population, data_key(inputs.seed_key, number)), inputs.frozen)
    server, record = run_round(server, cohort, keys, given)
    monitor = monitoring.watch(monitor, number, record, reported, server.params, server.state, secret is not None)
    return (server, monitor), record


def dispatch_for(
    loss: Loss,
    algorithm: Algorithm,
    estimator: Estimator,
    settings: ExecutionSettings,
    config: SimulationConfig,
    costs: Costs,
    params: PyTree,
    length: int,
) -> Dispatch:
    """The dispatch of a run, synchronous or not; ``params`` are the parameters or their shapes."""
    draw, mesh = draw_batches(config), settings.mesh
    if config.buffer is None:
        return make_dispatch(server_round(loss, algorithm, estimator, settings, draw), config, costs, length, mesh)
    groups = groups_of(algorithm, params, config.answers)
    buffer = Buffer(
        config,
        costs,
        client_answers(loss, algorithm, estimator, settings, draw, groups),
        server_settle(algorithm, estimator, settings),
    )
    return make_buffered_dispatch(buffer, length, mesh)


def make_dispatch(
    run_round: Round, config: SimulationConfig, costs: Costs, length: int, mesh: Mesh | None = None
) -> Dispatch:
    """A program for up to ``length`` rounds: ``(carry, begin, end, inputs) → (carry, RoundLog [length, ...])``.

    It runs the rounds begin ≤ r < end. The length is fixed, and rounds past ``end`` or past divergence do nothing.

    Args:
      run_round: the function that ``server_round`` returns with ``draw=draw_batches(config)``.
      config: the run's configuration.
      costs: the costs of a client's visit.
      length: the most rounds of one call.
      mesh: the mesh of ``run_round``.
    """

    def dispatch(
        carry: RunState, begin: Int[Array, ""], end: Int[Array, ""], inputs: Inputs
    ) -> tuple[RunState, RoundLog]:
        # Jitted, so that each is traced once: for the branch that runs it and for the shapes of the idle branch.
        inviting = jax.jit(lambda *given: invite(config, costs, *given))
        living = jax.jit(lambda *given: _live(run_round, config, *given))

        def step(carry: RunState, number: Array) -> tuple[RunState, RoundLog]:
            # This conditional is separate from that of the round, and ``end`` is separate from divergence. In a sweep,
            # settings diverge one by one, so a conditional on divergence becomes a selection; the end is the same
            # for all settings.
            asked = carry.synced_to, carry.selection, number, inputs, carry.clock
            invited = lax.cond(number < end, inviting, lambda *a: blank(inviting, *a), *asked)
            came = (number < end) & (invited.status != ABSENT)
            synced_to = carry.synced_to
            if synced_to is not None:
                # Outside any conditional, so that the array [N] is updated in place and never copied.
                places = jnp.where(came, invited.clients, len(synced_to))
                synced_to = synced_to.at[places].set(number, mode="drop")

            def idle(*arguments: Any) -> tuple[Any, RoundRecord]:
                return arguments[0], blank(living, *arguments)[1]

            def unless_diverged(*arguments: Any) -> tuple[Any, RoundRecord]:
                return lax.cond(carry.monitor.diverged_at == monitoring.NEVER, living, idle, *arguments)

            run = (carry.server, carry.monitor), number, invited, inputs
            (server, monitor), record = lax.cond(number < end, unless_diverged, idle, *run)
            selection = carry.selection
            if selection is not None:
                selection = selection.after(number, invited.clients, record.valid, record.loss)
            log = RoundLog(invited.clients, invited.status, invited.last_synced, invited.seconds, record)
            clock = None if carry.clock is None else carry.clock + invited.seconds
            return RunState(server, monitor, synced_to, selection, None, clock), log

        return lax.scan(step, carry, begin + jnp.arange(length, dtype=jnp.int32))

    return on_all_devices(dispatch, mesh)
