"""Populations: the clients, their training examples, and their participation in rounds."""

from hiso_jax.fed.population.cohort import permute, sample_cohort
from hiso_jax.fed.population.fleet import Fleet, LogNormal, Work
from hiso_jax.fed.population.participation import (
    ABSENT,
    DROPPED,
    LATE,
    REPORTED,
    STATUS_NAMES,
    Attendance,
    Availability,
    Bernoulli,
    ClientRates,
    Diurnal,
    Participation,
    Trace,
    UniformRates,
    attend,
    load_trace,
)
from hiso_jax.fed.population.partitions import by_column, dirichlet, dirichlet_balanced, iid, shards
from hiso_jax.fed.population.population import AnyPopulation, Population, as_population, draw_own
from hiso_jax.fed.population.remote import RemotePopulation
from hiso_jax.fed.population.selection import (
    Select,
    SelectionState,
    check_select,
    check_selected,
    no_records,
    state_of,
)
from hiso_jax.fed.population.virtual import VirtualPopulation, virtual

__all__ = [
    "ABSENT",
    "DROPPED",
    "LATE",
    "REPORTED",
    "STATUS_NAMES",
    "AnyPopulation",
    "Attendance",
    "Availability",
    "Bernoulli",
    "ClientRates",
    "Diurnal",
    "Fleet",
    "LogNormal",
    "Participation",
    "Population",
    "RemotePopulation",
    "Select",
    "SelectionState",
    "Trace",
    "UniformRates",
    "VirtualPopulation",
    "Work",
    "as_population",
    "attend",
    "by_column",
    "check_select",
    "check_selected",
    "dirichlet",
    "dirichlet_balanced",
    "draw_own",
    "iid",
    "load_trace",
    "no_records",
    "permute",
    "sample_cohort",
    "shards",
    "state_of",
    "virtual",
]
