"""A federated run: its data on the devices, and the loop."""

from collections.abc import Sequence

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from hiso_jax.fed.algorithm import Algorithm, as_algorithm, measured_by
from hiso_jax.fed.devices import MODEL, ExecutionSettings, Placement, agree, check_mesh, memory_budget
from hiso_jax.fed.ledger import Storage
from hiso_jax.fed.population import AnyPopulation, Participation
from hiso_jax.fed.round import Estimator, check_round, shapes_of
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.dispatch import Inputs
from hiso_jax.fed.run.programs import Setup
from hiso_jax.fed.run.result import Callback, Result
from hiso_jax.fed.run.session import Session
from hiso_jax.fed.sanity import check_task
from hiso_jax.fed.task import Task, examples_of, frozen_of
from hiso_jax.zo import sphere, zo_states

# A program's length: rounds past a dispatch's end do nothing, but each is a step of the scan and a row of its log.
DISPATCH_ROUNDS = 128
MEBIBYTE = 2**20
# P of DeComFL and HiSo.
PERTURBATIONS = 5


class Simulation:
    """A federated run: its data on the device, many rounds a dispatch, evaluations in between.

    Args:
      task: the model, its loss and its data, see :class:`hiso_jax.fed.Task`.
      tx: an :class:`hiso_jax.fed.Algorithm`; or an optax transformation headed by ``scale_by_hiso`` or ``scale_by_zo``,
        which takes the mean scalars.
      population: who holds which training examples, a ``Population`` or a ``VirtualPopulation``.
      config: the run's numbers.
      mesh: devices to split the cohort over, along the mesh's axis ``clients``, and the parameters, along its axis
        ``model``, see :func:`hiso_jax.fed.make_mesh`; it may span processes. None is one device.
      participation: who shows up, and how fast they are; None means everybody, without a clock.
      storage: the directory in which the run is kept, so that it survives its process; None keeps it in memory.
      callbacks: each is called with a :class:`Progress` after every dispatch, and may add metrics, see
        :data:`Callback`.

    Raises:
      ValueError: data or a loss that no run can use, see :func:`hiso_jax.fed.check_task`; a cohort
        larger than the population, an index outside the training data, K > 1 without
        ``local_learning_rate``, more groups of directions than clients in a round, fewer bytes than a message takes, a
        ``method`` for an algorithm that has a measure of its own, rates of other clients than the population's, a mesh
        without an axis ``clients``, or parameters split over ``model`` with the sampler ``sphere``.

    Example:
      >>> import hiso_jax
      >>> from hiso_jax import fed, tasks
      >>> task = tasks.digits()
      >>> population = fed.dirichlet(task.train["label"], 20, alpha=0.5)
      >>> config = fed.SimulationConfig(rounds=10, cohort=4, eval_every=5)
      >>> result = fed.Simulation(task, hiso_jax.hiso(1e-2), population, config).run()
      >>> [row.round for row in result.metrics]
      [0, 5, 10]
    """

    def __init__(
        self,
        task: Task,
        tx: Algorithm | optax.GradientTransformation,
        population: AnyPopulation,
        config: SimulationConfig,
        *,
        mesh: Mesh | None = None,
        participation: Participation | None = None,
        storage: Storage | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Place the data on the devices and build, but not yet compile, the programs of the run."""
        check_task(task)
        if config.cohort > population.num_clients:
            raise ValueError(
                f"cohort must be at most the number of clients, {population.num_clients}, got {config.cohort}"
            )
        population.check(examples_of(task.train))
        participation = Participation() if participation is None else participation
        participation.check(population.num_clients)
        self.task, self.config, self.callbacks, self.storage = task, config, tuple(callbacks), storage
        self.population = population
        self.algorithm, self.mesh = as_algorithm(tx), None if mesh is None else check_mesh(mesh)
        estimator = estimator_of(self.algorithm, config)
        # One budget for all processes, so that their programs are one.
        budget = config.memory_budget or agree(self.mesh, memory_budget() // MEBIBYTE)[0] * MEBIBYTE
        settings = ExecutionSettings(config.client_chunk, budget, config.directions, self.mesh)
        check_round(self.algorithm, estimator, settings)
        self._check_shapes()
        placement = Placement(self.mesh)
        given = task.train, population, participation
        inputs = placement.replicate(Inputs(jax.random.key(config.seed), *given))
        longest = config.rounds_per_dispatch or min(DISPATCH_ROUNDS, config.eval_every)
        self._setup = Setup(
            task=task,
            algorithm=self.algorithm,
            config=config,
            estimator=estimator,
            settings=settings,
            placement=placement,
            inputs=inputs._replace(frozen=placement.parameters(frozen_of(task))),
            test=placement.replicate(task.test),
            given=given,
            length=min(longest, config.rounds),
        )
        self._stop = False

    def _check_shapes(self) -> None:
        """Refuse messages that do not fit, and a split of the parameters that makes other directions."""
        params = check_messages(self.task, self.algorithm, self.config)
        if self.mesh is None or self.mesh.shape.get(MODEL, 1) == 1:
            return
        state = jax.eval_shape(self.algorithm.optimizer.init, params)
        if any(head.directions.sampler is sphere for head in zo_states(state)):
            raise ValueError(
                "mesh must not split parameters along model with the sampler sphere: split norms sum in another order"
            )

    def stop(self) -> None:
        """Ask a running :meth:`run` to end after the dispatch in flight; what it has done is kept."""
        self._stop = True

    def run(self) -> Result:
        """Run to the last round, to divergence, or until :meth:`stop`; with a storage that says so, from where it was.

        Raises:
          ValueError: the storage's directory holds another run, or one that is being written or is altered.
          OSError: it cannot be written; what was done until then is kept and can be resumed.
        """
        try:
            with Session(self._setup, self.storage, self.callbacks, lambda: self._stop) as session:
                session.begin()
                session.evaluate()
                session.tell()
                while session.advance():
                    session.evaluate()
                    session.tell()
                    session.snapshot()
                session.evaluate_last()
                return session.finish()
        finally:
            # Not when a run begins: it may be asked to stop before its first round.
            self._stop = False


def check_messages(task: Task, algorithm: Algorithm, config: SimulationConfig) -> PyTree:
    """Refuse a cohort or messages that do not suit a method, without running anything.

    Returns:
      The shapes of the task's parameters.

    Raises:
      ValueError: more groups of directions than clients in a round, or fewer bytes than a message takes.
    """
    params = jax.eval_shape(task.init, jax.random.key(0))
    shapes_of(algorithm, estimator_of(algorithm, config), params, config.cohort)
    return params


def estimator_of(algorithm: Algorithm, config: SimulationConfig) -> Estimator:
    """How the clients of a run measure.

    Raises:
      ValueError: the algorithm has a measure of its own, and the configuration asks for a method.
    """
    return Estimator(
        measured_by(algorithm, config.method),
        config.local_steps,
        config.perturbations or algorithm.perturbations or PERTURBATIONS,
        config.mu,
        config.local_learning_rate,
    )
