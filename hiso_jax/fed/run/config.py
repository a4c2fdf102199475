"""The configuration of a simulation, checked when it is made."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import optax

from hiso_jax.checks import ParameterError, between, finite, fraction, integer, of_kind, positive, rate
from hiso_jax.renamed import IN_FILES, with_known_names
from hiso_jax.zo import DirectionsMode, check_directions

# The options of an asynchronous run.
BUFFERING = ("buffer", "max_staleness", "staleness_exponent")
MatmulPrecision = Literal["default", "high", "highest"]


@with_known_names
@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """The configuration of a :class:`hiso_jax.fed.Simulation`.

    Attributes:
      rounds: number of rounds to run, R.
      cohort: clients per round, C; with a buffer, the clients that are at work at the same time.
      local_steps: local steps that a client takes in a round, K; by default the number that the method is made for, 1
        for most.
      perturbations: perturbations per local step, P; by default the method's own number, 5 for most.
      mu: smoothing radius μ of the finite differences.
      difference: forward or central differences; None is forward, unless the algorithm has its own measure.
      batch_size: examples per local step, drawn with replacement from the client's own.
      seed: seed of everything random in the run, 0 ≤ seed < 2³¹.
      eval_every: rounds between evaluations.
      local_learning_rate: η of the clients' own steps, a number or a schedule over rounds; by default the task's for
        projections, else the server's, or the method's share of it. The rate inside an optimizer of optax is not
        known, and K > 1 then requires this one.
      rounds_per_dispatch: rounds run by one call to the device; None adapts the number to about half a second, never
        beyond the next evaluation. One program runs any number, so the result does not depend on it.
      weighting: weight of a client in the mean of its cohort, uniform or by the number of examples that it holds.
      attackers: share of the clients that are hostile and send forged messages; 0 ≤ share < 1.
      attackers_of: clients that the share is taken of, the population, so that one cohort has more attackers than
        another, or every cohort.
      backprop_share: share of the clients that can backpropagate, for a method that measures projections; the others
        measure finite differences in one local step. memory decides by the clients' memory (``memory_gb``, or that of a
        ``fed.Fleet``); by default all can.
      probe_scale: factor on the scalars of clients that cannot backpropagate; by default, with several local steps, the
        server finds it in every round, from the lengths of the messages, at most 1; a private run needs a number.
      public_cohorts: whether the cohorts of a private run follow from its seed, which every client knows, and not from
        the server's secret; cohorts are then reproducible, and privacy is counted over a client's visits.
      buffer: B, the answers that an update takes, in an asynchronous run: the server applies the first B answers, each
        along the directions of the round that it was measured in, and invites B other clients, while C − B are still at
        work. B divides C, and ``participation`` needs a fleet. None waits for the whole cohort.
      max_staleness: the most updates that the server may make between an invitation and its answer; older answers are
        late and do not count. None takes all.
      staleness_exponent: a of the factor (1 + τ)^−a on an answer that is τ updates old; 0.5 as in FedBuff
        (arXiv 2106.06639), 0 for none.
      delta: δ of a private run's differential privacy, well below one over the number of clients.
      client_chunk: diverged clients (K > 1) whose losses are computed together; 1 is one by one; a number above 1 also
        bounds the clients in memory at a time. None chooses by backend, model and memory.
      memory_budget: bytes that a cohort may take on a device; None means a share of its memory.
      directions: handling of a direction until the update; keep needs two copies of the trained parameters beside them,
        regenerate needs one, and both give the same bits. None keeps directions if K = 1, memory permits and it pays.
      matmul_precision: rounding of float32 matrix products; default is the device's fastest, on TPU with operands in
        bfloat16, which changed the scalars of MNIST's CNN by 12 % rms and cost it 2.5 points after 400 rounds (all
        emulated); high is three bfloat16 passes on TPU, and TF32 on GPUs, which changed the scalars by 1.6 % and cost
        nothing; highest is full float32. On CPU all three are full float32.
    """

    rounds: int = 1500
    cohort: int = 10
    local_steps: int | None = None
    perturbations: int | None = None
    mu: float = 1e-3
    difference: Literal["forward", "central"] | None = None
    batch_size: int = 32
    seed: int = 0
    eval_every: int = 50
    local_learning_rate: optax.ScalarOrSchedule | None = None
    rounds_per_dispatch: int | None = None
    weighting: Literal["uniform", "examples"] = "uniform"
    attackers: float = 0.0
    attackers_of: Literal["population", "cohort"] = "population"
    backprop_share: float | Literal["memory"] | None = None
    probe_scale: float | None = None
    public_cohorts: bool = False
    buffer: int | None = None
    max_staleness: int | None = None
    staleness_exponent: float = 0.5
    delta: float = 1e-5
    client_chunk: int | None = None
    memory_budget: int | None = None
    directions: DirectionsMode | None = None
    matmul_precision: MatmulPrecision = "high"

    def __post_init__(self) -> None:
        """Check the range of every option.

        Raises:
          ValueError: an option is out of range; the error names the first.
        """
        for option in ("rounds", "cohort", "batch_size", "eval_every"):
            integer(option, getattr(self, option), 1, 2**31)
        for option in ("local_steps", "perturbations", "rounds_per_dispatch", "client_chunk", "memory_budget"):
            if getattr(self, option) is not None:
                integer(option, getattr(self, option), 1)
        if self.directions is not None:
            check_directions(self.directions)
        if self.directions == "keep" and (self.local_steps or 1) > 1:
            raise ParameterError("directions", "must be regenerate for several local steps, got keep")
        of_kind("public_cohorts", self.public_cohorts, bool, "True or False")
        positive("mu", self.mu)
        if self.difference not in (None, "forward", "central"):
            raise ParameterError("difference", f"must be forward or central, got {self.difference}")
        fraction("attackers", self.attackers)
        if self.attackers_of not in ("population", "cohort"):
            raise ParameterError("attackers_of", f"must be population or cohort, got {self.attackers_of}")
        if self.backprop_share not in (None, "memory"):
            between("backprop_share", self.backprop_share, 0, 1)
        if self.probe_scale is not None:
            positive("probe_scale", self.probe_scale)
            if self.backprop_share is None:
                raise ParameterError("probe_scale", "is read with `backprop_share`; it would have no effect alone")
        self._check_buffer()
        positive("delta", self.delta)
        if self.delta >= 1:
            raise ParameterError("delta", f"must be below 1, got {self.delta:g}")
        if self.weighting not in ("uniform", "examples"):
            raise ParameterError("weighting", f"must be uniform or examples, got {self.weighting}")
        if self.matmul_precision not in get_args(MatmulPrecision):
            names = ", ".join(get_args(MatmulPrecision))
            raise ParameterError("matmul_precision", f"must be one of {names}, got {self.matmul_precision}")
        integer("seed", self.seed, 0, 2**31)
        if self.local_learning_rate is not None:
            rate("local_learning_rate", self.local_learning_rate)

    def _check_buffer(self) -> None:
        finite("staleness_exponent", self.staleness_exponent)
        if self.max_staleness is not None:
            integer("max_staleness", self.max_staleness, 0)
        if self.buffer is None:
            if self.max_staleness is not None:
                raise ParameterError("max_staleness", "is read with `buffer`; it would have no effect alone")
            return
        integer("buffer", self.buffer, 1)
        if self.cohort % self.buffer:
            raise ParameterError("buffer", f"must divide the cohort of {self.cohort} clients, got {self.buffer}")

    @property
    def answers(self) -> int:
        """The answers that an update takes: the buffer's, or those of the cohort."""
        return self.buffer or self.cohort


def config_of(config: SimulationConfig, perturbations: int) -> dict[str, Any]:
    """The configuration as a ledger's header holds it; ``perturbations`` is P, chosen by the run or the method."""
    rate = config.local_learning_rate
    given: dict[str, Any] = asdict(config) | {
        "local_learning_rate": "a schedule" if callable(rate) else rate,
        "difference": config.difference or "forward",
        "perturbations": perturbations,
    }
    if config.buffer is None:
        # As in ledgers of releases that had no buffer.
        given = {name: value for name, value in given.items() if name not in BUFFERING}
    return {IN_FILES.get(name, name): value for name, value in given.items()}
