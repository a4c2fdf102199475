"""Plans: the resources of a round on any devices, from a program that is compiled from shapes alone."""

from hiso_jax.plan.advice import advise
from hiso_jax.plan.client import training_bytes
from hiso_jax.plan.collectives import Collective, collectives
from hiso_jax.plan.hlo import Program, read
from hiso_jax.plan.plan import Memory, Messages, Plan, plan
from hiso_jax.plan.targets import CHIPS, EXAMPLES, Target, chip_of, target
from hiso_jax.plan.work import Work, work_of

__all__ = [
    "CHIPS",
    "EXAMPLES",
    "Collective",
    "Memory",
    "Messages",
    "Plan",
    "Program",
    "Target",
    "Work",
    "advise",
    "chip_of",
    "collectives",
    "plan",
    "read",
    "target",
    "training_bytes",
    "work_of",
]
