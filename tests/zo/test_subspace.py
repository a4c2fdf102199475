"""Directions in subspaces: orthonormal bases, the same for scanned layers, which a head holds for some rounds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiso_jax import algorithms, fed, zo
from hiso_jax.stacked import Stacked
from tests.fed.problems import assert_trees_identical, digits_population, linear_task

KEY = jax.random.key(3)
PARAMS = {"b": jnp.zeros(5), "k": jnp.zeros((2, 3, 6)), "w": jnp.zeros((7, 4))}


def test_bases_are_orthonormal_and_of_the_last_axis():
    bases = zo.subspaces(KEY, PARAMS, 4)
    assert {name: basis.shape for name, basis in bases.items()} == {"b": (), "k": (6, 4), "w": (4, 4)}
    for name in ("k", "w"):
        np.testing.assert_allclose(bases[name].T @ bases[name], np.eye(4), atol=1e-6)


def test_bases_are_uniform():
    """The mean projection on a random plane of four dimensions is half the identity."""
    keys = jax.random.split(KEY, 4000)
    q = jax.vmap(lambda key: zo.subspaces(key, {"w": jnp.zeros((3, 4))}, 2)["w"])(keys)
    mean = np.asarray(jnp.einsum("sij,skj->ik", q, q) / 4000)
    np.testing.assert_allclose(mean, np.eye(4) / 2, atol=5 * 0.3 / np.sqrt(4000))
    # Without the signs of the triangle's diagonal its first entry would have one sign only.
    assert abs(np.mean(np.asarray(q[:, 0, 0]) > 0) - 0.5) < 5 * 0.5 / np.sqrt(4000)


@pytest.mark.thorough
def test_a_direction_lies_in_its_subspace_and_is_as_long_as_that_allows():
    bases = zo.subspaces(KEY, PARAMS, 2)
    family = zo.Subspace(2)

    def lengths(key):
        z = zo.direction(key, PARAMS, bases, family)
        q = bases["w"]
        return z["w"] - z["w"] @ q @ q.T, (z["w"] ** 2).sum(), (z["k"] ** 2).sum(), (z["b"] ** 2).sum()

    outside, *squares = jax.vmap(lengths)(jax.random.split(KEY, 2000))
    assert float(jnp.abs(outside).max()) < 1e-5
    for found, degrees in zip(squares, (7 * 2, 6 * 2, 5), strict=True):
        assert abs(float(found.mean()) - degrees) < 5 * np.sqrt(2 * degrees / 2000)


def test_scanned_layers_have_the_bases_of_layers_by_themselves():
    layers = [{"w": jnp.zeros((3, 5))} for _ in range(3)]
    stacked = Stacked({"w": jnp.zeros((3, 3, 5))})
    alone, together = zo.subspaces(KEY, layers, 2), zo.subspaces(KEY, stacked, 2)
    for number, layer in enumerate(alone):
        np.testing.assert_allclose(together.layers["w"][number], layer["w"], atol=1e-6)


def test_without_a_head_that_holds_the_bases_it_is_refused():
    with pytest.raises(ValueError, match="sampler must not be a Subspace without a head that keeps its bases"):
        zo.direction(KEY, PARAMS, None, zo.Subspace(2))
    with pytest.raises(ValueError, match="sampler must not be a Subspace because the head keeps a curvature"):
        zo.scale_by_hiso(sampler=zo.Subspace(2)).init(PARAMS)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        zo.Subspace(0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["zo_muon", "zo_mopi"])
def test_a_subspace_is_held_and_then_another(name):
    method = getattr(algorithms, name)(0.02, rank=2, hold_rounds=3)
    config = fed.SimulationConfig(rounds=7, cohort=4, batch_size=8, eval_every=7)
    held = []

    def note(session, evaluation):
        if session.round:
            held.append(jax.tree.map(np.asarray, zo.zo_state(session.state).curvature))

    one = fed.SimulationConfig(rounds=7, cohort=4, batch_size=8, eval_every=7, rounds_per_dispatch=1)
    fed.Simulation(linear_task(), method, digits_population(), one, callbacks=[fed.Callback(note)]).run()
    assert len(held) == 7
    same = [
        all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in itertools.pairwise(held)
    ]
    # New bases follow after rounds 3 and 6.
    assert same == [True, False, True, True, False, True]
    result = fed.Simulation(linear_task(), method, digits_population(), config).run()
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, method, result.records))
