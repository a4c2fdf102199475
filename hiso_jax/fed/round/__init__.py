"""One round: what its clients measure or train, what happens to their messages, and what the server makes of them."""

from hiso_jax.fed.round.channel import Channel, first_memory
from hiso_jax.fed.round.inputs import Cohort, Draw, Estimator, Keys, check_round
from hiso_jax.fed.round.round import Given, Round, server_round
from hiso_jax.fed.round.shapes import groups_of, reads_loss, shapes_of
from hiso_jax.fed.round.standalone import Aside, make_round

__all__ = [
    "Aside",
    "Channel",
    "Cohort",
    "Draw",
    "Estimator",
    "Given",
    "Keys",
    "Round",
    "check_round",
    "first_memory",
    "groups_of",
    "make_round",
    "reads_loss",
    "server_round",
    "shapes_of",
]
