"""Groups of directions: signs of blocks of the same draws, their moments, and Δ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import zo
from hiso_jax.stacked import Stacked
from tests.fed.problems import assert_trees_identical
from tests.marks import slow

KEY = jax.random.key(5)
PARAMS = {"a": jnp.zeros((6, 16)), "b": jnp.zeros(33)}


def deal(groups, *, block=8, params=PARAMS, perturbations=3, key=KEY, sampler=zo.gaussian):
    directions = zo.Directions(sampler, groups=groups, block=block)
    return zo.GroupedDirections(directions, key, 0, params, None, groups, perturbations)


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


def test_the_first_group_has_the_directions_of_an_undivided_cohort():
    assert_trees_identical(deal(4).at(1).of(0), deal(1).at(1).of(0))
    assert_trees_identical(deal(4, block=0).at(1).of(0), deal(1).at(1).of(0))


def test_a_group_flips_whole_blocks_inside_a_leaf():
    whole, own = deal(40).at(0).of(0), deal(40).at(0).of(37)
    for leaf in PARAMS:
        signs = np.asarray(own[leaf] / whole[leaf]).reshape(-1)
        assert set(signs) == {1.0, -1.0}
        blocks = [set(signs[begin : begin + 8]) for begin in range(0, len(signs), 8)]
        assert all(len(block) == 1 for block in blocks)


@pytest.mark.thorough
def test_every_layer_of_a_stack_has_the_signs_that_it_would_have_alone():
    stacked = {"w": Stacked({"x": jnp.zeros((3, 5, 4)), "y": jnp.zeros((3, 7))})}
    alone = {"w": stacked["w"].unstacked()}
    own = deal(3, block=4, params=stacked).at(2).of(2)
    assert_trees_identical(own["w"].unstacked(), deal(3, block=4, params=alone).at(2).of(2)["w"])


def test_what_is_split_over_devices_has_the_same_signs(monkeypatch):
    """One device draws with the layout of a partitioned program."""
    expected = deal(5).at(0).of(3)
    monkeypatch.setattr("hiso_jax.zo.signs.is_partitioned", lambda: True)
    np.testing.assert_array_equal(flat(deal(5).at(0).of(3)), flat(expected))


def test_moments_of_the_groups_directions():
    """E[z zᵀ] = I in every group, and directions of different groups are uncorrelated, also in the same blocks."""
    groups, params = 3, {"w": jnp.zeros(6)}

    @jax.jit
    @jax.vmap
    def draw(key):
        direction = deal(groups, block=2, params=params, key=key).at(0)
        return jnp.concatenate([direction.of(g)["w"] for g in range(groups)])

    z = np.asarray(draw(jax.random.split(KEY, 40_000)), np.float64)
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(18), atol=0.04)
    np.testing.assert_allclose(z.mean(0), 0, atol=0.03)


@pytest.mark.thorough
@pytest.mark.parametrize(("groups", "block"), [(4, 16), *(slow(*case) for case in [(4, 1), (4, 4), (2, 4)])])
def test_the_floor_of_shared_draws_is_the_one_that_is_stated(groups, block):
    """E‖Δ‖² / ‖∇f‖² = d/(G·P) + (1 − 1/G)(B + 1)/P + 1 of a linear function, whose scalars are exact."""
    size, perturbations = 64, 2
    gradient = jax.random.normal(jax.random.key(1), (size,))

    @jax.jit
    @jax.vmap
    def squared(key):
        own = deal(groups, block=block, params=jnp.zeros(size), perturbations=perturbations, key=key)
        numbers = jnp.stack([own.of(q) @ gradient for q in range(groups * perturbations)])
        delta = zo.accumulate(key, numbers, jnp.zeros(size), sampler=own.directions)
        return jnp.sum(delta**2)

    expected = size / (groups * perturbations) + (1 - 1 / groups) * (block + 1) / perturbations + 1
    measured = squared(jax.random.split(KEY, 6000)).mean() / jnp.sum(gradient**2)
    assert measured == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("groups", "block"), [(3, 8), (3, 0), *(slow(*case) for case in [(1, 8), (40, 8)])])
def test_delta_is_the_mean_over_groups_and_directions(groups, block):
    own = deal(groups, block=block)
    numbers = jax.random.normal(jax.random.key(2), (groups * 3,))
    delta = zo.accumulate(KEY, numbers, PARAMS, sampler=own.directions)
    of = jax.jit(own.of)
    each = [float(number) * flat(of(q)) for q, number in enumerate(numbers)]
    np.testing.assert_allclose(flat(delta), sum(each) / (3 * groups), atol=1e-5)


def test_a_block_is_a_power_of_two_that_keeps_the_floor_low():
    assert zo.block_size(PARAMS, 1) == 16
    assert zo.block_size({"w": jax.ShapeDtypeStruct((10**6,), jnp.float32)}, 10) == 64
    assert zo.block_size({"w": jnp.zeros(10)}, 10) == 1


@pytest.mark.thorough
def test_a_bare_optimizer_takes_the_scalars_of_groups():
    tx = zo.grouped(hiso_jax.hiso(0.1), groups=None)
    state, numbers = tx.init(PARAMS), jnp.ones((2, 6))
    updates, _ = tx.update(numbers, state, PARAMS, key=KEY, clients=2)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
    with pytest.raises(ValueError, match="need clients="):
        tx.update(numbers, state, PARAMS, key=KEY)
    with pytest.raises(ValueError, match="multiple of the 4 groups, got 6"):
        tx.update(numbers, state, PARAMS, key=KEY, clients=4)
    with pytest.raises(ValueError, match="groups must be at most the clients of a round, 3, got 4"):
        zo.Directions(groups=4).groups_of(3)


@pytest.mark.parametrize("wrong", [{"groups": 0}, {"block": -1}])
def test_groups_and_blocks_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
        zo.Directions(**wrong)
