"""A run's rounds traced from shapes alone, for devices that may be absent: to compile and inspect, not to run."""

from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh
from jax.stages import Traced

from hiso_jax.fed.algorithm import Algorithm, as_algorithm
from hiso_jax.fed.devices import Described, check_mesh, longest_axis
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.prepared import PreparedRun, RunSpec, prepare
from hiso_jax.fed.run.programs import build_dispatch, costs_of, shapes_of_state, trace_dispatch
from hiso_jax.fed.run.state import RunState


class DescribedRun(NamedTuple):
    """A run that is traced and never started.

    Attributes:
      prepared: the run's specification, with shapes for its data.
      dispatch: its rounds, traced: (state, begin, end, inputs) → (state, log).
      state: the shapes of the state that it carries from round to round, each with its sharding.
    """

    prepared: PreparedRun
    dispatch: Traced
    state: RunState


def describe(
    given: RunSpec,
    tx: Algorithm | optax.GradientTransformation,
    config: SimulationConfig,
    mesh: Mesh,
    *,
    memory_budget: int,
) -> DescribedRun:
    """The traced rounds that :class:`~hiso_jax.fed.Simulation` would run on ``mesh``.

    Args:
      given: the task, its initial parameters, the population and the participation; their arrays may be
        ``jax.ShapeDtypeStruct``.
      tx: the algorithm or optimizer, as for a simulation.
      config: the run's configuration.
      mesh: devices, which may be descriptions only, see ``jax.experimental.topologies``.
      memory_budget: bytes that a cohort may take on a device, unless ``config`` sets them.

    Raises:
      ValueError: as for a simulation.
    """
    algorithm, mesh = as_algorithm(tx), check_mesh(mesh)
    placement = Described(mesh, getattr(given.task, "layout", longest_axis))
    # Only the shapes of a program are read, so any key can stand for the secret.
    secret = jax.random.key(0) if algorithm.needs_secret else None
    prepared = prepare(given, algorithm, config, placement, config.memory_budget or memory_budget, secret)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given.params)
    shapes, shardings = shapes_of_state(prepared, params)
    costs = costs_of(algorithm, prepared.estimator, shapes.server, config)
    state = placement.at(shapes, shardings)
    return DescribedRun(prepared, trace_dispatch(prepared, build_dispatch(prepared, costs), state, shardings), state)
