"""The programs of a run, and the state that they carry from round to round."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Traced
from jaxtyping import PyTree

from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.devices import (
    MODEL,
    owned,
    put,
    replicated_shardings,
    to_host,
)
from hiso_jax.fed.keys import init_key
from hiso_jax.fed.ledger import base_fingerprints, fingerprint, header_of
from hiso_jax.fed.measure import Estimator, Mixed
from hiso_jax.fed.part_digests import digest
from hiso_jax.fed.population import RemotePopulation
from hiso_jax.fed.round import first_memory, reads_loss, shapes_of
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.config import SimulationConfig, config_of
from hiso_jax.fed.run.dispatch import dispatch_for
from hiso_jax.fed.run.evaluation import make_evaluate
from hiso_jax.fed.run.prepared import PreparedRun, estimator_of
from hiso_jax.fed.run.state import Dispatch, Inputs, RoundLog, RunState, first_selection, newcomers, nobody_at_work
from hiso_jax.fed.run.traffic import Costs
from hiso_jax.fed.task import at_precision, frozen_of
from hiso_jax.fed.update import ServerState
from hiso_jax.program_cache import compiled
from hiso_jax.zo import Hadamard, zo_states

# A round's loss is a float32. It is broadcast if the optimizer reads it.
LOSS_BYTES = 4
# The round and the place of an answer's visit, in the broadcast of an asynchronous round.
VISIT_BYTES = 6


def bytes_of(tree: PyTree) -> int:
    """The size of arrays, in bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def costs_of(algorithm: Algorithm, estimator: Estimator, server: ServerState, config: SimulationConfig) -> Costs:
    """The costs of a client's visit; of ``server`` only shapes are read.

    With a buffer the server broadcasts each answer by itself, with the round and the place of its visit.
    """
    clients, buffered, measure = config.answers, config.buffer is not None, estimator.measure
    groups = clients if buffered else None
    shapes = shapes_of(algorithm, estimator, server.params, clients, groups)
    # A client that cannot replay needs the parameters; a client that replays needs the optimizer's state, too.
    known = (server.params, server.state) if algorithm.has_scalars else server.params
    (up, broadcast), pool = shapes.bytes_of(algorithm), algorithm.pool_of(server.state)
    if algorithm.has_scalars and reads_loss(algorithm, shapes, server.params):
        broadcast = replace(broadcast, fixed=broadcast.fixed + LOSS_BYTES)
    if buffered:
        broadcast = replace(broadcast, fixed=broadcast.fixed + VISIT_BYTES * clients)
    draws = measure.directions(estimator.local_steps, estimator.num_perturbations)
    # Other groups' directions are signed copies of the first group's, or rows of one matrix.
    rules = [head.directions for head in zo_states(server.state)]
    own = any(rule.block == 0 and not isinstance(rule.sampler, Hadamard) for rule in rules)
    return Costs(
        up=up,
        broadcast=broadcast,
        checkpoint=bytes_of(known),
        passes=measure.passes(estimator.local_steps, estimator.num_perturbations),
        draws=draws,
        replay_draws=draws * (shapes.groups if own or buffered else 1),
        grouped=shapes.groups > 1,
        # Sums over a pool are of rounds whose answers share their directions.
        pool_seeds=0 if pool is None or buffered else pool.seeds,
        probe_passes=measure.probes.passes(1, estimator.num_perturbations) if isinstance(measure, Mixed) else 0,
    )


def initial_parameters(prepared: PreparedRun) -> PyTree:
    """The initial parameters; with a mesh they are in this process's memory, because they may not fit on a device."""
    key, mesh, task = init_key(jax.random.key(prepared.config.seed)), prepared.mesh, prepared.task
    if mesh is None:
        return task.init(key)
    # Parameters that are loaded, not computed, are in host memory already, and must not become constants of a program.
    loaded = not jax.make_jaxpr(task.init)(key).jaxpr.eqns
    if loaded or mesh.shape.get(MODEL, 1) == 1:
        return jax.tree.map(np.asarray, task.init(key))
    shapes = jax.eval_shape(task.init, key)
    return to_host(
        jax.jit(task.init, out_shardings=prepared.placement.parameter_shardings(shapes))(
            prepared.placement.replicate(key)
        )
    )


def shapes_of_state(prepared: PreparedRun, params: PyTree) -> tuple[RunState, RunState]:
    """The shapes of a run's state before its first round, and its shardings on the mesh.

    Args:
      prepared: the run, on a mesh.
      params: the parameters; only their shapes and paths are read.
    """
    state = jax.eval_shape(prepared.algorithm.optimizer.init, params)
    sent = shapes_of(prepared.algorithm, prepared.estimator, params, prepared.config.answers).sent
    memory, *others = jax.eval_shape(lambda: _beside(prepared, sent))
    shapes = RunState(ServerState(params, state, memory), *others)
    assert prepared.mesh is not None
    rest = replicated_shardings(prepared.mesh, (memory, *others))
    own = prepared.placement.parameter_shardings(params), prepared.placement.state_shardings(params, state)
    return shapes, RunState(ServerState(*own, rest[0]), *rest[1:])


def first_state(prepared: PreparedRun, initial: PyTree) -> tuple[RunState, Any]:
    """The state of a run before its first round, and its shardings (None on one device)."""
    tx, mesh = prepared.algorithm.optimizer, prepared.mesh
    sent = shapes_of(prepared.algorithm, prepared.estimator, initial, prepared.config.answers).sent
    memory, *others = _beside(prepared, sent)
    if mesh is None:
        # Copies: each dispatch takes the carry by donation, but the result keeps the parameters, an optimizer its keys.
        return RunState(ServerState(owned(initial), owned(tx.init(initial)), owned(memory)), *others), None
    where = shapes_of_state(prepared, initial)[1]
    params = put(initial, where.server.params)
    # Made with its shardings, because a curvature is as large as the parameters.
    state = jax.jit(tx.init, out_shardings=where.server.state)(params)
    memory, *others = prepared.placement.replicate((memory, *others))
    return RunState(ServerState(params, state, memory), *others), where


def _beside(prepared: PreparedRun, sent: PyTree) -> tuple[Any, ...]:
    """The state before the first round, but for parameters and optimizer: memory, monitor, synced_to and so on."""
    participation, clients = prepared.inputs.participation, prepared.clients
    loss_dtype = jnp.promote_types(prepared.loss_dtype or jnp.float32, jnp.float32)
    selection = first_selection(participation, clients, prepared.config.answers)
    at_work = nobody_at_work(prepared.config, sent, loss_dtype)
    beside = monitoring.start(), newcomers(clients), selection, at_work, participation.first_clock()
    return first_memory(prepared.algorithm, sent), *beside


# JAX makes this attribute of its configuration at import, so type checkers do not know it.
DISABLE_JIT = "jax_disable_jit"


def without_jit() -> bool:
    """Whether functions run operation by operation, as under ``jax.disable_jit()``."""
    return bool(getattr(jax.config, DISABLE_JIT))


class Programs(NamedTuple):
    """A dispatch and an evaluation, traced but not yet compiled.

    Attributes:
      dispatch: (state, begin, end, inputs) → (state, log).
      evaluate: (params, test, frozen) → metrics of every example.
      functions: the dispatch and the evaluation before tracing.
    """

    dispatch: Traced
    evaluate: Traced
    functions: tuple[Callable, Callable]

    @property
    def log(self) -> RoundLog:
        """The shapes of the log of a dispatch."""
        return self.dispatch.out_info[1]

    def compile(
        self, prepared: PreparedRun, given: Dispatch | None = None, evaluated: Callable | None = None
    ) -> tuple[Callable, Callable]:
        """Compile both at the same time; under ``jax.disable_jit()``, return functions to step through a loss.

        Args:
          prepared: the run.
          given: a dispatch to return in place of the traced one, which is then not compiled.
          evaluated: an evaluation, likewise.
        """
        if without_jit():
            return given or self.functions[0], evaluated or self.functions[1]
        with prepared.on_mesh():
            if given is not None:
                return given, evaluated or compiled(self.evaluate.lower(), prepared.mesh)
            dispatch, evaluate = self.dispatch.lower(), self.evaluate.lower()
        with ThreadPoolExecutor(1) as other:
            # Much of XLA's work runs in one thread, so two compilations run side by side.
            evaluation = other.submit(compiled, evaluate, prepared.mesh)
            return compiled(dispatch, prepared.mesh), evaluation.result()


def build_dispatch(prepared: PreparedRun, costs: Costs) -> Dispatch:
    """The dispatch of a run, as a function; it takes the learning rates from its inputs."""
    config, loss = prepared.config, at_precision(prepared.task.loss, prepared.config.matmul_precision)

    def dispatch(carry: RunState, begin: Any, end: Any, inputs: Inputs) -> tuple[RunState, RoundLog]:
        server, local = inputs.rates
        algorithm = prepared.algorithm if server is None else prepared.algorithm.at(server)
        estimator = estimator_of(algorithm, config)
        estimator = estimator if local is None else estimator._replace(local_learning_rate=local)
        given = loss, algorithm, estimator, prepared.settings, config, costs
        return dispatch_for(*given, carry.server.params, prepared.length)(carry, begin, end, inputs)

    return dispatch


def trace_dispatch(prepared: PreparedRun, run: Dispatch, carry: RunState, shardings: Any) -> Traced:
    """The traced dispatch of a run whose state is ``carry``, arrays or shapes, with ``shardings``."""
    zero, outputs = prepared.placement.replicate(jnp.int32(0)), None
    if prepared.mesh is not None:
        logs = jax.eval_shape(run, carry, zero, zero, prepared.inputs)[1]
        outputs = shardings, replicated_shardings(prepared.mesh, logs)
    with prepared.on_mesh():
        return jax.jit(run, donate_argnums=0, out_shardings=outputs).trace(carry, zero, zero, prepared.inputs)


def trace(prepared: PreparedRun, costs: Costs, carry: RunState, shardings: Any) -> Programs:
    """The programs of a run whose state is ``carry``, with ``shardings``."""
    run, budget = build_dispatch(prepared, costs), prepared.settings.memory_budget
    dispatch = trace_dispatch(prepared, run, carry, shardings)
    with prepared.on_mesh():
        metrics = at_precision(prepared.task.metrics, prepared.config.matmul_precision)
        evaluate = make_evaluate(metrics, budget=budget, mesh=prepared.mesh)
        traced = jax.jit(evaluate).trace(carry.server.params, prepared.test, prepared.inputs.frozen)
        return Programs(dispatch, traced, (run, evaluate))


def _rules_of(prepared: PreparedRun) -> dict[str, str]:
    """The digests of the user's own functions that decide who takes part."""
    rules = prepared.inputs.participation
    # A function as availability is wrapped, see ``Participation``.
    own: dict[str, Any] = (
        {"availability": rules.availability} if isinstance(rules.availability, jax.tree_util.Partial) else {}
    )
    own |= {} if rules.select is None else {"select": rules.select}
    return {name: digest(rule) for name, rule in own.items()}


def header_for(
    prepared: PreparedRun, log: RoundLog, server: ServerState, initial: PyTree, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The header of a run's ledger.

    Args:
      prepared: the run.
      log: the shapes of the log of a dispatch.
      server: the server's state, or its shapes.
      initial: the initial parameters.
      about: its owner's description of the run.
    """
    seed_key = jax.random.key(prepared.config.seed)
    rounds = jax.ShapeDtypeStruct(log.seconds.shape, np.int32)
    sent = jax.ShapeDtypeStruct(rounds.shape, np.uint64)
    shapes = shapes_of(prepared.algorithm, prepared.estimator, server.params, prepared.config.answers)
    reads = reads_loss(prepared.algorithm, shapes, server.params)
    said = {
        "base": base_fingerprints(initial, frozen_of(prepared.task)),
        "data": "remote" if isinstance(prepared.given[1], RemotePopulation) else fingerprint(prepared.given),
        "algorithm": prepared.algorithm.description | ({"reads_loss": True} if reads else {}),
        "made_of": {
            **prepared.algorithm.part_digests,
            "local learning rate": digest(prepared.config.local_learning_rate),
            **_rules_of(prepared),
        },
        "about": dict(about),
    }
    config = config_of(prepared.config, prepared.estimator.num_perturbations)
    records = log.as_records(seed_key, rounds, sent, sent)
    return header_of(config, seed_key, server.params, server.state, records, said)
