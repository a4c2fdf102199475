"""A run of many rounds: its configuration, its loop and its result."""

from hiso_jax.fed.run.abstract import DescribedRun, describe
from hiso_jax.fed.run.budget import RoundCosts, round_costs
from hiso_jax.fed.run.callbacks import Callbacks, as_callbacks
from hiso_jax.fed.run.clients import client_metrics
from hiso_jax.fed.run.config import SimulationConfig, config_of
from hiso_jax.fed.run.evaluation import first_at_target, make_evaluate
from hiso_jax.fed.run.grid import Best, Grid, SweepResult
from hiso_jax.fed.run.local_rate import local_rate_of_projections
from hiso_jax.fed.run.prepared import RunSpec, check_messages
from hiso_jax.fed.run.privacy_spent import sensitivity
from hiso_jax.fed.run.rate import RateProbe, find_rate
from hiso_jax.fed.run.remote import Arrivals, Exchange, RemoteRun, completed
from hiso_jax.fed.run.result import Result
from hiso_jax.fed.run.search import FEWEST_TRIES, next_rates
from hiso_jax.fed.run.secret import as_key, fresh
from hiso_jax.fed.run.session import Callback, Session
from hiso_jax.fed.run.simulation import Simulation
from hiso_jax.fed.run.sweep import Programs, sweep
from hiso_jax.fed.run.traffic import GROUP_BYTES, HEADER_BYTES, SEED_BYTES, Traffic

__all__ = [
    "FEWEST_TRIES",
    "GROUP_BYTES",
    "HEADER_BYTES",
    "SEED_BYTES",
    "Arrivals",
    "Best",
    "Callback",
    "Callbacks",
    "DescribedRun",
    "Exchange",
    "Grid",
    "Programs",
    "RateProbe",
    "RemoteRun",
    "Result",
    "RoundCosts",
    "RunSpec",
    "Session",
    "Simulation",
    "SimulationConfig",
    "SweepResult",
    "Traffic",
    "as_callbacks",
    "as_key",
    "check_messages",
    "client_metrics",
    "completed",
    "config_of",
    "describe",
    "find_rate",
    "first_at_target",
    "fresh",
    "local_rate_of_projections",
    "make_evaluate",
    "next_rates",
    "round_costs",
    "sensitivity",
    "sweep",
]
