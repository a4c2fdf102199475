"""The options of the commands: dataclasses from which the command line is built."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from hiso_jax.checks import ParameterError, integer
from hiso_jax.choices import Listed
from hiso_jax.cli.devices import Devices
from hiso_jax.experiment import Clock, Single
from hiso_jax.fed.ledger import EXECUTION

# The headings of --help-all and the options under each; the options of chosen factories follow the first heading.
GROUPS: dict[str, tuple[str, ...]] = {
    "experiment": (
        "task",
        "objective",
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
        "local_learning_rates",
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
    "measurement": ("perturbations", "mu", "difference", "backprop_share", "probe_scale", "matmul_precision"),
    "participation": (
        *("select", "availability", "buffer", "max_staleness", "staleness_exponent"),
        *(field.name for field in fields(Clock)),
    ),
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


# Options that may be given with --resume, since locations, the machine and the rounds may change.
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
class Run(Single, Devices):
    """Run one method and write its run directory: config, metrics, ledger, summary and curves.

    Attributes:
      out: directory to write, which must not exist; by default a new one under runs/.
      resume: directory of a run to continue from where it ended, with the run's options; --model, --data-dir,
        --snapshot-every and the options of devices and memory may be given anew, and --rounds extends the run.
      from_snapshot: with --resume, continue from the newest snapshot, not from the initial parameters; for a processor
        or jaxlib that computes other initial parameters than the run had.
      log: other places for evaluations: tensorboard (in the run's directory), wandb; comma-separated. Each needs the
        extra of its name.
      snapshot_every: rounds between snapshots, which bound how many rounds a resumed run has to replay; 0 takes none;
        by default one every ten minutes.
    """

    out: Path | None = None
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
            integer("snapshot_every", self.snapshot_every, 0)
