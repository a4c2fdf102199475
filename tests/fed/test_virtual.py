"""Virtual clients, which exist as a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed
from tests.fed.problems import linear_task

LABELS = np.random.default_rng(0).choice(5, 4000, p=[0.4, 0.3, 0.2, 0.1, 0.0])


def drawn(population, clients, shape=(400,), key=0):
    return np.asarray(jax.jit(population.sample, static_argnums=2)(jax.random.key(key), jnp.asarray(clients), shape))


@pytest.mark.thorough
def test_a_client_is_the_same_in_every_round_and_place():
    population = fed.virtual(LABELS, 10**7, alpha=0.3, sizes=(4, 12))
    one, again, other = (drawn(population, [9_999_999, 5], key=key) for key in (0, 1, 0))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(drawn(population, [5, 77])[0], one[1])
    # The draws differ; they are of the same few examples.
    assert (one != again).any()
    assert set(one[0]) == set(again[0])
    sizes = np.asarray(population.sizes_of(jnp.array([9_999_999, 5])))
    assert len(set(one[0])) <= sizes[0]
    assert one.min() >= 0
    assert one.max() < 4000


@pytest.mark.thorough
def test_mixtures_are_dirichlet_around_the_pools():
    clients = np.arange(3000)
    counts = {}
    for alpha in (0.3, None):
        rows = LABELS[drawn(fed.virtual(LABELS, 10**5, alpha=alpha, sizes=(10**6, 10**6)), clients, (64,))]
        counts[alpha] = np.stack([(rows == label).mean(1) for label in range(5)], 1)
        np.testing.assert_allclose(counts[alpha].mean(0), np.bincount(LABELS, minlength=5) / 4000, atol=0.03)
    p = np.bincount(LABELS, minlength=5)[:4] / 4000
    # Variance of a Dirichlet(α·L·p) mixture over four labels, and of the 64 draws from it.
    mixture = p * (1 - p) / (0.3 * 4 + 1)
    np.testing.assert_allclose(counts[0.3].var(0)[:4], mixture + (p * (1 - p) - mixture) / 64, rtol=0.15)
    np.testing.assert_allclose(counts[None].var(0)[:4], p * (1 - p) / 64, rtol=0.2)


def test_clients_share_no_key_with_the_rounds_of_the_same_seed():
    key = fed.virtual(LABELS, 10).key
    assert not (jax.random.key_data(key) == jax.random.key_data(jax.random.key(0))).all()
    assert (jax.random.key_data(key) == jax.random.key_data(fed.keys.population_key(jax.random.key(0)))).all()


def test_sizes_are_log_uniform():
    sizes = np.asarray(fed.virtual(LABELS, 10**6, sizes=(8, 512)).sizes_of(jnp.arange(20_000)))
    assert (sizes.min(), sizes.max()) == (8, 512)
    assert np.mean(sizes < 64) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"clients": 0}, "clients must be at least 1"),
        ({"clients": 2**31}, r"clients must be below 2\^31, got 2147483648"),
        ({"alpha": 0.0}, "alpha must be a positive finite number"),
        ({"sizes": (0, 5)}, r"sizes must be two numbers 1 ≤ fewest ≤ most < 2\^31, got 0, 5"),
        ({"sizes": (6, 5)}, "sizes must be two numbers"),
    ],
)
def test_populations_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        fed.virtual(LABELS, **({"clients": 10} | settings))


def test_a_population_of_other_data_is_refused():
    task, tx = linear_task(), hiso_jax.hiso(0.02)
    with pytest.raises(ValueError, match="population names example 3999; the task has 1437 training examples"):
        fed.Simulation(task, tx, fed.virtual(LABELS, 10), fed.SimulationConfig())
