"""Keys, raw perturbations and directions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiso_jax import fed, zo

SAMPLERS = {"gaussian": zo.gaussian, "rademacher": zo.rademacher, "binomial": zo.binomial, "sphere": zo.sphere}
DRAWS = 40_000


@pytest.mark.thorough
@pytest.mark.parametrize("name", SAMPLERS)
@given(shape=st.sampled_from([(1,), (2, 3), (33,), (2, 2, 2)]), seed=st.integers(0, 2**31 - 1))
def test_second_moment_is_the_identity(name, shape, seed):
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    u = jax.vmap(lambda key: SAMPLERS[name](key, shape, jnp.float32))(keys).reshape(DRAWS, -1)
    d = u.shape[1]
    moment = np.asarray(u.T @ u) / DRAWS
    # Each entry of the moment is a mean over DRAWS terms whose variance is at most 2 (a squared normal's).
    assert np.abs(moment - np.eye(d)).max() < 6 * np.sqrt(2 / DRAWS)
    assert np.abs(np.asarray(u.mean(0))).max() < 6 / np.sqrt(DRAWS)


def test_sphere_has_radius_root_d_and_rademacher_is_signs():
    u = zo.sphere(jax.random.key(0), (7, 11), jnp.float32)
    np.testing.assert_allclose(jnp.linalg.norm(u), np.sqrt(77), rtol=1e-6)
    signs = zo.rademacher(jax.random.key(0), (5, 13), jnp.float32)
    assert set(np.unique(signs)) == {-1.0, 1.0}


@pytest.mark.parametrize("size", [1, 31, 32, 33, 400])
def test_signs_are_the_bits_of_words_the_lowest_first(size):
    key = jax.random.key(3)
    words = np.asarray(jax.random.bits(key, (-(-size // 32),), jnp.uint32))
    bits = [(int(word) >> place) & 1 for word in words for place in range(32)]
    np.testing.assert_array_equal(zo.rademacher(key, (size,), jnp.float32), 1.0 - 2.0 * np.array(bits[:size]))


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4)])
def test_gaussian_draws_what_jax_draws(shape):
    key = jax.random.key(5)
    np.testing.assert_array_equal(zo.gaussian(key, shape, jnp.float32), jax.random.normal(key, shape, jnp.float32))


def test_a_leaf_draws_from_its_own_key_in_the_wider_dtype(x64):
    params = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(4), "c": jnp.zeros(2, jnp.float64)}
    key = jax.random.key(1)
    z = zo.direction(key, params)
    assert [leaf.dtype for leaf in jax.tree.leaves(z)] == [jnp.float32, jnp.float64, jnp.float64]
    expected = jax.random.normal(jax.random.fold_in(key, 0), (2, 3), jnp.float32)
    np.testing.assert_array_equal(z["a"], expected)


def test_curvature_shapes_the_direction():
    params = jnp.zeros(5)
    curvature = jnp.array([1.0, 4.0, 0.25, 9.0, 1.0])
    key = jax.random.key(2)
    np.testing.assert_allclose(
        zo.direction(key, params, curvature), zo.direction(key, params) / jnp.sqrt(curvature), rtol=1e-6
    )


def test_perturb_adds_before_it_rounds():
    params = jnp.full(1000, 0.04, jnp.bfloat16)
    z = jnp.full(1000, 1.0)
    moved = zo.perturb(params, z, 1e-3)
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved, (params.astype(jnp.float32) + 1e-3).astype(jnp.bfloat16))


@given(seed=st.integers(0, 2**31 - 1), first=st.integers(0, 2**31 - 60))
def test_keys_do_not_collide(seed, first):
    """Rounds, steps, perturbations and leaves each have their own key, apart from data, cohort and init keys."""
    seed_key = jax.random.key(seed)
    rounds, steps, perturbations, leaves = jnp.arange(first, first + 12), jnp.arange(4), jnp.arange(5), jnp.arange(6)

    def of_round(r):
        round_key = fed.round_key(seed_key, r)

        def of_leaf(k, p, leaf):
            return jax.random.fold_in(zo.perturbation_key(round_key, k, p), leaf)

        grid = jax.vmap(jax.vmap(jax.vmap(of_leaf, (None, None, 0)), (None, 0, None)), (0, None, None))
        per_perturbation = jax.vmap(jax.vmap(lambda k, p: zo.perturbation_key(round_key, k, p), (None, 0)), (0, None))
        others = [round_key, fed.data_key(seed_key, r), fed.cohort_key(seed_key, r)]
        parts = [grid(steps, perturbations, leaves), per_perturbation(steps, perturbations), jnp.stack(others)]
        return jnp.concatenate([jax.random.key_data(part).reshape(-1, 2) for part in parts])

    words = np.concatenate(
        [
            np.asarray(jax.vmap(of_round)(rounds)).reshape(-1, 2),
            np.asarray(jax.random.key_data(jnp.stack([seed_key, fed.init_key(seed_key)]))),
        ]
    )
    assert len(np.unique(words, axis=0)) == len(words)


def test_binomial_numbers_are_of_sixteen_coins():
    u = np.asarray(zo.binomial(jax.random.key(0), (333, 301), jnp.float32)).ravel()
    values, counts = np.unique(u, return_counts=True)
    np.testing.assert_array_equal(values * 2, np.round(values * 2))
    expected = np.array([math.comb(16, int(2 * value + 8)) for value in values]) / 2**16 * u.size
    # Pearson's statistic, of about 16 degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 16 + 6 * np.sqrt(2 * 16)


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "binomial"])
def test_neighbours_and_keys_do_not_correlate(name):
    """The pairs are neighbours in a row and a column, halves of one word, and draws of neighbouring keys."""
    size = 2**18
    keys = [jax.random.fold_in(jax.random.key(1), number) for number in range(2)]
    u, other = (np.asarray(SAMPLERS[name](key, (512, 512), jnp.float32)) for key in keys)
    flat, other = u.ravel(), other.ravel()
    pairs = [(flat[:-shift], flat[shift:]) for shift in (1, 2, 16, 32, 512, size // 2)]
    for left, right in [*pairs, (flat, other), (flat[1:], other[:-1])]:
        assert abs(np.mean(left * right)) < 5 / np.sqrt(len(left))
