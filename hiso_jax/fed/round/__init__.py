"""One round: what its clients measure, and what the server makes of it."""

from hiso_jax.fed.round.round import Round, make_round

__all__ = [
    "Round",
    "make_round",
]
