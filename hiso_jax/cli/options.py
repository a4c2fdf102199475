"""The options of the commands: dataclasses from which the command line is made."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from hiso_jax import fed
from hiso_jax.checks import ParameterError, finite, positive, whole
from hiso_jax.choices import Listed
from hiso_jax.cli.clock import Clock
from hiso_jax.cli.devices import Devices
from hiso_jax.cli.methods import KINDS, choice_of, given_to
from hiso_jax.fed import SimulationConfig
from hiso_jax.fed.ledger import EXECUTION

# Under which headings --help shows the options of a command; those of what is chosen stand behind the first.
GROUPS: dict[str, tuple[str, ...]] = {
    "experiment": (
        "task",
        "algorithm",
        "algorithms",
        "protocol",
        "rounds",
        "budget",
        "baseline",
        "target",
        "learning_rate",
        "probe_rounds",
        "mus",
        "schedule",
        "schedules",
        "tries",
        "tuning_seeds",
        "seed",
        "seeds",
        "validation",
    ),
    "federation": ("clients", "partition", "cohort", "local_steps", "batch_size", "weighting", "eval_every"),
    "hostile clients": ("combine", "attack", "attackers", "attackers_of"),
    "privacy": ("epsilon", "delta", "public_cohorts"),
    "measurement": ("perturbations", "mu", "method", "matmul_precision"),
    "participation": ("availability", *(field.name for field in fields(Clock))),
    "devices and memory": (
        *(field.name for field in fields(Devices)),
        "directions",
        "client_chunk",
        "memory_budget",
        "rounds_per_dispatch",
    ),
    "output": ("out", "resume", "from_snapshot", "snapshot_every", "log"),
}


LOGS = ("tensorboard", "wandb")


# Where things are may change between a run and its continuation, and so may the machine; the rest is the run's.
MOVED: dict[str, Any] = {"model": str | None, "data_dir": Path | None}
MOVABLE = {
    "resume",
    "from_snapshot",
    "log",
    "rounds",
    *MOVED,
    "snapshot_every",
    *EXECUTION,
    *(field.name for field in fields(Devices)),
}


@dataclass(frozen=True, kw_only=True)
class Experiment(SimulationConfig, Clock):
    """What all commands share.

    Attributes:
      task: digits (embedded), mnist, fashion-mnist, a text task for a language model (sst2, qqp, rte, boolq, cb, wic,
        wsc, multirc, ag_news, squad, drop, xsum, text-classification), or your own as path/to/file.py:name. All but
        digits need --data-dir or a hub. Like every choice it has options of its own, which --help lists with it.
      clients: clients in the population, N; above the number of training examples they are virtual.
      partition: how the training examples are assigned to the clients: Dirichlet over labels (dirichlet; with clients
        of equal size, dirichlet-balanced), iid, label shards (shards), natural clients (by-column), or your own as
        path/to/file.py:name.
      availability: which invited clients come: all (always); each with one probability (bernoulli); each with its own
        (per-client); by the time of day (diurnal); as recorded (trace); or your own as path/to/file.py:name.
      combine: how the server combines messages, in place of the method's own way: mean, median, trimmed_mean, krum,
        multi_krum, geometric_median, private_mean; A+B first shortens them by A, clip or clip_to_median. A channel of
        hiso_jax.channels each, with options of its own.
      attack: what hostile clients send: sign_flip, scaled, gaussian_attack, inner_product or colluding, a channel each.
      epsilon: budget of differential privacy for a client, with --combine private_mean or an algorithm through
        local_noise: the noise multiplier is then the least that keeps to it.
      schedule: the learning rate over the rounds: constant, decaying to zero (cosine, linear), as 1/√(1 + round/100)
        (inverse-sqrt), or your own as path/to/file.py:name.
      target: value of the task's metric; reported is the first evaluation whose mean with the next two is there; by
        default the task's own.
      out: directory to write, which must not exist; by default a new one under runs/.
    """

    task: str = "digits"
    clients: int = 100
    partition: str = "dirichlet"
    availability: str = "always"
    combine: str | None = None
    attack: str | None = None
    epsilon: float | None = None
    schedule: str = "constant"
    target: float | None = None
    out: Path | None = None
    # The clients follow the server's rate at each round.
    local_learning_rate: Any = None
    # What is not asked of whoever types.
    HIDDEN: ClassVar[tuple[str, ...]] = ("local_learning_rate",)

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
          ValueError: naming the first option out of range.
        """
        super().__post_init__()
        whole("clients", self.clients, 1)
        if self.epsilon is not None:
            positive("epsilon", self.epsilon)
        self.check_clock()
        task, partition, *_ = [choice_of(kind, self) for kind in KINDS]
        if getattr(partition.factory, "by_label", False) and not getattr(task.factory, "labelled", True):
            raise ParameterError("partition", f"must be iid for {task.name}, which has no labels; got {partition.name}")
        if self.cohort > self.clients and "clients" in partition.inputs:
            raise ParameterError("cohort", f"must be at most the number of clients, {self.clients}, got {self.cohort}")
        self._check_target()

    def _check_target(self) -> None:
        if self.target is not None:
            finite("target", self.target, float("-inf"))


def participation_of(options: Experiment) -> fed.Participation:
    """Who shows up, and how fast they are.

    Raises:
      ParameterError: an option of the availability is out of range, or a file of it cannot be read.
    """
    availability = choice_of("availability", options)
    return options.participation(availability.build(given_to(availability, options)))


@dataclass(frozen=True, kw_only=True)
class Run(Experiment, Devices):
    """Run one method and write its run directory: config, metrics, ledger, summary and curves.

    Attributes:
      algorithm: method: one of hiso_jax.algorithms, or your own as path/to/file.py:name or package.module:name;
        hiso+median, say, sends its messages through a channel of hiso_jax.channels.
      learning_rate: learning rate η; auto tries some for --probe-rounds each from the same start and takes the best; by
        default one tuned for the task and the algorithm, and auto for a language model where there is none.
      probe_rounds: rounds for which auto tries each rate; by default a fiftieth of --rounds, at least 4. They are
        counted, and told, beside those of the run.
      resume: directory of a run to continue from where it was ended, with its options; all but --model, --data-dir,
        --snapshot-every and what concerns devices and memory, which may have changed, and --rounds, which extends it.
      from_snapshot: with --resume, where the processor or jaxlib compute other initial parameters than they did: go on
        from the newest snapshot in place of them.
      log: where else evaluations go: tensorboard (in the run's directory), wandb; comma-separated. Each needs the extra
        of its name.
      snapshot_every: rounds between snapshots, which bound how many rounds a resumed run has to replay; 0 takes none;
        by default one every ten minutes.
    """

    algorithm: str = "hiso"
    learning_rate: float | Literal["auto"] | None = None
    probe_rounds: int | None = None
    resume: Path | None = None
    from_snapshot: bool = False
    log: Annotated[tuple[str, ...], Listed(str, "A,B")] = ()
    snapshot_every: int | None = None

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
          ValueError: naming the first option out of range.
        """
        super().__post_init__()
        self.check_devices()
        for name in self.log:
            if name not in LOGS or self.log.count(name) > 1:
                raise ParameterError("log", f"must be of {', '.join(LOGS)}, each once, got {','.join(self.log)}")
        if self.from_snapshot and self.resume is None:
            raise ParameterError("from_snapshot", "must be given with --resume: it says how a run is continued")
        if self.snapshot_every is not None:
            whole("snapshot_every", self.snapshot_every, 0)
        if self.learning_rate not in (None, "auto"):
            positive("learning_rate", self.learning_rate)
        if self.probe_rounds is not None:
            whole("probe_rounds", self.probe_rounds, 2)
