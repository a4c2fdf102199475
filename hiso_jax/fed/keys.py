"""The keys of a run: every round's keys of directions, data and cohort are derived from one seed key."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key

from hiso_jax.zo import Visits, fold_in, zo_states

DATA_STREAM = 0xDA7A0001
COHORT_STREAM = 0xC0480001
INIT_STREAM = 0x81140001
PRESENCE_STREAM = 0xA77E0001
TRAITS_STREAM = 0xFA170001
POPULATION_STREAM = 0xB0B00001
CHANNEL_STREAM = 0xC4A70001
ATTACKERS_STREAM = 0xBAD00001
BACKPROP_STREAM = 0xBAC40001


def round_key(seed_key: Key[Array, ""], round_number: ArrayLike) -> Key[Array, ""]:
    """The key of a round's directions: fold_in(seed_key, r), 0 ≤ r < 2³¹."""
    return fold_in(seed_key, round_number)


def _stream(seed_key: Key[Array, ""], stream: int) -> Key[Array, ""]:
    # Streams are above 2³¹ and rounds below, so no stream equals a round.
    return fold_in(seed_key, jnp.uint32(stream))


def data_key(seed_key: Key[Array, ""], round_number: ArrayLike) -> Key[Array, ""]:
    """The key of a round's batches, different from every key of its directions."""
    return fold_in(_stream(seed_key, DATA_STREAM), round_number)


def cohort_key(seed_key: Key[Array, ""], round_number: ArrayLike) -> Key[Array, ""]:
    """The key of a round's cohort."""
    return fold_in(_stream(seed_key, COHORT_STREAM), round_number)


def init_key(seed_key: Key[Array, ""]) -> Key[Array, ""]:
    """The key of the initial parameters."""
    return _stream(seed_key, INIT_STREAM)


def presence_key(seed_key: Key[Array, ""], round_number: ArrayLike) -> Key[Array, ""]:
    """The key that draws which clients are present in a round and which drop out of it."""
    return fold_in(_stream(seed_key, PRESENCE_STREAM), round_number)


def traits_key(seed_key: Key[Array, ""]) -> Key[Array, ""]:
    """The key of the clients' traits, fixed for a run: speed, time zone, availability."""
    return _stream(seed_key, TRAITS_STREAM)


def population_key(seed_key: Key[Array, ""]) -> Key[Array, ""]:
    """The key of the data of virtual clients, different from every key of the rounds of the same seed."""
    return _stream(seed_key, POPULATION_STREAM)


def attackers_key(seed_key: Key[Array, ""]) -> Key[Array, ""]:
    """The key that draws which clients are hostile."""
    return _stream(seed_key, ATTACKERS_STREAM)


def backprop_key(seed_key: Key[Array, ""]) -> Key[Array, ""]:
    """The key that draws which clients can backpropagate."""
    return _stream(seed_key, BACKPROP_STREAM)


def channel_key(seed_key: Key[Array, ""], round_number: ArrayLike) -> Key[Array, ""]:
    """The key of a round's client-side draws and of the channels of its messages."""
    return fold_in(_stream(seed_key, CHANNEL_STREAM), round_number)


def send_key(channel_key: Key[Array, ""], place: int) -> Key[Array, ""]:
    """The key of the channel at ``place`` in an algorithm's ``send``."""
    return fold_in(fold_in(channel_key, 0), place)


def combine_key(channel_key: Key[Array, ""]) -> Key[Array, ""]:
    """The key of an algorithm's ``combine``."""
    return fold_in(channel_key, 1)


def sampling_key(channel_key: Key[Array, ""]) -> Key[Array, ""]:
    """The key of a loss that samples: one for all evaluations of a round, so that they differ by their parameters."""
    return fold_in(channel_key, 3)


def client_key(channel_key: Key[Array, ""], client: ArrayLike) -> Key[Array, ""]:
    """The key of a client's own draws."""
    return fold_in(fold_in(channel_key, 2), client)


def visits_of(seed_key: Key[Array, ""], version: Int[Array, "B"], place: Int[Array, "B"], state: Any) -> Visits:
    """The visits that a buffer's answers come from.

    Args:
      seed_key: the run's seed key.
      version: the round in which each visit began.
      place: its place among the clients that this round invited.
      state: the optimizer's state; only its rule of directions is read.
    """
    keys = jax.vmap(lambda number: round_key(seed_key, number))(version)
    return Visits(keys, place % zo_states(state)[0].directions.groups_of(len(place)))
