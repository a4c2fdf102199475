"""The settings of an experiment: the names of its choices, and numbers, checked at construction."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from hiso_jax import fed
from hiso_jax.checks import ParameterError, between, finite, integer, positive
from hiso_jax.experiment.composed import choice_of, given_to
from hiso_jax.fed import SimulationConfig
from hiso_jax.fed.population import Availability
from hiso_jax.plan import training_bytes

BYTES_PER_MEGABIT = 1e6 / 8
AnySettings = TypeVar("AnySettings", bound="Settings")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Dropout, deadline, and the simulated clock.

    Attributes:
      dropout: probability that a client that came leaves in mid-round and sends nothing.
      deadline: simulated seconds after which a client's scalars no longer count; by default never.
      forward_seconds: simulated clock: median seconds of a client's forward pass on one batch.
      forward_spread: standard deviation of the logarithm of --forward-seconds over the clients.
      direction_seconds: simulated clock: median seconds in which a client makes one direction, to measure along it or
        to catch up on missed rounds; 0 counts no time.
      downlink_mbps: simulated clock: median megabits a second from server to client.
      uplink_mbps: simulated clock: median megabits a second from client to server.
      bandwidth_spread: standard deviation of the logarithm of each bandwidth over the clients.
      memory_gb: median gigabytes of a client's memory, with --backprop-share memory: a client backpropagates if its
        memory holds local steps on one batch, see --training-gb.
      memory_spread: standard deviation of the logarithm of --memory-gb over the clients.
      training_gb: gigabytes with which a client can backpropagate; by default what its compiled local steps need.
    """

    dropout: float = 0.0
    deadline: float | None = None
    forward_seconds: float = 0.1
    forward_spread: float = 0.5
    direction_seconds: float = 0.0
    downlink_mbps: float = 20.0
    uplink_mbps: float = 5.0
    bandwidth_spread: float = 0.5
    memory_gb: float | None = None
    memory_spread: float = 0.5
    training_gb: float | None = None

    def check_clock(self) -> None:
        """Check every range.

        Raises:
          ParameterError: an option is out of range; the error names the first.
        """
        between("dropout", self.dropout, 0, 1)
        for option in ("forward_seconds", "downlink_mbps", "uplink_mbps"):
            positive(option, getattr(self, option))
        if self.deadline is not None:
            positive("deadline", self.deadline)
        if self.memory_gb is not None:
            positive("memory_gb", self.memory_gb)
        if self.training_gb is not None:
            positive("training_gb", self.training_gb)
        for option in ("forward_spread", "bandwidth_spread", "direction_seconds", "memory_spread"):
            finite(option, getattr(self, option))

    def participation(self, availability: Availability | None) -> fed.Participation:
        """The participation: availability, dropout, client speeds and the deadline."""
        fleet = fed.Fleet(
            forward_seconds=fed.LogNormal(self.forward_seconds, self.forward_spread),
            downlink=fed.LogNormal(self.downlink_mbps * BYTES_PER_MEGABIT, self.bandwidth_spread),
            uplink=fed.LogNormal(self.uplink_mbps * BYTES_PER_MEGABIT, self.bandwidth_spread),
            direction_seconds=self.direction_seconds or None,
            memory=None if self.memory_gb is None else fed.LogNormal(self.memory_gb * 1e9, self.memory_spread),
            training_bytes=None if self.training_gb is None else float(round(self.training_gb * 1e9)),
        )
        return fed.Participation(availability, self.dropout or None, fleet, self.deadline)


@dataclass(frozen=True, kw_only=True)
class Settings(SimulationConfig, Clock):
    """The settings of every experiment: the names of its choices, and its numbers.

    Attributes:
      task: digits (embedded), mnist, fashion-mnist, cifar10, folders of images (image-classification), a text task for
        a language model (sst2, qqp, rte, boolq, cb, wic, wsc, multirc, ag_news, squad, drop, xsum,
        text-classification, chat), or your own as path/to/file.py:name. All but digits need --data-dir or a hub. Like
        every choice it has its own options, which --help-all lists.
      objective: what the clients' scalars measure: the task's loss (loss), or a value to maximise that may have steps:
        accuracy, f1, exact-match, or your own as path/to/file.py:name.
      clients: number of clients in the population, N; they are virtual if they outnumber the training examples.
      partition: how the training examples are assigned to the clients: Dirichlet over labels (dirichlet; with clients
        of equal size, dirichlet-balanced), iid, label shards (shards), natural clients (by-column), or your own as
        path/to/file.py:name.
      select: how a cohort is chosen: uniformly (uniform), the highest losses of a larger draw (highest-loss), or your
        own as path/to/file.py:name.
      availability: which invited clients come: all (always); each with the same probability (bernoulli); each with
        its own (per-client); by the time of day (diurnal); as recorded (trace); or your own as path/to/file.py:name.
      combine: combiner of the server, in place of the method's own: mean, median, trimmed_mean, krum, multi_krum,
        geometric_median, private_mean; A+B first clips messages with A, clip or clip_to_median. Each is a channel of
        hiso_jax.channels and has its own options.
      attack: messages of hostile clients: sign_flip, scaled, gaussian_attack, inner_product or colluding; each is a
        channel.
      epsilon: privacy budget of a client, with --combine private_mean or an algorithm through local_noise; the noise
        multiplier is then the smallest that meets the budget.
      schedule: learning rate over the rounds: constant, decaying to zero (cosine, linear), as 1/√(1 + round/100)
        (inverse-sqrt), or your own as path/to/file.py:name.
      local_learning_rate: learning rate of the clients' own steps with --local-steps above 1, constant over the rounds;
        by default the server's rate in each round; with --measure projections the task's own.
      target: value of the task's metric to reach: at the first evaluation whose mean with the next two attains it; by
        default the task's own.
    """

    # Names; from Python also choices made from values.
    task: str = "digits"
    objective: str = "loss"
    clients: int = 100
    partition: str = "dirichlet"
    select: str = "uniform"
    availability: str = "always"
    combine: str | None = None
    attack: str | None = None
    epsilon: float | None = None
    schedule: str = "constant"
    target: float | None = None
    local_learning_rate: float | None = None
    # Fields that are no options of the command line.
    HIDDEN: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
          ValueError: an option is out of range; the error names the first.
        """
        super().__post_init__()
        integer("clients", self.clients, 1)
        if self.epsilon is not None:
            positive("epsilon", self.epsilon)
        self.check_clock()
        if (self.backprop_share == "memory") != (self.memory_gb is not None):
            raise ParameterError(
                "memory_gb", "must be given with `backprop_share` memory, and only then: it decides who backpropagates"
            )
        self._check_target()

    def _check_target(self) -> None:
        # A plan has another target.
        if self.target is not None:
            finite("target", self.target, float("-inf"))


def with_training_gb(settings: AnySettings, task: Any) -> AnySettings:
    """The settings with the memory of local steps as a number, if the clients' memory decides who backpropagates.

    It is recorded, because another compiler may need other bytes, and a resumed run has the same clients.

    Args:
      settings: the settings.
      task: the task, whose local steps are compiled.
    """
    if settings.backprop_share != "memory" or settings.training_gb is not None:
        return settings
    return replace(settings, training_gb=training_bytes(task, settings.batch_size) / 1e9)


def participation_of(settings: Settings) -> fed.Participation:
    """The participation: which clients come, how fast they are, and which can backpropagate.

    Raises:
      ParameterError: an option of the availability is out of range, or its file cannot be read.
    """
    availability, select = choice_of("availability", settings), choice_of("select", settings)
    participation = settings.participation(availability.build(given_to(availability, settings)))
    return replace(participation, select=select.build(given_to(select, settings)))


@dataclass(frozen=True, kw_only=True)
class Single(Settings):
    """The settings of one run.

    Attributes:
      algorithm: method: one of hiso_jax.algorithms, or your own as path/to/file.py:name or package.module:name;
        hiso+median, for example, sends its messages through a channel of hiso_jax.channels.
      learning_rate: learning rate η; auto tries several for --probe-rounds each from the same start and takes the best;
        by default the rate tuned for the task and the algorithm, or auto for a language model without a tuned rate.
      probe_rounds: rounds for which auto tries each rate; by default a fiftieth of --rounds, at least 4. They are
        counted separately from the run's rounds.
    """

    algorithm: str = "hiso"
    learning_rate: float | Literal["auto"] | None = None
    probe_rounds: int | None = None

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
          ParameterError: an option is out of range; the error names the first.
        """
        super().__post_init__()
        if self.learning_rate not in (None, "auto"):
            positive("learning_rate", self.learning_rate)
        if self.probe_rounds is not None:
            integer("probe_rounds", self.probe_rounds, 2)
