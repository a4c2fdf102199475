"""Selection of cohorts by a rule: whom the server invites, in place of a uniform draw."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from hiso_jax.checks import ParameterError
from hiso_jax.fed.population.rules import check_rule

NEVER = -1
SIGNATURE = "function(key, round_number, state) → int [C], the ids of state.cohort distinct clients"


@partial(jax.tree_util.register_dataclass, data_fields=["loss", "last_round"], meta_fields=["cohort"])
@dataclass(frozen=True)
class SelectionState:
    """The server's record of each client, from the last round in which the client's message counted.

    The ledger holds all of it, so a resumed run has the same state.

    Attributes:
      loss: the mean loss of the cohort in the last such round, float32 [N]; NaN before the first.
      last_round: the number of that round, int32 [N]; −1 before the first.
      cohort: C, the number of clients to select.
    """

    loss: Float[Array, "N"]
    last_round: Int[Array, "N"]
    cohort: int

    def after(
        self, round_number: Any, clients: Int[Array, "C"], valid: Bool[Array, "C"], loss: Float[Array, ""]
    ) -> "SelectionState":
        """The state after a round."""
        places = jnp.where(valid, clients, len(self.loss))
        return SelectionState(
            self.loss.at[places].set(jnp.asarray(loss, jnp.float32), mode="drop"),
            self.last_round.at[places].set(jnp.asarray(round_number, jnp.int32), mode="drop"),
            self.cohort,
        )


Select = Callable[[Key[Array, ""], Int[Array, ""], SelectionState], Int[Array, "C"]]
"""(key of the round, r, state) → the ids of C distinct clients, [C]; compiled into the rounds."""


def no_records(clients: int, cohort: int) -> SelectionState:
    """The state before the first round."""
    return SelectionState(jnp.full(clients, jnp.nan, jnp.float32), jnp.full(clients, NEVER, jnp.int32), cohort)


def state_of(
    rounds: Int[np.ndarray, "R"],
    cohorts: Int[np.ndarray, "R C"],
    valid: Bool[np.ndarray, "R C"],
    losses: Float[np.ndarray, "R"],
    clients: int,
) -> SelectionState:
    """The state after the recorded rounds of a population of ``clients`` clients."""
    loss, last = np.full(clients, np.nan, np.float32), np.full(clients, NEVER, np.int32)
    for number, cohort, counted, mean in zip(rounds, cohorts, valid, losses, strict=True):
        loss[cohort[counted]], last[cohort[counted]] = mean, number
    return SelectionState(jnp.asarray(loss), jnp.asarray(last), cohorts.shape[1])


def check_select(rule: Any, clients: int, cohort: int) -> None:
    """Refuse a rule that does not return integers of shape [C].

    Raises:
      ParameterError: it does not.
    """
    check_rule(
        "select",
        SIGNATURE,
        rule,
        lambda rule: rule(jax.random.key(0), jnp.int32(0), no_records(clients, cohort)),
        (cohort,),
        jnp.integer,
    )


def check_selected(rounds: Int[np.ndarray, "R"], cohorts: Int[np.ndarray, "R C"], clients: int) -> None:
    """Refuse cohorts that a rule has selected if they are none.

    Raises:
      ParameterError: a cohort has a client twice, or one that does not exist.
    """
    for number, cohort in zip(rounds, cohorts, strict=True):
        outside = cohort[(cohort < 0) | (cohort >= clients)]
        if len(outside):
            raise ParameterError(
                "select", f"must return ids of 0 to {clients - 1}; for round {number} it returned {outside[0]}"
            )
        ids, counts = np.unique(cohort, return_counts=True)
        if (counts > 1).any():
            twice = ids[counts > 1][0]
            raise ParameterError(
                "select", f"must return distinct clients; for round {number} it returned client {twice} twice"
            )
