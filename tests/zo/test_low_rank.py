"""Directions of low rank: their moments, their factors beside the weights, and a curvature of factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import zo
from hiso_jax.factored import PerturbedParameter, is_factors, product, take
from hiso_jax.stacked import Stacked

KEY = jax.random.key(7)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("family", [zo.gaussian, zo.rademacher])
def test_they_are_of_their_rank_and_uncorrelated(rank, family):
    """E[u uᵀ] = I, by the mean over many keys, within five standard errors of products of unit variance."""
    sampler, shape, count = zo.LowRank(rank, family), (5, 2, 4), 60_000
    draws = jax.jit(jax.vmap(lambda key: sampler(key, shape, jnp.float32)))(jax.random.split(KEY, count))
    # Signs may repeat themselves in two columns of a factor.
    assert max(np.linalg.matrix_rank(np.asarray(draws[:20]).reshape(20, 10, 4), tol=1e-5)) == rank
    flat = np.asarray(draws, np.float64).reshape(count, -1)
    # The fourth moment of a product of two normals is 9.
    np.testing.assert_allclose(flat.T @ flat / count, np.eye(40), atol=5 * np.sqrt(8 / count))
    np.testing.assert_allclose(flat.mean(0), 0, atol=5 / np.sqrt(count))


def test_what_is_no_matrix_is_drawn_as_its_family_draws():
    params = {"bias": jnp.zeros(9), "thin": jnp.zeros((9, 2)), "matrix": jnp.zeros((9, 4))}
    z, plain = zo.Directions(zo.LowRank(2)).at(KEY, 0, 0, params), zo.Directions().at(KEY, 0, 0, params)
    assert [is_factors(z[name]) for name in ("bias", "thin", "matrix")] == [False, False, True]
    for name in ("bias", "thin"):
        np.testing.assert_array_equal(z[name], plain[name])
    np.testing.assert_array_equal(
        zo.direction(zo.perturbation_key(KEY, 0, 0), params, sampler="low_rank")["bias"], z["bias"]
    )
    with pytest.raises(ValueError, match="rank must be at least 1"):
        zo.LowRank(0)


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.usefixtures("x64")
def test_a_moved_weight_multiplies_as_the_one_that_is_made_whole(rank):
    keys = jax.random.split(KEY, 3)
    weight, along = jax.random.normal(keys[0], (12, 7)), zo.LowRank(rank).factors(keys[1], (12, 7), jnp.float64)
    moved = PerturbedParameter(weight, along, jnp.float64(0.3))
    whole = np.asarray(weight) + 0.3 * np.asarray(along.rows @ along.columns.T)
    inputs, outputs = jax.random.normal(keys[2], (2, 5, 12)), jax.random.normal(keys[2], (5, 7))
    numbers = jnp.array([3, 0, 3])
    np.testing.assert_allclose(moved.dense(), whole, atol=1e-12)
    np.testing.assert_allclose(product(inputs, moved), np.asarray(inputs) @ whole, atol=1e-12)
    np.testing.assert_allclose(product(outputs, moved, transposed=True), np.asarray(outputs) @ whole.T, atol=1e-12)
    np.testing.assert_allclose(take(moved, numbers), whole[[3, 0, 3]], atol=1e-12)
    np.testing.assert_allclose(take(moved, numbers, axis=1), whole[:, [3, 0, 3]], atol=1e-12)
    dense = PerturbedParameter(weight, along.dense(), jnp.float64(0.3))
    np.testing.assert_allclose(take(dense, numbers), whole[[3, 0, 3]], atol=1e-12)
    np.testing.assert_allclose(product(inputs, dense), np.asarray(inputs) @ whole, atol=1e-12)


PARAMS = {"bias": jnp.zeros(6), "layers": Stacked({"w": jnp.zeros((3, 8, 6)), "b": jnp.zeros((3, 6))})}


@pytest.mark.thorough
@pytest.mark.parametrize(("perturbations", "rank"), [(1, 1), (5, 1), (3, 2), (9, 2)])
@pytest.mark.usefixtures("x64")
def test_the_step_is_the_sum_of_its_directions(perturbations, rank):
    """The sum is right for more terms than are added in one pass, too."""
    params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    sampler, scalars = zo.LowRank(rank), jax.random.normal(KEY, (perturbations,), jnp.float64)
    delta = zo.accumulate(KEY, scalars, params, sampler=sampler)
    z = [zo.direction(zo.perturbation_key(KEY, 0, p), params, sampler=sampler) for p in range(perturbations)]
    expected = jax.tree.map(
        lambda *each: sum(g * u for g, u in zip(np.asarray(scalars), each, strict=True)) / perturbations, *z
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), delta, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("groups", [3, 40])
def test_groups_flip_rows_and_stay_of_low_rank(groups):
    """Every group's direction has the same rank and the same |z|, and correlates with no other group's."""
    perturbations, params = 2, {"w": jnp.zeros((64, 5)), "b": jnp.zeros(64)}
    deal = zo.GroupedDirections(
        zo.Directions(zo.LowRank(), groups=groups, block=2), KEY, 0, params, None, groups, perturbations
    )
    each = [np.asarray(zo.made_dense(deal.at(1).of(g))["w"]) for g in range(groups)]
    assert {np.linalg.matrix_rank(z, tol=1e-5) for z in each} == {1}
    for z in each[1:]:
        np.testing.assert_array_equal(np.abs(z), np.abs(each[0]))
        ratio = z / each[0]
        assert np.all(ratio == ratio[:, :1])
    signs = np.stack([(z / each[0])[:, 0] for z in each])
    assert np.abs(signs @ signs.T / 64 - np.eye(groups))[~np.eye(groups, dtype=bool)].max() < 5 / np.sqrt(64)
    scalars = jax.random.normal(KEY, (groups * perturbations,))
    delta = zo.accumulate(KEY, scalars, params, sampler=deal.directions, groups=groups)
    for name in params:
        z = [np.asarray(zo.made_dense(deal.of(q))[name], np.float64) for q in range(groups * perturbations)]
        np.testing.assert_allclose(delta[name], np.tensordot(np.asarray(scalars), np.stack(z), 1) / len(z), atol=2e-5)


@pytest.mark.thorough
def test_factored_curvature_is_what_its_formula_says(x64):
    """The formula: r, c ← EMAs of the means of Δ² + ε over columns and rows, and H = r cᵀ / mean(r); here in NumPy."""
    decay, eps, rounds, perturbations = 0.9, 1e-3, 4, 3
    params = {"w": jnp.zeros((4, 3, 5), jnp.float64), "b": jnp.zeros(5, jnp.float64)}
    tx = zo.scale_by_hiso(decay=decay, eps=eps, sampler=zo.LowRank())
    state, r, c, h = tx.init(params), np.ones(12), np.ones(5), np.ones(5)
    for number in range(rounds):
        key, scalars = jax.random.fold_in(KEY, number), np.linspace(-1, 2, perturbations) + number
        updates, state = tx.update(jnp.asarray(scalars)[None], state, params, key=key)
        delta, bias = np.zeros((12, 5)), np.zeros(5)
        for p, g in enumerate(scalars):
            u = zo.Directions(zo.LowRank()).at(key, 0, p, params)
            raw = np.asarray(u["w"].rows) @ np.asarray(u["w"].columns).T
            delta += g / perturbations * raw / np.sqrt(np.outer(r, c) / r.mean())
            bias += g / perturbations * np.asarray(u["b"]) / np.sqrt(h)
        np.testing.assert_allclose(updates["w"].reshape(12, 5), delta, rtol=1e-9)
        np.testing.assert_allclose(updates["b"], bias, rtol=1e-9)
        r = decay * r + (1 - decay) * ((delta**2).mean(1) + eps)
        c = decay * c + (1 - decay) * ((delta**2).mean(0) + eps)
        h = decay * h + (1 - decay) * (bias**2 + eps)
        np.testing.assert_allclose(
            zo.made_dense(state.curvature)["w"].reshape(12, 5), np.outer(r, c) / r.mean(), rtol=1e-9
        )
        np.testing.assert_allclose(state.curvature["b"], h, rtol=1e-9)


@pytest.mark.thorough
def test_a_curvature_has_the_form_that_is_asked_for():
    def forms(**options):
        curvature = zo.scale_by_hiso(**options).init(PARAMS).curvature
        return [is_factors(leaf) for leaf in jax.tree.leaves(curvature, is_leaf=is_factors)]

    assert forms() == forms(curvature_form="diagonal", sampler="low_rank") == [False] * 3
    assert forms(sampler="low_rank") == forms(curvature_form="factored") == [False, False, True]
    kept = zo.scale_by_hiso(decay=1.0, curvature_form="factored")
    state = kept.init(PARAMS)
    _, after = kept.update(jnp.ones((1, 2)), state, PARAMS, key=KEY)
    for h in jax.tree.leaves(after.curvature):
        np.testing.assert_array_equal(h, 1)


def test_another_form_of_curvature_is_refused():
    with pytest.raises(ValueError, match="curvature_form must be 'diagonal' or 'factored', got 'full'"):
        zo.scale_by_hiso(curvature_form="full")


@pytest.mark.thorough
def test_one_device_trains_with_them_and_keeps_or_makes_them_again():
    """The optimizer solves a least-squares problem whose model reads a perturbed weight."""
    inputs = jax.random.normal(KEY, (64, 12))
    answers = inputs @ jax.random.normal(jax.random.fold_in(KEY, 1), (12, 4))

    def loss(params, batch):
        return ((product(batch[0], params["w"]) - batch[1]) ** 2).mean()

    runs = []
    for mode in ("keep", "regenerate"):
        tx = hiso_jax.hiso(0.01, sampler="low_rank")
        step = jax.jit(zo.step(loss, tx, directions=mode, perturbed_as=lambda name: "matrix"))
        params = {"w": jnp.zeros((12, 4))}
        state, first = tx.init(params), loss(params, (inputs, answers))
        for number in range(150):
            params, state, last = step(params, state, (inputs, answers), jax.random.fold_in(KEY, number))
        assert last < 0.5 * first
        runs.append((params, state))
    jax.tree.map(np.testing.assert_array_equal, *runs)
