"""The options of the commands: dataclasses from which the command line is made."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from hiso_jax.checks import ParameterError, finite, positive, whole
from hiso_jax.cli.arguments import Listed
from hiso_jax.cli.devices import Devices
from hiso_jax.cli.language import TEXT_TASK_NAMES, Language
from hiso_jax.cli.presence import Presence
from hiso_jax.fed import SimulationConfig
from hiso_jax.fed.ledger import EXECUTION

# Under which headings --help shows the options of a command; those of its methods stand behind the first.
GROUPS: dict[str, tuple[str, ...]] = {
    "experiment": (
        "task",
        "model",
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
    "federation": ("clients", "cohort", "local_steps", "batch_size", "weighting", "eval_every"),
    "hostile clients": ("combine", "attack", "attackers", "attackers_of"),
    "privacy": ("epsilon", "delta", "public_cohorts"),
    "measurement": ("perturbations", "mu", "method", "matmul_precision"),
    "data": ("data_dir", "partition", "column", "alpha", "shards_per_client", "virtual", "client_examples"),
    "language model": tuple(field.name for field in fields(Language)),
    "participation": tuple(field.name for field in fields(Presence)),
    "devices and memory": (
        *(field.name for field in fields(Devices)),
        "directions",
        "client_chunk",
        "memory_budget",
        "rounds_per_dispatch",
    ),
    "output": ("out", "resume", "from_snapshot", "snapshot_every", "log"),
}


Schedule = Literal["constant", "cosine", "linear", "inverse-sqrt"]
LOGS = ("tensorboard", "wandb")
# The defaults of language models: the papers' 2 of 6 clients, adapters, and rounds that end within minutes.
TEXT_DEFAULTS: dict[str, Any] = {
    "rounds": 24,
    "eval_every": 6,
    "clients": 6,
    "cohort": 2,
    "batch_size": 16,
    "partition": "dirichlet-balanced",
    "alpha": 1.0,
    "trainable": "lora",
    "test_rows": 200,
    # Of a comparison, whose every trial is a run of minutes.
    "schedules": ("constant",),
    "tries": 3,
    "tuning_seeds": 1,
    "seeds": 1,
}


# Where things are may change between a run and its continuation, and so may the machine; the rest is the run's.
MOVABLE = {
    "resume",
    "from_snapshot",
    "log",
    "rounds",
    "model",
    "data_dir",
    "snapshot_every",
    *EXECUTION,
    *(field.name for field in fields(Devices)),
}


@dataclass(frozen=True, kw_only=True)
class Experiment(SimulationConfig, Presence, Language):
    """What all commands share.

    Attributes:
      task: digits (embedded); mnist; fashion-mnist; or a text task for a language model. All but digits need
        --data-dir or a hub.
      model: for images mlp or cnn; for text a language model (OPT, Llama, Mistral, Qwen2) by hub name, as
        a folder with safetensors, or as a .gguf file.
      data_dir: folder with the data: the four MNIST IDX files, gzip-compressed or not; or train and validation files
        (.jsonl, .csv, .parquet) with the text task's columns. Without it the datasets hub is asked.
      clients: clients in the population, N; above the number of training examples they are virtual.
      partition: how the training examples are dealt to the clients: Dirichlet over labels (the default, where there
        are labels), the same with clients of equal size, i.i.d., label shards, or natural clients, by a column.
      column: of text data, the column that names the client of each training row; there are as many clients as names.
      virtual: clients that exist as a key and draw their examples from the shared pool, by a label mixture of their
        own (dirichlet) or the pool's (iid); any number of them.
      client_examples: fewest and most examples that a virtual client holds, log-uniform in between.
      alpha: concentration of the Dirichlet partition; smaller means more heterogeneous clients.
      shards_per_client: label shards dealt to each client in the shards partition.
      combine: how the server combines messages, in place of the method's own way: mean, median, trimmed_mean, krum,
        multi_krum, geometric_median, private_mean; A+B first shortens them by A, clip or clip_to_median. A channel of
        hiso_jax.channels each, with options of its own.
      attack: what hostile clients send: sign_flip, scaled, gaussian_attack, inner_product or colluding, a channel each.
      epsilon: budget of differential privacy for a client, with --combine private_mean or an algorithm through
        local_noise: the noise multiplier is then the least that keeps to it.
      schedule: how the learning rate runs over the rounds: constant, decaying to zero (cosine, linear), or as
        1/√(1 + round/100).
      target: value of the task's metric; reported is the first evaluation whose mean with the next two is there; by
        default the task's own.
      out: directory to write, which must not exist; by default a new one under runs/.
    """

    task: Literal["digits", "mnist", "fashion-mnist"] | TEXT_TASK_NAMES = "digits"
    model: str | None = None
    data_dir: Path | None = None
    clients: int = 100
    partition: Literal["dirichlet", "dirichlet-balanced", "iid", "shards", "by-column"] | None = None
    column: str | None = None
    virtual: bool = False
    client_examples: Annotated[tuple[int, ...], Listed(int, "MIN,MAX")] = (16, 256)
    alpha: float = 0.5
    shards_per_client: int = 2
    combine: str | None = None
    attack: str | None = None
    epsilon: float | None = None
    schedule: Schedule = "constant"
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
        whole("shards_per_client", self.shards_per_client, 1)
        positive("alpha", self.alpha)
        if self.epsilon is not None:
            positive("epsilon", self.epsilon)
        self.check_presence()
        self.check_language(self.task)
        if len(self.client_examples) != 2 or not 1 <= self.client_examples[0] <= self.client_examples[1] < 2**31:
            given = ",".join(map(str, self.client_examples))
            raise ParameterError("client_examples", f"must be two numbers 1 ≤ fewest ≤ most < 2^31, got {given}")
        if (self.column is not None) != (self.partition == "by-column"):
            raise ParameterError("column", f"must be given with partition by-column and only then; got {self.column}")
        if self.column is not None and self.task not in get_args(TEXT_TASK_NAMES):
            raise ParameterError("column", f"must be one of text data; {self.task} has none")
        if self.virtual and self.partition in ("shards", "dirichlet-balanced", "by-column"):
            raise ParameterError("partition", f"must be dirichlet or iid for virtual clients, got {self.partition}")
        if self.cohort > self.clients and self.column is None:
            raise ParameterError("cohort", f"must be at most the number of clients, {self.clients}, got {self.cohort}")
        self._check_target()

    def _check_target(self) -> None:
        if self.target is not None:
            finite("target", self.target, float("-inf"))


def partition_of(options: Experiment, *, has_labels: bool) -> str:
    """The partition asked for, or the one for the kind of task."""
    return options.partition or ("dirichlet" if has_labels else "iid")


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
