"""The keyed Feistel permutation and the cohorts it makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiso_jax import fed


def chi_square(counts):
    """The chi-square statistic of ``counts`` against uniform, in standard deviations above its mean."""
    counts = np.asarray(counts, float)
    freedom = counts.size - 1
    statistic = ((counts - counts.mean()) ** 2).sum() / counts.mean()
    return (statistic - freedom) / np.sqrt(2 * freedom)


permute = jax.jit(lambda key, size: fed.permute(key, jnp.arange(size), size), static_argnums=1)
sample = jax.jit(fed.sample_cohort, static_argnums=(1, 2))


@pytest.mark.thorough
@given(size=st.sampled_from([1, 2, 3, 6, 7, 8, 31, 257, 1000]), seed=st.integers(0, 2**31 - 1))
def test_it_is_a_permutation(size, seed):
    image = permute(jax.random.key(seed), size)
    np.testing.assert_array_equal(np.sort(image), np.arange(size))


@pytest.mark.thorough
@given(population=st.sampled_from([5, 10**4, 10**7, 2**31 - 1]), seed=st.integers(0, 2**31 - 1))
def test_a_cohort_has_no_repeats_and_is_reproducible(population, seed):
    size = min(population, 100)
    seed_key = jax.random.key(seed)
    cohort = sample(fed.cohort_key(seed_key, 3), population, size)
    assert len(np.unique(cohort)) == size
    assert cohort.min() >= 0
    assert cohort.max() < population
    np.testing.assert_array_equal(cohort, sample(fed.cohort_key(seed_key, 3), population, size))
    if population > 5:
        assert (cohort != sample(fed.cohort_key(seed_key, 4), population, size)).any()


@pytest.mark.thorough
@pytest.mark.parametrize("population", [3, 5, 12, 100])
def test_every_client_and_every_pair_is_equally_likely(population):
    keys = jax.random.split(jax.random.key(population), 20_000)
    cohorts = np.asarray(jax.vmap(lambda key: fed.sample_cohort(key, population, 2))(keys))
    assert chi_square(np.bincount(cohorts[:, 0], minlength=population)) < 6
    pairs = np.bincount(cohorts[:, 0] * population + cohorts[:, 1], minlength=population**2)
    distinct = pairs[~np.eye(population, dtype=bool).reshape(-1)]
    assert distinct.sum() == len(keys)
    assert chi_square(distinct) < 6


@pytest.mark.thorough
def test_all_permutations_of_five_are_equally_likely():
    keys = jax.random.split(jax.random.key(1), 48_000)
    images = np.asarray(jax.vmap(lambda key: fed.permute(key, jnp.arange(5), 5))(keys))
    _, counts = np.unique(images @ 5 ** np.arange(5), return_counts=True)
    assert len(counts) == 120
    assert chi_square(counts) < 6


@pytest.mark.parametrize(("population", "cohort"), [(5, 6), (5, 0)])
def test_a_cohort_that_cannot_be_is_refused(population, cohort):
    with pytest.raises(ValueError, match=f"cohort must be between 1 and the population of 5 clients, got {cohort}"):
        fed.sample_cohort(jax.random.key(0), population, cohort)
