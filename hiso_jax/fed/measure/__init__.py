"""The client's computation in a round: one value with one interface, :class:`Measure`."""

from hiso_jax.fed.measure.context import Cohort, Draw, Estimator, Keys, Measure, Measured, RoundContext
from hiso_jax.fed.measure.local import Local, LocalClient
from hiso_jax.fed.measure.mixture import Mixed, mixed
from hiso_jax.fed.measure.probes import Probes, probes
from hiso_jax.fed.measure.projections import Projections, in_working_dtype, progress_of, projections

__all__ = [
    "Cohort",
    "Draw",
    "Estimator",
    "Keys",
    "Local",
    "LocalClient",
    "Measure",
    "Measured",
    "Mixed",
    "Probes",
    "Projections",
    "RoundContext",
    "in_working_dtype",
    "mixed",
    "probes",
    "progress_of",
    "projections",
]
