"""A federated run: its data on the devices, and its loop."""

from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from hiso_jax.checks import ParameterError, of_kind
from hiso_jax.fed.algorithm import Algorithm, as_algorithm
from hiso_jax.fed.devices import Placement, agree, check_mesh, longest_axis, memory_budget
from hiso_jax.fed.ledger import Storage
from hiso_jax.fed.population import AnyPopulation, Participation, as_population
from hiso_jax.fed.run.callbacks import Callbacks, as_callbacks
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.interrupt import stopped_by_interrupt
from hiso_jax.fed.run.prepared import RunSpec, prepare
from hiso_jax.fed.run.result import Result
from hiso_jax.fed.run.secret import secret_of
from hiso_jax.fed.run.session import Callback, Session
from hiso_jax.fed.task import Task, examples_of
from hiso_jax.fed.task_checks import check_task
from hiso_jax.program_cache import keep_compiled
from hiso_jax.renamed import successor

MEBIBYTE = 2**20


class Simulation:
    """A federated run: its data on the devices, many rounds per dispatch, and evaluations in between.

    Args:
      task: the model, its loss and its data, see :class:`hiso_jax.fed.Task`.
      tx: an :class:`hiso_jax.fed.Algorithm`; or an optax transformation headed by ``scale_by_hiso`` or ``scale_by_zo``,
        which takes the mean scalars.
      population: the clients and the training examples that each holds, a ``Population`` or a ``VirtualPopulation``; or
        the pair that ``fed.by_column`` returns.
      config: the run's configuration.
      mesh: devices; the axis ``clients`` splits the cohort and the axis ``model`` splits the parameters, see
        :func:`hiso_jax.fed.make_mesh`. It may span processes. None is one device.
      participation: which invited clients come, and how fast they are; None means all, without a simulated clock.
      storage: the directory that keeps the run, so that it survives its process, as a :class:`Storage` or a path to a
        new one; None keeps it in memory.
      callbacks: called when the run begins, after every dispatch, and when it ends, see :class:`Callback`; for example
        :class:`hiso_jax.reports.Report`, which writes ``summary.json`` and ``curves.png``. A function, as ``print``,
        is called after every evaluation.

    Raises:
      ValueError: data or a loss that no run can use, see :func:`hiso_jax.fed.check_task`; a cohort
        larger than the population, an index outside the training data, K > 1 with an optimizer of optax and without
        ``local_learning_rate``, more groups of directions than clients in a round, fewer bytes than a message takes, a
        ``difference`` for an algorithm that has its own measure, availability rates for another number of clients, a
        mesh without an axis ``clients``, or parameters split over ``model`` with the sampler ``sphere``.

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
        storage: Storage | Path | str | None = None,
        callbacks: Callbacks = (),
    ) -> None:
        """Check the run and place its data on the devices; :meth:`run` compiles its programs."""
        keep_compiled()
        listed = as_callbacks(callbacks)
        population = as_population(population)
        of_kind("config", config, SimulationConfig, "a fed.SimulationConfig")
        if storage is not None:
            of_kind("storage", storage, (Storage, Path, str), "a path or a fed.Storage")
        if mesh is not None:
            of_kind("mesh", mesh, Mesh, "a mesh, like fed.make_mesh()")
        if participation is not None:
            of_kind("participation", participation, Participation, "a fed.Participation")
        loss_dtype = check_task(task)
        if config.cohort > population.num_clients:
            raise ParameterError(
                "cohort", f"must be at most the number of clients, {population.num_clients}, got {config.cohort}"
            )
        population.check(examples_of(task.train))
        participation = Participation() if participation is None else participation
        participation.check(population.num_clients)
        storage = Storage(storage) if isinstance(storage, Path | str) else storage
        self.task, self.config, self.callbacks, self.storage = task, config, listed, storage
        self.population = population
        self.algorithm, self.mesh = as_algorithm(tx), None if mesh is None else check_mesh(mesh)
        # All processes use the same budget, so that their programs are the same.
        budget = config.memory_budget or agree(self.mesh, memory_budget() // MEBIBYTE)[0] * MEBIBYTE
        params = jax.eval_shape(task.init, jax.random.key(0))
        placement = Placement(self.mesh, getattr(task, "layout", longest_axis))
        given = RunSpec(task, params, population, participation)
        secret = secret_of(storage, self.mesh) if self.algorithm.needs_secret else None
        made = prepare(given, self.algorithm, config, placement, budget, secret)
        self._prepared = made._replace(loss_dtype=loss_dtype)
        self._stop = False

    def __getattr__(self, name: str) -> Any:
        """Attributes of earlier releases answer with their successors."""
        raise successor("hiso_jax.fed.Simulation", name)

    def stop(self) -> None:
        """Ask a running :meth:`run` to end after the dispatch in flight; the finished rounds are kept."""
        self._stop = True

    def run(self) -> Result:
        """Run to the last round, to divergence, or until :meth:`stop`; a storage with ``resume`` continues its run.

        In a program that does not handle Ctrl-C itself, the first Ctrl-C acts as :meth:`stop`, and the second ends the
        program.

        Raises:
          ValueError: the storage's directory holds another run, an altered run, or a run that is being written.
          OSError: the directory cannot be written; the rounds written before are kept and can be resumed.
        """
        opened: list[Callback] = []
        try:
            with stopped_by_interrupt("the run ends after the rounds in flight", self.stop):
                for callback in self.callbacks:
                    callback.open()
                    opened.append(callback)
                with Session.begin(self._prepared, self.storage, self.callbacks, lambda: self._stop) as session:
                    return session.run()
        finally:
            for callback in opened:
                callback.close()
            # Reset here and not when a run begins, because ``stop`` may be called before the first round.
            self._stop = False
