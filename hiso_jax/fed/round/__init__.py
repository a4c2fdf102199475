"""One round: the clients measure or train, their messages pass the channels, and the server updates the model."""

from hiso_jax.fed.round.channel import Channel, first_memory
from hiso_jax.fed.round.client import ClientRound, Message, Visit, client_round
from hiso_jax.fed.round.round import (
    Arrived,
    Invite,
    Late,
    Loss,
    Round,
    RoundInputs,
    Settle,
    check_round,
    client_answers,
    server_round,
    server_settle,
)
from hiso_jax.fed.round.shapes import groups_of, reads_loss, shapes_of
from hiso_jax.fed.round.standalone import Aside, make_round

__all__ = [
    "Arrived",
    "Aside",
    "Channel",
    "ClientRound",
    "Invite",
    "Late",
    "Loss",
    "Message",
    "Round",
    "RoundInputs",
    "Settle",
    "Visit",
    "check_round",
    "client_answers",
    "client_round",
    "first_memory",
    "groups_of",
    "make_round",
    "reads_loss",
    "server_round",
    "server_settle",
    "shapes_of",
]
