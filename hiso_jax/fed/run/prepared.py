"""A run before it begins: its specification, checked, and its data on the devices."""

import numbers
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm, measured_by
from hiso_jax.fed.devices import MODEL, ExecutionSettings, Placement
from hiso_jax.fed.measure import Estimator, Measure, Mixed, Projections, mixed
from hiso_jax.fed.population import AnyPopulation, Participation, RemotePopulation, Trace, check_select
from hiso_jax.fed.round import check_round, reads_loss, shapes_of
from hiso_jax.fed.run.buffered import check_buffer
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.invitation import Probing, probing_clients
from hiso_jax.fed.run.local_rate import with_local_rate
from hiso_jax.fed.run.state import Inputs, Rates
from hiso_jax.fed.task import Task, frozen_of, perturbed_as_of
from hiso_jax.zo import Hadamard, check_regenerated, sphere, zo_states

# A program's length. Rounds past a dispatch's end do nothing, but each is a step of the scan and a row of its log.
DISPATCH_ROUNDS = 128
# The P of DeComFL and HiSo.
PERTURBATIONS = 5


class PreparedRun(NamedTuple):
    """A run before it begins: its specification, and its data on the devices.

    Attributes:
      task: the model, its loss and its data.
      algorithm: the method.
      config: the run's configuration.
      estimator: how clients measure.
      settings: how rounds are computed, with the memory budget set.
      placement: where arrays live.
      inputs: the inputs of every dispatch.
      test: the test split.
      given: the training data, the population and the participation, as they were given.
      length: the most rounds of a dispatch.
      loss_dtype: the dtype in which the task computes its loss; None if it was not determined.
    """

    task: Task
    algorithm: Algorithm
    config: SimulationConfig
    estimator: Estimator
    settings: ExecutionSettings
    placement: Placement
    inputs: Inputs
    test: PyTree
    given: PyTree
    length: int
    loss_dtype: Any = None

    @property
    def mesh(self) -> Mesh | None:
        """The devices, or None for one."""
        return self.placement.mesh

    @property
    def clients(self) -> int:
        """N, the number of clients."""
        return self.inputs.population.num_clients

    @property
    def needs_snapshots(self) -> bool:
        """Whether the ledger alone cannot continue the run: it has no messages, or none of the visits at work."""
        # Over a network the answers of the visits at work come, or do not.
        simulates_visits = self.config.buffer is not None and not isinstance(self.given[1], RemotePopulation)
        return not self.algorithm.has_scalars or simulates_visits

    @property
    def probing(self) -> Probing | None:
        """Client ids → which of them cannot backpropagate; None if all can."""
        participation = self.given[2]
        return probing_clients(self.config, participation, jax.random.key(self.config.seed), self.clients)

    def on_mesh(self) -> AbstractContextManager[Any]:
        """The context in which programs are built and run; it sets the mesh, if there is one."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


class RunSpec(NamedTuple):
    """The specification of a run, with arrays or their shapes.

    Attributes:
      task: the model, its loss and its data.
      params: the initial parameters; only their shapes are read.
      population: the clients and the training examples that each holds.
      participation: which invited clients come, and how fast they are.
    """

    task: Task
    params: PyTree
    population: AnyPopulation
    participation: Participation


def prepare(
    given: RunSpec,
    algorithm: Algorithm,
    config: SimulationConfig,
    placement: Placement,
    budget: int,
    secret: Key[Array, ""] | None = None,
) -> PreparedRun:
    """Prepare a run, and place its data by ``placement``.

    Args:
      given: the run's specification.
      algorithm: the method.
      config: the run's configuration.
      placement: where arrays live.
      budget: bytes that a cohort may take on a device.
      secret: the server's secret, for an algorithm that needs it.

    Raises:
      ValueError: the configuration, the method, the messages or the devices do not fit together.
    """
    task, params, population, participation = given
    # Refuses a fleet without memory.
    probing_clients(config, participation, jax.random.key(config.seed), population.num_clients)
    config = with_local_rate(algorithm, with_defaults(algorithm, config), task)
    estimator = estimator_of(algorithm, config)
    settings = ExecutionSettings(config.client_chunk, budget, config.directions, placement.mesh, perturbed_as_of(task))
    check_round(algorithm, estimator, settings)
    check_objective(task, estimator)
    check_channel(algorithm, config, participation, population.num_clients)
    check_buffer(algorithm, config, params, None if isinstance(population, RemotePopulation) else participation)
    shapes = shapes_of(algorithm, estimator, params, config.answers)
    if algorithm.needs_secret and reads_loss(algorithm, shapes, params):
        raise ParameterError("tx", "must not read the loss in a private run: the losses of its clients are not noised")
    _check_split(algorithm, params, placement.mesh)
    data = task.train, population, participation
    inputs = placement.replicate(Inputs(jax.random.key(config.seed), *data, secret=secret))
    longest = config.rounds_per_dispatch or min(DISPATCH_ROUNDS, config.eval_every)
    return PreparedRun(
        task=task,
        algorithm=algorithm,
        config=config,
        estimator=estimator,
        settings=settings,
        placement=placement,
        # Rates stay numbers of Python, which take the dtype of the array that they multiply.
        inputs=inputs._replace(frozen=placement.parameters(frozen_of(task)), rates=_rates(algorithm, config)),
        test=placement.replicate(task.test),
        given=data,
        length=min(longest, config.rounds),
    )


def _rates(algorithm: Algorithm, config: SimulationConfig) -> Rates:
    given = (None if algorithm.recipe is None else algorithm.recipe.learning_rate), config.local_learning_rate
    return Rates(*(float(rate) if isinstance(rate, numbers.Real) else None for rate in given))


def _check_split(algorithm: Algorithm, params: PyTree, mesh: Mesh | None) -> None:
    """Refuse a split of the parameters that would change the directions."""
    if mesh is None or mesh.shape.get(MODEL, 1) == 1:
        return
    state = jax.eval_shape(algorithm.optimizer.init, params)
    heads = zo_states(state)
    if any(head.directions.sampler is sphere for head in heads):
        raise ParameterError(
            "mesh",
            "must not split parameters along model with the sampler sphere: split norms are summed in another order",
        )
    if any(isinstance(head.directions.sampler, Hadamard) for head in heads):
        raise ParameterError(
            "mesh",
            "must not split parameters along model with the sampler hadamard, whose blocks are on one device; take "
            "another, gaussian say",
        )
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    if any([leaf.shape for leaf in jax.tree.leaves(head.curvature)] not in ([], shapes) for head in heads):
        raise ParameterError(
            "mesh",
            "must not split parameters along model with a curvature of means, a factored one say: split means sum "
            "in another order",
        )


def check_objective(task: Task, estimator: Estimator) -> None:
    """Refuse to differentiate an objective that may have steps.

    Raises:
      ParameterError: the task's objective has no gradient, and clients would take one.
    """
    if not getattr(task, "is_differentiable", True) and getattr(estimator.measure, "backpropagates", False):
        raise ParameterError(
            "objective",
            "must be loss for a method whose clients take gradients, because a value with steps has none; methods of "
            "finite differences (mosaic, decomfl, hiso) take any",
        )


def with_defaults(algorithm: Algorithm, config: SimulationConfig) -> SimulationConfig:
    """The configuration with the algorithm's local steps where none are given.

    Cohorts are public unless a server that noises sums draws them in secret.
    """
    public = config.public_cohorts or not algorithm.is_private
    return replace(config, public_cohorts=public, local_steps=config.local_steps or algorithm.local_steps or 1)


def check_channel(
    algorithm: Algorithm, config: SimulationConfig, participation: Participation, clients: int | None = None
) -> None:
    """Refuse options that do not fit the message path; ``clients`` is N, if it is known.

    Raises:
      ValueError: attackers without an attack or an attack without attackers; a share of attackers, or of clients that
        backpropagate, that rounds to no client; weights that the combiner ignores; or an option that would reveal the
        clients of a private run.
    """
    whole = config.answers if config.attackers_of == "cohort" else clients
    if config.attackers and whole is not None and not round(config.attackers * whole):
        raise ParameterError(
            "attackers",
            f"must be a share of at least one of {whole} clients, {1 / whole:.2g}, got {config.attackers:g}",
        )
    share = config.backprop_share
    if isinstance(share, float) and clients is not None and 0 < share < 1 and round(share * clients) in (0, clients):
        raise ParameterError(
            "backprop_share",
            f"must be 0, 1 or a share of at least one of {clients} clients that leaves one, got {share:g}",
        )
    if bool(config.attackers) != (algorithm.attack is not None):
        raise ParameterError(
            "attackers",
            "must be above 0 with an algorithm that is attacked, and only then; got "
            f"{config.attackers:g} and {'an' if algorithm.attack else 'no'} attack",
        )
    if config.weighting == "examples" and (algorithm.is_private or algorithm.combine.compares):
        raise ParameterError(
            "weighting", "must be uniform for a combiner in which every client counts alike, got examples"
        )
    if participation.select is not None:
        if algorithm.needs_secret:
            raise ParameterError(
                "select", "must not be given in a private run: a rule that reads losses reveals the clients they are of"
            )
        if clients is not None:
            check_select(participation.select, clients, config.answers)
    if isinstance(participation.availability, Trace) and algorithm.needs_secret:
        raise ParameterError(
            "participation", "must not follow a trace in a private run: the trace reveals when each client came"
        )
    if algorithm.needs_secret and config.backprop_share is not None and config.probe_scale is None:
        raise ParameterError(
            "probe_scale", "must be given for a mixed cohort in a private run: lengths of messages reveal them"
        )
    if algorithm.is_private and algorithm.rescale:
        raise ParameterError(
            "rescale", "must be empty for a private mean: a factor that depends on other clients reveals them"
        )


def check_messages(task: Task, algorithm: Algorithm, config: SimulationConfig) -> PyTree:
    """Refuse a cohort or messages that do not fit a method, without running anything.

    Returns:
      The shapes of the task's parameters.

    Raises:
      ValueError: more groups of directions than clients in a round, or fewer bytes than a message takes.
    """
    params = jax.eval_shape(task.init, jax.random.key(0))
    check_channel(algorithm, config, Participation())
    estimator = estimator_of(algorithm, config)
    # The rate of the clients' own steps is not known here.
    estimator.measure.check(estimator._replace(local_learning_rate=1.0), config.directions)
    check_objective(task, estimator)
    shapes_of(algorithm, estimator, params, config.answers)
    check_buffer(algorithm, config, params)
    for head in zo_states(jax.eval_shape(algorithm.optimizer.init, params)):
        check_regenerated(head.directions, config.directions)
    return params


def _measure_of(algorithm: Algorithm, config: SimulationConfig) -> Measure:
    if config.backprop_share is None:
        if isinstance(algorithm.measure, Mixed):
            raise ParameterError(
                "backprop_share", "must be given for the measure `mixed`, or the measure be projections"
            )
        return measured_by(algorithm, config.difference)
    if isinstance(algorithm.measure, Mixed):
        raise ParameterError("measure", "must be projections beside `backprop_share`, which mixes them; got mixed")
    if not isinstance(algorithm.measure, Projections):
        raise ParameterError("backprop_share", "is read by methods whose clients project: `measure` projections")
    return mixed(algorithm.measure, config.difference or "forward", config.probe_scale)


def estimator_of(algorithm: Algorithm, config: SimulationConfig) -> Estimator:
    """How the clients of a run measure.

    Raises:
      ValueError: the algorithm has a measure of its own, and the configuration asks for a difference.
    """
    return Estimator(
        _measure_of(algorithm, config),
        config.local_steps or algorithm.local_steps or 1,
        config.perturbations or algorithm.perturbations or PERTURBATIONS,
        config.mu,
        config.local_learning_rate,
    )
