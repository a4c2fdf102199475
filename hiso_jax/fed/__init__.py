"""The federation: rounds, populations, the scalar log, and the loop around them."""

from hiso_jax.fed.aggregate import Aggregate, mean
from hiso_jax.fed.cohort import permute, sample_cohort
from hiso_jax.fed.config import SimulationConfig
from hiso_jax.fed.evaluation import first_at_target, make_evaluate
from hiso_jax.fed.execution import Execution
from hiso_jax.fed.fingerprint import fingerprint
from hiso_jax.fed.fleet import Fleet, LogNormal
from hiso_jax.fed.keys import cohort_key, data_key, init_key, round_key
from hiso_jax.fed.ledger import Ledger, LedgerFile, load
from hiso_jax.fed.mesh import make_mesh
from hiso_jax.fed.participation import (
    Bernoulli,
    ClientRates,
    Diurnal,
    Participation,
    Trace,
    UniformRates,
    load_trace,
)
from hiso_jax.fed.population import Population, dirichlet, dirichlet_balanced, iid, shards
from hiso_jax.fed.records import Records, Updates
from hiso_jax.fed.replay import replay
from hiso_jax.fed.result import Evaluation, Progress, Result
from hiso_jax.fed.round import RoundRecord, make_round
from hiso_jax.fed.simulation import Simulation
from hiso_jax.fed.storage import Storage
from hiso_jax.fed.sweep import Best, SweepResult, sweep
from hiso_jax.fed.task import Task
from hiso_jax.fed.traffic import Traffic
from hiso_jax.fed.virtual import VirtualPopulation, virtual

__all__ = [
    "Aggregate",
    "Bernoulli",
    "Best",
    "ClientRates",
    "Diurnal",
    "Evaluation",
    "Execution",
    "Fleet",
    "Ledger",
    "LedgerFile",
    "LogNormal",
    "Participation",
    "Population",
    "Progress",
    "Records",
    "Result",
    "RoundRecord",
    "Simulation",
    "SimulationConfig",
    "Storage",
    "SweepResult",
    "Task",
    "Trace",
    "Traffic",
    "UniformRates",
    "Updates",
    "VirtualPopulation",
    "cohort_key",
    "data_key",
    "dirichlet",
    "dirichlet_balanced",
    "fingerprint",
    "first_at_target",
    "iid",
    "init_key",
    "load",
    "load_trace",
    "make_evaluate",
    "make_mesh",
    "make_round",
    "mean",
    "permute",
    "replay",
    "round_key",
    "sample_cohort",
    "shards",
    "sweep",
    "virtual",
]
