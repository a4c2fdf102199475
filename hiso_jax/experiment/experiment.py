"""One experiment: a task, a population, an algorithm, a configuration and a participation, built once and run."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import optax
from jax.sharding import Mesh

from hiso_jax import fed
from hiso_jax.algorithms import ALGORITHMS, Method
from hiso_jax.algorithms import load as load_method
from hiso_jax.checks import ParameterError, transformation
from hiso_jax.choices import Choice
from hiso_jax.experiment.build import (
    about_of,
    build_algorithm,
    build_population,
    build_task,
    local_rates,
    of_clients,
    own_local_rate,
    simulation_config,
    target_of,
)
from hiso_jax.experiment.composed import KINDS, as_choice
from hiso_jax.experiment.rates import probe_rate, wanted_rate
from hiso_jax.experiment.resolve import DECIDING, resolve
from hiso_jax.experiment.settings import Settings, Single, participation_of, with_training_gb
from hiso_jax.fed.algorithm import as_algorithm
from hiso_jax.fed.ledger import exists
from hiso_jax.fed.population import AnyPopulation, as_population
from hiso_jax.fed.run import check_messages
from hiso_jax.paths import as_path
from hiso_jax.reports import Report, as_json, create_directory

# Parts that may be given as values; values are too long for ``repr``.
_PARTS = ("task", "algorithm", "population")


def _is_value(value: Any) -> bool:
    return value is not None and not isinstance(value, str)


@dataclass(frozen=True)
class _Value(Method):
    """An algorithm that was given as a value: it has its own learning rate."""

    value: Any = None

    def build(self, learning_rate: Any, options: Mapping[str, Any]) -> fed.Algorithm:
        """The value, which reads no options."""
        return as_algorithm(self.value)


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Experiment:
    """One experiment, as ``hiso-jax run`` runs it: its parts are built once, and then run.

    The options of the command line are keywords of the same names: the choices (``task``, ``algorithm``,
    ``partition``, ``availability``, ``schedule``), the options of each choice, and the numbers. The defaults are the
    command's. Files and devices are arguments of :meth:`run`. A name may point to a user's own code,
    ``"file.py:name"``; a task, an algorithm and a population may also be given as values.

    Args:
      task: name of a task, or a :class:`hiso_jax.fed.Task`.
      algorithm: name of a method, or a :class:`hiso_jax.fed.Algorithm` or an optax transformation with a head of this
        package; such a value has its own learning rate.
      population: the assignment of examples to clients, in place of a partition.
      learning_rate: η; ``"auto"`` searches for a rate; None is the method's own rate for the task.
      options: all other options of the command by name; for an algorithm that is a value also ``local_learning_rate``,
        η of the clients' own steps, a number or a schedule over rounds.

    Attributes:
      task: the task.
      algorithm: the algorithm, with its learning rate over the rounds.
      population: the assignment of training examples to clients.
      config: the configuration of the run.
      participation: which clients come, and how fast they are.
      learning_rate: η at the start; None if the algorithm was given as a value; ``"auto"`` until it is found.
      about: the settings as a run's ledger holds them.
      settings: the settings, without the parts given as values.
      method: the method by name.

    Raises:
      ParameterError: an option is unknown, out of range, or would have no effect with these choices; or the data or
        the model is not available.

    Example:
      >>> import hiso_jax
      >>> experiment = hiso_jax.Experiment(task="digits", algorithm="mosaic", alpha=0.1, rounds=20, eval_every=10)
      >>> [row.round for row in experiment.run().metrics]
      [0, 10, 20]
    """

    task: Any
    algorithm: fed.Algorithm
    population: AnyPopulation
    config: fed.SimulationConfig
    participation: fed.Participation
    learning_rate: Any
    about: Mapping[str, Any]
    settings: Settings
    method: Method
    given: Mapping[str, Any]

    def __init__(
        self,
        *,
        task: str | fed.Task = "digits",
        algorithm: str | fed.Algorithm | optax.GradientTransformation = "hiso",
        population: AnyPopulation | None = None,
        learning_rate: float | str | None = None,
        **options: Any,
    ) -> None:
        """Resolve the names, build the parts, and search for the learning rate if it is ``"auto"``."""
        given = {
            "task": task,
            "algorithm": algorithm,
            "population": population,
            "learning_rate": learning_rate,
            **options,
        }
        names: dict[str, Any] = {name: value for name, value in options.items() if name in DECIDING}
        names |= {"task": task, "algorithm": algorithm}
        if _is_value(task):
            names["task"] = as_choice(task)
        if _is_value(algorithm):
            if learning_rate is not None:
                raise ParameterError("learning_rate", "must not be given beside an algorithm that has its own")
            if not isinstance(algorithm, fed.Algorithm):
                transformation("algorithm", algorithm)
            own = Choice(ALGORITHMS, "a method of its own", lambda learning_rate: algorithm)
            names["algorithm"] = _Value(own.name, own, value=algorithm)
            for name in options:
                if name in (*names["algorithm"].options, "combine", "attack"):
                    raise ParameterError(name, "must be a part of the algorithm that is given as a value")
        if population is not None:
            population = as_population(population)
            if "partition" in options or "clients" in options:
                raise ParameterError("population", "must not be given beside `partition` or `clients`")
            names["partition"] = Choice(KINDS["partition"], "population", lambda train: population)
        # From Python it may be a schedule, which no option is.
        local = options.pop("local_learning_rate", None) if _is_value(algorithm) else None
        settings = resolve(Single, names).settings({**options, **names, "learning_rate": learning_rate})
        made = type(self).of(settings)
        if local is not None:
            if (settings.local_steps or made.algorithm.local_steps or 1) == 1:
                raise ParameterError(
                    "local_learning_rate", "is read with `local_steps` above 1; it would have no effect"
                )
            made = made._with(config=replace(made.config, local_learning_rate=local))
        if made.learning_rate == "auto":
            made = made.at(made.find_rate())
        about = made.about
        if any(map(_is_value, (task, algorithm, population))):
            # Options cannot describe a value: only a program that makes the value again can resume the run.
            about = {name: about[name] for name in ("task", "target", "learning_rate")}
        vars(self).update({**vars(made), "about": about, "given": given})

    @classmethod
    def of(
        cls,
        settings: Settings,
        method: Method | None = None,
        rate: float | None = None,
        *,
        task: Callable[[Settings], Any] = build_task,
        population: AnyPopulation | None = None,
    ) -> Self:
        """The experiment of resolved settings; a rate ``"auto"`` is not searched for, see :meth:`find_rate`.

        Options are refused before the task is loaded, unless their range depends on its data or its parameters.

        Args:
          settings: the settings, see :func:`resolve`.
          method: the method, in place of the one in the settings.
          rate: the learning rate, in place of the one in the settings.
          task: loads the task that the settings name.
          population: the assignment of examples, in place of the partition in the settings.

        Raises:
          ParameterError: as for the class.
        """
        chosen: Any = getattr(settings, "algorithm", None)
        method = method or (chosen if isinstance(chosen, Method) else load_method(chosen))
        wanted: Any = rate
        if wanted is None and not isinstance(method, _Value):
            assert isinstance(settings, Single)
            wanted = wanted_rate(settings, method)
        # Any number stands for ``auto`` until the rate is found, because it changes no shape.
        number = 1e-3 if wanted == "auto" else wanted
        algorithm = build_algorithm(settings, method, number)
        made = task(settings)
        if population is None:
            population = build_population(settings, made, settings.seed)
        config = simulation_config(settings, settings.seed, algorithm)
        check_messages(made, algorithm, config)
        local = own_local_rate(settings, algorithm)
        if local is None and number is not None:
            local = local_rates(settings, algorithm)(number)
        settings = with_training_gb(settings, made)
        parts = {
            "task": made,
            "algorithm": algorithm,
            "population": population,
            "config": replace(config, local_learning_rate=local),
            "participation": participation_of(settings),
            "learning_rate": wanted,
            "about": about_of(settings, method)
            | of_clients(settings, algorithm)
            | {"learning_rate": wanted, "target": target_of(settings, made)},
            "settings": settings,
            "method": method,
            "given": {},
        }
        return cls.__new__(cls)._with(**parts)

    def _with(self, **parts: Any) -> Self:
        made = object.__new__(type(self))
        vars(made).update({**vars(self), **parts})
        return made

    def find_rate(self, callback: Callable[[int, int], None] = lambda done, rounds: None) -> fed.RateProbe:
        """Search for a learning rate, as ``learning_rate="auto"`` does; see :func:`hiso_jax.fed.find_rate`.

        Args:
          callback: receives the number of finished rounds and of all rounds of the search.

        Raises:
          ParameterError: the algorithm was given as a value, which has its own rate.
          ValueError: the loss does not stay finite at any rate.
        """
        if isinstance(self.method, _Value):
            raise ParameterError("learning_rate", "cannot be searched for an algorithm that is given as a value")
        assert isinstance(self.settings, Single)
        return probe_rate(self.settings, self.method, self.task, self.population, callback)

    def at(self, probe: fed.RateProbe) -> Self:
        """The experiment with the learning rate that a search found."""
        rate = probe.learning_rate
        algorithm = build_algorithm(self.settings, self.method, rate)
        local = local_rates(self.settings, algorithm)(rate)
        return self._with(
            algorithm=algorithm,
            config=replace(self.config, local_learning_rate=local),
            learning_rate=rate,
            about={**self.about, "learning_rate": rate, "probe": as_json(asdict(probe))},
        )

    def __repr__(self) -> str:
        """The given arguments, without the data."""
        named = {name: value for name, value in self.given.items() if value is not None}
        parts = [name for name in _PARTS if _is_value(named.get(name))]
        shown = {name: type(each).__name__ if name in parts else repr(each) for name, each in named.items()}
        return f"Experiment({', '.join(f'{name}={each}' for name, each in shown.items())})"

    def replace(self, **changes: Any) -> Self:
        """A new experiment with some options changed."""
        return type(self)(**{**self.given, **changes})

    def simulation(
        self,
        *,
        mesh: Mesh | None = None,
        storage: fed.Storage | None = None,
        callbacks: fed.Callbacks = (),
    ) -> fed.Simulation:
        """The simulation of this experiment, see :class:`hiso_jax.fed.Simulation`."""
        return fed.Simulation(
            self.task,
            self.algorithm,
            self.population,
            self.config,
            mesh=mesh,
            participation=self.participation,
            storage=storage,
            callbacks=callbacks,
        )

    def run(
        self,
        out: Path | str | None = None,
        *,
        resume: bool = False,
        mesh: Mesh | None = None,
        callbacks: fed.Callbacks = (),
    ) -> fed.Result:
        """Run the experiment.

        Args:
          out: directory for the files of the run, as in ``hiso-jax run --out``; None keeps the run in memory.
          resume: whether to resume the run in ``out``.
          mesh: devices to split a round over, see :func:`hiso_jax.fed.make_mesh`.
          callbacks: called after every dispatch, see :class:`hiso_jax.fed.Callback`.

        Raises:
          ValueError: the directory holds another run, or a run that is being written or was altered.
          OSError: the directory cannot be written; the rounds done so far are kept and can be resumed.
        """
        if out is None and resume:
            raise ParameterError("resume", "must be given with `out`, the directory of the run")
        storage = None
        if out is not None:
            folder = as_path("out", out)
            if not resume and not exists(folder, "out"):
                create_directory(folder, "", self.about)
            storage = fed.Storage(folder, self.about, resume=resume)
            callbacks = (Report(), *fed.as_callbacks(callbacks))
        return self.simulation(mesh=mesh, storage=storage, callbacks=callbacks).run()
