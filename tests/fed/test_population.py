"""Partitions are exact covers, and clients draw from their own data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiso_jax import fed
from tests.marks import thorough


def build(kind, labels, clients, seed, alpha=0.3, shards=2):
    if kind == "iid":
        return fed.iid(len(labels), clients, seed=seed)
    if kind == "shards":
        return fed.shards(labels, clients, shards_per_client=shards, seed=seed)
    return fed.dirichlet(labels, clients, alpha=alpha, seed=seed)


@given(
    kind=st.sampled_from(["iid", "dirichlet", "shards"]),
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    share=st.floats(0, 1),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 1e4]),
    shards=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_no_example_is_lost_and_no_client_is_empty(kind, labels, share, alpha, shards, seed):
    labels = np.array(labels)
    clients = max(1, round(share * len(labels)))
    population = build(kind, labels, clients, seed, alpha, shards)
    assert population.num_clients == clients
    np.testing.assert_array_equal(np.sort(population.indices), np.arange(len(labels)))
    assert (population.sizes >= 1).all()
    assert population.offsets[0] == 0
    assert population.offsets[-1] == len(labels)
    again = build(kind, labels, clients, seed, alpha, shards)
    np.testing.assert_array_equal(population.indices, again.indices)


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    share=st.floats(0, 1),
    alpha=st.sampled_from([1e-2, 1.0, 1e3]),
    seed=st.integers(0, 100),
)
def test_balanced_clients_hold_equally_many_and_nothing_twice(labels, share, alpha, seed):
    clients = max(1, round(share * len(labels)))
    population = fed.dirichlet_balanced(np.array(labels), clients, alpha=alpha, seed=seed)
    assert set(population.sizes.tolist()) == {len(labels) // clients}
    assert len(set(population.indices.tolist())) == len(population.indices) == len(labels) // clients * clients


def test_balancing_keeps_what_it_can_of_the_heterogeneity():
    labels = np.arange(4000) % 4
    largest = {}
    for alpha in (0.1, 1e4):
        population = fed.dirichlet_balanced(labels, 8, alpha=alpha)
        held = np.split(labels[population.indices], population.offsets[1:-1])
        largest[alpha] = np.mean([np.bincount(own, minlength=4).max() / len(own) for own in held])
    assert largest[0.1] > 0.4
    assert largest[1e4] < 0.3


def test_iid_shares_differ_by_at_most_one():
    sizes = fed.iid(103, 10).sizes
    assert sizes.max() - sizes.min() == 1


def label_distance(population, labels):
    """Mean total variation between the clients' label mixtures and the population's."""
    whole = np.bincount(labels, minlength=10) / len(labels)
    parts = np.split(np.asarray(population.indices), np.asarray(population.offsets)[1:-1])
    return np.mean([0.5 * np.abs(np.bincount(labels[p], minlength=10) / len(p) - whole).sum() for p in parts])


def test_alpha_and_shards_set_how_heterogeneous_the_clients_are():
    labels = np.random.default_rng(0).integers(0, 10, 20_000)
    far, middle, near = (fed.dirichlet(labels, 50, alpha=alpha) for alpha in (0.05, 0.5, 1e4))
    assert label_distance(far, labels) > label_distance(middle, labels) + 0.1
    assert label_distance(middle, labels) > label_distance(near, labels) + 0.1
    assert label_distance(near, labels) < 0.06
    two = fed.shards(labels, 50, shards_per_client=2)
    parts = np.split(np.asarray(two.indices), np.asarray(two.offsets)[1:-1])
    assert max(len(np.unique(labels[part])) for part in parts) <= 4


def test_a_client_draws_uniformly_from_its_own_examples():
    population = fed.dirichlet(np.random.default_rng(1).integers(0, 3, 60), 5, alpha=1.0)
    clients = jnp.array([3, 0, 4])
    drawn = np.asarray(population.sample(jax.random.key(2), clients, (2, 4000)))
    assert drawn.shape == (3, 2, 4000)
    for row, client in zip(drawn, clients, strict=True):
        own = np.asarray(population.indices[population.offsets[client] : population.offsets[client + 1]])
        counts = np.bincount(row.reshape(-1), minlength=60)
        assert set(np.flatnonzero(counts)) == set(own)
        expected = row.size / len(own)
        assert np.abs(counts[own] - expected).max() < 6 * np.sqrt(expected)


@pytest.mark.thorough
def test_a_draw_does_not_depend_on_the_place_in_the_cohort():
    population, key = fed.iid(100, 10), jax.random.key(0)
    one = population.sample(key, jnp.array([7, 2, 5]), (3, 8))
    other = population.sample(key, jnp.array([5, 7]), (3, 8))
    np.testing.assert_array_equal(one[0], other[1])
    np.testing.assert_array_equal(one[2], other[0])


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards"])
@pytest.mark.parametrize(("clients", "sentence"), [(11, "clients must be at most"), (0, "clients must be at least 1")])
def test_more_clients_than_examples_are_refused(kind, clients, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(kind, np.arange(10) % 3, clients, 0)


def test_other_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="alpha must be a positive finite number, got 0"):
        fed.dirichlet(np.zeros(4, int), 2, alpha=0)
    with pytest.raises(ValueError, match="shards_per_client must be at least 1, got 0"):
        fed.shards(np.zeros(4, int), 2, shards_per_client=0)


@pytest.mark.parametrize(
    ("indices", "offsets", "sentence"),
    [
        ([0, 1, 2], [0, 1, 1, 3], "client 1 has no example"),
        ([0, 1, 2], [0, 2, 1, 3], "client 1 has offsets that decrease"),
        ([0, 1, 2], [-1, 2, 3], "offsets must begin at 0 and end at the number of indices, 3, .* got -1 and 3"),
        ([0, 1, 2], [0, 2, 4], "offsets must begin at 0 and end at the number of indices, 3, .* got 0 and 4"),
        ([0, 1, 2], [0, 2], "got 0 and 2"),
        ([0, 1, 2], [0], "an entry more than there are clients"),
        ([0, 1, 2], [0.0, 3.0], "offsets must be one-dimensional integers, got float64"),
        ([[0, 1, 2]], [0, 1], "indices must be one-dimensional integers"),
        ([0, 1, 9], [0, 3], "population names example 9; the task has 3"),
    ],
)
def test_a_partition_that_is_none_is_refused(indices, offsets, sentence):
    population = fed.Population(np.array(indices), np.array(offsets))
    with pytest.raises(ValueError, match=sentence):
        population.check(3)


@pytest.mark.parametrize("deal", [fed.dirichlet, fed.dirichlet_balanced, thorough(fed.virtual)])
def test_labels_in_a_list_are_those_of_an_array(deal):
    labels = np.random.default_rng(0).integers(0, 3, 40)
    array, listed = (deal(given, 4, alpha=1.0) for given in (labels, labels.tolist()))
    named = deal(np.array(["ann", "bo", "cy"])[labels].tolist(), 4, alpha=1.0)
    drawn = [each.sample(jax.random.key(0), jnp.arange(4), (2, 8)) for each in (array, listed, named)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0.0, 1.0, float("nan"), 1.0], "labels must be finite numbers; that of example 2 is not"),
        (["cat", 1, "dog", 2], "labels must be one value for each example, all .*; got int and str"),
        (np.zeros((4, 2)), r"labels must be one value for each example, all .*; got float64 of shape \(4, 2\)"),
    ],
)
@pytest.mark.parametrize("deal", [fed.dirichlet, fed.shards, fed.virtual])
def test_labels_that_are_none_are_refused(deal, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        deal(labels, 2, **({"alpha": 1.0} if deal is fed.dirichlet else {}))


def test_a_seed_of_more_than_32_bits_is_refused():
    """Such a seed would lose its upper bits."""
    with pytest.raises(ValueError, match="seed must be below 4294967296"):
        fed.virtual(np.arange(4), 2, seed=2**32)


def test_lists_are_a_population_too():
    population = fed.Population([0, 1, 2, 3], [0, 1, 4])
    assert (population.num_clients, population.sizes.tolist()) == (2, [1, 3])
    population.check(4)
