"""The privacy that a run has spent, from its method and the rounds that it has run."""

import logging

import numpy as np

from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.ledger import Records
from hiso_jax.fed.privacy import PrivacySpent, Sampling, epsilon, is_installed
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.prepared import PreparedRun

logger = logging.getLogger("hiso_jax")


def sensitivity(algorithm: Algorithm, config: SimulationConfig, clients: int) -> int:
    """The number of a cohort's messages that change with one client's data: its own, and those forged from its own.

    Args:
      algorithm: the method of a private run. If clients noise their own messages, messages forged from them reveal no
        more, and do not count.
      config: the configuration, which sets the share of hostile clients.
      clients: N.
    """
    attack = algorithm.attack
    if attack is None or not attack.reads_others or not algorithm.is_private:
        return 1
    if config.attackers_of == "cohort":
        return 1 + round(config.attackers * config.cohort)
    return 1 + min(round(config.attackers * clients), config.cohort - 1)


def privacy_spent(prepared: PreparedRun, records: Records | None) -> PrivacySpent | None:
    """The (ε, δ) of a run after the rounds of ``records``; None if its method adds no noise."""
    noise, config = prepared.algorithm.noise, prepared.config
    if noise is None:
        return None
    visits = None
    if config.public_cohorts:
        cohorts = np.zeros(0, np.int64) if records is None else records.cohort.reshape(-1)
        visits = int(np.bincount(cohorts).max(initial=0))
    rounds, found = 0 if records is None else len(records.round), None
    if is_installed():
        sampling = Sampling(prepared.clients, config.cohort, rounds, visits)
        found = epsilon(
            noise[1] / sensitivity(prepared.algorithm, config, prepared.clients), sampling, delta=config.delta
        )
    else:
        logger.warning("the privacy that the run has spent is not computed: the extra privacy is not installed")
    return PrivacySpent(found, config.delta, noise[1], noise[0], visits, not prepared.algorithm.is_private)
