"""Privacy accounting: the (ε, δ) of differential privacy that a private run has spent for its clients.

Two runs are neighbours if one client is replaced by another. Messages are clipped to S, so a replaced client changes a
sum, or its own message, by at most 2S: noise of standard deviation σS has the noise multiplier σ/2. If cohorts are
drawn from a secret, each cohort is a hidden sample of fixed size without replacement, which amplifies privacy;
otherwise a client's visits are composed one by one. Rényi accounting (arXiv 1908.10530), by ``dp-accounting``.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from hiso_jax.checks import ParameterError, finite, integer, positive
from hiso_jax.fed.keys import cohort_key
from hiso_jax.fed.population import sample_cohort

# Rounds whose cohorts are drawn at a time.
BLOCK = 1024
# The lower end of the search for a budget's σ: smaller noise gives no privacy.
LEAST_NOISE = 0.02
MOST_EPSILON = 1e4


class Sampling(NamedTuple):
    """How clients are sampled into the rounds of a run.

    Attributes:
      clients: N.
      cohort: C.
      rounds: R.
      visits: the largest number of rounds that any client is invited to, if cohorts are public; None if cohorts are
        drawn from a secret.
    """

    clients: int
    cohort: int
    rounds: int
    visits: int | None = None


class PrivacySpent(NamedTuple):
    """The privacy budget that a run has spent.

    Attributes:
      epsilon: ε; None if ``dp-accounting`` is not installed.
      delta: δ.
      noise_multiplier: σ, the noise's standard deviation in units of ``clip_norm``.
      clip_norm: S.
      visits: the number of visits that were composed, or None if secret cohorts amplify privacy.
      local: whether clients add noise to their own messages, so that even the server sees no message without noise.
    """

    epsilon: float | None
    delta: float
    noise_multiplier: float
    clip_norm: float
    visits: int | None
    local: bool


def is_installed() -> bool:
    """Whether ``dp-accounting`` is installed."""
    from importlib.util import find_spec

    return find_spec("dp_accounting") is not None


def _event(noise_multiplier: float, sampling: Sampling) -> Any:
    import dp_accounting as dp

    once = dp.GaussianDpEvent(noise_multiplier / 2)
    if sampling.visits is not None:
        return dp.SelfComposedDpEvent(once, sampling.visits)
    sampled = dp.SampledWithoutReplacementDpEvent(sampling.clients, sampling.cohort, once)
    return dp.SelfComposedDpEvent(sampled, sampling.rounds)


def _bounds(sampling: Sampling) -> list[Sampling]:
    """The ways to account for a run. Each gives an upper bound on its ε; the smallest bound is reported.

    Secret cohorts reveal no more than every client in every round. The bound for sampling without replacement (Wang et
    al., arXiv 1808.00087) is looser than that if a cohort is a large share of the clients.
    """
    return [sampling] if sampling.visits is not None else [sampling, sampling._replace(visits=sampling.rounds)]


def _accountant() -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    # The accountant supports samples of fixed size without replacement under this relation only.
    return RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)


def epsilon(noise_multiplier: float, sampling: Sampling, *, delta: float = 1e-5) -> float:
    """The ε of a run.

    Args:
      noise_multiplier: σ, in units of the norm that messages are clipped to; 0 gives an infinite ε.
      sampling: how clients are sampled into its rounds.
      delta: δ.

    Raises:
      ValueError: a value is out of range.
      ImportError: ``dp-accounting`` (extra ``privacy``) is not installed.
    """
    finite("noise_multiplier", noise_multiplier)
    _check(sampling, delta)
    if 0 in (sampling.rounds, sampling.visits):
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    each = (_accountant().compose(_event(noise_multiplier, way)).get_epsilon(delta) for way in _bounds(sampling))
    return float(min(each))


def noise_for(epsilon: float, sampling: Sampling, *, delta: float = 1e-5) -> float:
    """The smallest σ with which a run spends at most ε, in units of the norm that messages are clipped to.

    Args:
      epsilon: the budget ε.
      sampling: how clients are sampled into the run's rounds.
      delta: δ.

    Raises:
      ValueError: a value is out of range, or no noise is enough.
      ImportError: ``dp-accounting`` (extra ``privacy``) is not installed.
    """
    positive("epsilon", epsilon)
    _check(sampling, delta)
    if 0 in (sampling.rounds, sampling.visits):
        return 0.0
    if epsilon >= MOST_EPSILON:
        raise ParameterError(
            "epsilon", f"must be below {MOST_EPSILON:g}, beyond which nothing is private, got {epsilon:g}"
        )
    found = [noise for way in _bounds(sampling) if (noise := _calibrated(epsilon, way, delta)) is not None]
    if not found:
        raise ParameterError("epsilon", f"must be a budget that some noise meets; got {epsilon:g} at delta {delta:g}")
    return min(found)


def _calibrated(epsilon: float, sampling: Sampling, delta: float) -> float | None:
    """The smallest σ by one way of accounting; None if no noise is enough."""
    import dp_accounting as dp

    try:
        found = dp.calibrate_dp_mechanism(
            _accountant,
            lambda noise: _event(noise, sampling),
            epsilon,
            delta,
            dp.LowerEndpointAndGuess(LEAST_NOISE, 1.0),
            tol=1e-4,
        )
    except dp.mechanism_calibration.NoBracketIntervalFoundError:
        return None
    return float(found)


def _check(sampling: Sampling, delta: float) -> None:
    positive("delta", delta)
    if delta >= 1:
        raise ParameterError("delta", f"must be below 1, got {delta}")
    integer("rounds", sampling.rounds, 0)
    integer("cohort", sampling.cohort, 1, sampling.clients + 1)
    if sampling.visits is not None:
        integer("visits", sampling.visits, 0)


def most_visits(seed_key: Key[Array, ""], clients: int, cohort: int, rounds: int) -> int:
    """The largest number of rounds that any client is invited to, in a run whose cohorts are drawn from its seed.

    Args:
      seed_key: the run's seed key.
      clients: N.
      cohort: C.
      rounds: R.
    """
    drawn = jax.jit(jax.vmap(lambda number: sample_cohort(cohort_key(seed_key, number), clients, cohort)))
    visits = np.zeros(clients, np.int64)
    for begin in range(0, rounds, BLOCK):
        numbers = np.asarray(drawn(jnp.arange(BLOCK) + begin))[: rounds - begin]
        np.add.at(visits, numbers.reshape(-1), 1)
    return int(visits.max(initial=0))
