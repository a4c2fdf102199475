"""Selections by name: how the server chooses a round's cohort, as in ``--select`` and ``Experiment``.

A selection is a factory ``name(*, options)`` that returns a rule, see :data:`hiso_jax.fed.Select`, or None for a
uniform draw without replacement.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from hiso_jax import fed
from hiso_jax.checks import ParameterError, finite
from hiso_jax.choices import Kind


def uniform() -> None:
    """Every client with the same probability."""


def highest_loss(*, candidates: float = 2.0) -> fed.Select:
    """The clients with the highest losses among a uniform draw (power-of-choice, Cho et al., arXiv 2010.01243).

    The loss of a client is that of its last cohort, because single losses are not sent. Clients without a loss come
    first. A choice by loss is biased: it learns faster where clients differ, and to another optimum.

    Args:
      candidates: size of the uniform draw in cohorts; 1 selects uniformly.

    Raises:
      ParameterError: ``candidates`` is below 1 or not finite.
    """
    finite("candidates", candidates)
    if candidates < 1:
        raise ParameterError("candidates", f"must be at least 1, got {candidates:g}")

    def rule(key: Key[Array, ""], round_number: Int[Array, ""], state: fed.SelectionState) -> Int[Array, "C"]:
        clients = len(state.loss)
        drawn = fed.sample_cohort(key, clients, min(clients, round(candidates * state.cohort)))
        losses = jnp.where(jnp.isnan(state.loss[drawn]), jnp.inf, state.loss[drawn])
        return drawn[jax.lax.top_k(losses, state.cohort)[1]]

    return rule


SELECTIONS = Kind(
    "select",
    {"uniform": uniform, "highest-loss": highest_loss},
    returns="rule",
    is_valid=lambda made: made is None or callable(made),
    group="hiso_jax.selections",
)
