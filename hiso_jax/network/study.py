"""A study over a network: a TOML file with the options of ``run``, and a table ``[network]``."""

import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hiso_jax import fed
from hiso_jax.checks import ParameterError, did_you_mean, fraction, integer
from hiso_jax.experiment import DECIDING, Clock, Experiment, Settings, Single, build_task, resolve
from hiso_jax.fed.ledger import exists
from hiso_jax.fed.population import RemotePopulation
from hiso_jax.network.client import Client
from hiso_jax.network.parts import parts_of
from hiso_jax.network.server import Server
from hiso_jax.network.settings import NetworkSettings
from hiso_jax.network.transport import InProcess, Transport
from hiso_jax.reports import Progress, Report, create_directory

# Options of a run that only simulate: over a network, clients have their own data, times and intentions.
SIMULATED = (
    "clients",
    "partition",
    "alpha",
    "availability",
    "select",
    "attack",
    "attackers",
    "attackers_of",
    "backprop_share",
    *(each.name for each in fields(Clock)),
)
OWN = ("clients", "keys", "held_out", *(each.name for each in fields(NetworkSettings)))


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
      options: the options of ``run``.
      clients: N, the number of clients.
      network: settings of the rounds.
      keys: the file with the clients' public keys; None believes nodes.
      held_out: the share of its examples that every client keeps for evaluation: at an evaluation the clients that are
        online send sums of the metrics and counts. 0 evaluates on the server's test examples.
      title: the words for its progress.
    """

    options: Mapping[str, Any]
    clients: int
    network: NetworkSettings
    keys: Path | None = None
    held_out: float = 0.0

    @property
    def title(self) -> str:
        """The task and the method."""
        return f"{self.options.get('task', 'digits')} {self.options.get('algorithm', 'hiso')}"


def read_study(path: Path) -> Study:
    """The study in a TOML file.

    Raises:
      ParameterError: the file cannot be read, or an entry is unknown or simulates what is real here.
    """
    try:
        entries = tomllib.loads(path.read_text())
    except OSError as error:
        raise ParameterError("study", f"must be a file that can be read; {path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ParameterError("study", f"must be TOML; {path}: {error}") from error
    own = entries.pop("network", None)
    if not isinstance(own, dict) or "clients" not in own:
        raise ParameterError("study", f"must have a table [network] with `clients`, their number; {path} has none")
    for name in entries:
        if name in SIMULATED:
            raise ParameterError(name, "only simulates; over a network clients are as they are, see [network]")
    for name in own:
        if name not in OWN:
            raise ParameterError(name, f"is no entry of [network]{did_you_mean(name, OWN)}")
    clients, keys, held_out = own.pop("clients"), own.pop("keys", None), own.pop("held_out", 0.0)
    integer("clients", clients, 1)
    fraction("held_out", held_out)
    return Study(entries, clients, NetworkSettings(**own), None if keys is None else path.parent / keys, held_out)


def key_files(path: Path) -> dict[Path, int]:
    """The files that a ``clients.toml`` names, as ``0 = "client0.pub"`` in a table ``[clients]`` → client numbers.

    Raises:
      ParameterError: it cannot be read, or has another form.
    """
    try:
        named = tomllib.loads(path.read_text())["clients"]
        return {path.parent / file: int(number) for number, file in named.items()}
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ParameterError(
            "keys", f"must be a file with a table [clients] of public keys; {path}: {error}"
        ) from error


def experiment_of(study: Study) -> Experiment:
    """The experiment of a study on the server, which reads no training examples.

    Without evaluation on clients it reads the task's test examples. A task of the server's own code is made whole.

    Raises:
      ParameterError: an option is unknown or out of range.
    """
    names = {name: value for name, value in study.options.items() if name in DECIDING}
    settings = resolve(Single, names).settings({**study.options, "clients": study.clients})
    return remote_experiment(settings, () if study.held_out else ("test",))


def remote_experiment(settings: Settings, splits: Collection[str] | None) -> Experiment:
    """The experiment of settings whose clients are on machines of their own.

    Args:
      settings: the settings, see :func:`hiso_jax.experiment.resolve`.
      splits: the splits of the task that are read on this machine; None reads all.

    Raises:
      ParameterError: the learning rate would have to be searched for, or an option is out of range.
    """
    if getattr(settings, "learning_rate", None) == "auto":
        raise ParameterError(
            "learning_rate", "cannot be auto over a network, where the server holds no training examples; give a number"
        )
    population = RemotePopulation(np.ones(settings.clients, np.int32))
    return Experiment.of(settings, task=partial(build_task, splits=splits), population=population)


def whole_experiment(study: Study) -> Experiment:
    """The experiment of a study with all of its task's examples, for clients in this process."""
    return Experiment(**{**study.options, "clients": study.clients})


def run_study(
    study: Study,
    transport: Transport,
    *,
    out: Path | None,
    resume: bool = False,
    say: Callable[[str], None] = print,
    callbacks: fed.Callbacks = (),
    experiment: Experiment | None = None,
) -> fed.Result:
    """Run a study, and write the directory of a run.

    Args:
      study: the study.
      transport: the way to its clients.
      out: the directory; None keeps the run in memory.
      resume: whether to continue the run in it.
      say: takes a line for the user.
      callbacks: called beside those that write the directory.
      experiment: the study's experiment, if it is made already.

    Raises:
      ValueError: the directory holds another run.
      NobodyCame: too few clients were there for too long.
    """
    experiment = experiment or experiment_of(study)
    storage, own = None, fed.as_callbacks(callbacks)
    if out is not None:
        if not resume and not exists(out, "out"):
            create_directory(out, "", experiment.about)
        storage = fed.Storage(out, experiment.about, resume=resume)
        own = (Report(), *own)
    server = Server(
        parts_of(experiment, study.held_out), transport, clients=study.clients, network=study.network, storage=storage,
        callbacks=(*own, Progress(study.title)), notify=say,
    )  # fmt: skip
    return server.run()


def rehearsed(experiment: Experiment) -> InProcess:
    """The clients of an experiment in this process, with shares of its task's training examples: a dry run."""
    made, population = parts_of(experiment), experiment.population
    if not isinstance(population, fed.Population):
        raise ParameterError("clients", "must be few enough for shares of the task's own examples in a dry run")
    held, offsets = np.asarray(population.indices), np.asarray(population.offsets)
    return InProcess(
        {
            number: Client(
                None,
                jax.tree.map(
                    lambda a, number=number: np.asarray(a)[held[offsets[number] : offsets[number + 1]]],
                    experiment.task.train,
                ),
                lambda about: made,
                number,
            )
            for number in range(population.num_clients)
        }
    )
