"""What a run has told of its clients, from what it was and how far it came."""

import logging

import numpy as np

from hiso_jax.fed.ledger import Records
from hiso_jax.fed.privacy import Sampling, Spent, epsilon, is_installed
from hiso_jax.fed.run.setup import Setup

logger = logging.getLogger("hiso_jax")


def spent(setup: Setup, records: Records | None) -> Spent | None:
    """(ε, δ) of a run after these rounds; None if nothing makes it private."""
    noise, config = setup.algorithm.noise, setup.config
    if noise is None:
        return None
    visits = None
    if config.public_cohorts:
        cohorts = np.zeros(0, np.int64) if records is None else records.cohort.reshape(-1)
        visits = int(np.bincount(cohorts).max(initial=0))
    rounds, found = 0 if records is None else len(records.round), None
    if is_installed():
        sampling = Sampling(setup.clients, config.cohort, rounds, visits)
        found = epsilon(noise[1], sampling, delta=config.delta)
    else:
        logger.warning("what the run has told of its clients is not computed: the extra privacy is not installed")
    return Spent(found, config.delta, noise[1], noise[0], visits, not setup.algorithm.is_private)
