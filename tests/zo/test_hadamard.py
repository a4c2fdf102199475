"""Rows of a randomised Hadamard matrix as directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

import hiso_jax
from hiso_jax import zo
from hiso_jax.stacked import Stacked
from hiso_jax.zo.hadamard import _Leaf, transform
from tests.marks import thorough

SMALL = zo.Hadamard(block=64)


def parameters():
    return {
        "bias": jnp.zeros(10),
        "number": jnp.zeros(()),
        "layers": Stacked({"w": jnp.zeros((3, 7, 9)), "b": jnp.zeros((3, 5))}),
        "matrix": jnp.zeros((32, 16)),
    }


def made(params, *, groups=1, count=8, family=SMALL, curvature=None):
    directions = zo.Directions(family, groups=groups)
    return zo.grouped_directions(directions, jax.random.key(7), 1, params, curvature, groups, count)


def dense(directions, count, groups=1):
    """The directions as an array [G, P, d]."""
    each = jax.jit(jax.vmap(directions.of))(jnp.arange(groups * count))
    return flat(each).reshape(groups, count, -1)


def vectors(params, clients, seed=0):
    source = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(source.normal(size=(clients, *x.shape)), x.dtype), params)


def flat(tree):
    """A tree of leaves [c, …] as an array [c, d]."""
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], 1)


@pytest.mark.parametrize("size", [2, 32, 256])
def test_transform_is_the_product_with_the_hadamard_matrix(size):
    x = np.random.default_rng(0).integers(-9, 9, (3, size)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(transform)(x), x @ hadamard(size))


def test_directions_are_signed_rows_of_the_matrix():
    leaf = _Leaf.of(jnp.zeros(100), 64, 40)
    drawn = jax.random.bits(jax.random.key(1), (4 + leaf.turns * leaf.words,), jnp.uint32)
    signs, rule = leaf.split(drawn)
    bits = np.asarray((signs[0][:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1).reshape(-1)[:100]
    rows = [int(leaf.row(rule, p)) for p in range(40)]
    assert len(set(rows)) == 40
    for p, row in enumerate(rows):
        expected = np.where(bits, -1, 1) * np.tile(hadamard(64)[row], 2)[:100]
        np.testing.assert_array_equal(leaf.direction(drawn, p), expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(5, 12))
def test_the_rows_of_one_d_are_distinct(seed, power):
    leaf = _Leaf.of(jnp.zeros(2**power), 2**power, 1)
    rule = jax.random.bits(jax.random.key(seed), (4,), jnp.uint32)
    assert len(np.unique(leaf.row(rule, jnp.arange(2**power)))) == 2**power


@pytest.mark.parametrize(("count", "groups"), [(100, 3), thorough(100, 1), thorough(8, 1), thorough(8, 3)])
def test_inner_products_and_sums_are_those_of_the_directions(groups, count, x64):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), parameters())
    curvature = jax.tree.map(lambda x: 1 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) / x.size, params)
    for h in (None, curvature):
        directions = made(params, groups=groups, count=count, curvature=h)
        z = dense(directions, count, groups)
        own, of = vectors(params, 4), np.arange(4) % groups
        products = jax.jit(directions.inner)(own, jnp.asarray(of))
        np.testing.assert_allclose(products, np.einsum("cd,cpd->cp", flat(own), z[of]), rtol=1e-9, atol=1e-9)
        scalars = np.random.default_rng(1).normal(size=(count, groups))
        delta = flat(jax.tree.map(lambda x: x[None], directions.delta(jnp.asarray(scalars))))[0]
        np.testing.assert_allclose(delta, np.einsum("pg,gpd->d", scalars, z) / scalars.size, rtol=1e-9, atol=1e-12)
        last = groups - 1
        jax.tree.map(np.testing.assert_array_equal, directions.of(count * last + 1), directions.at(1).of(last))


def test_a_leaf_without_padding_has_orthogonal_directions_and_a_padded_one_nearly():
    z = dense(made({"w": jnp.zeros((32, 16))}, count=64), 64)[0]
    np.testing.assert_array_equal(z @ z.T, 512 * np.eye(64))
    z = dense(made({"w": jnp.zeros(500)}, count=64), 64)[0]
    off = (z @ z.T)[~np.eye(64, dtype=bool)]
    # Independent signs would have inner products of about √500 = 22; with 12 missing coordinates they are at most 12.
    assert abs(off).max() <= 12


def test_the_second_moment_is_the_identity():
    params = {"w": jnp.zeros(40)}

    def outer(key):
        directions = zo.grouped_directions(zo.Directions(SMALL), key, 0, params, None, 1, 4)
        z = jnp.stack([directions.at(p).of(0)["w"] for p in range(4)])
        return z[2][:, None] * z[2][None]

    mean = jax.jit(lambda keys: jax.lax.map(outer, keys).mean(0))(jax.random.split(jax.random.key(3), 4000))
    np.testing.assert_allclose(mean, np.eye(40), atol=5.5 / np.sqrt(4000))


def test_rounds_steps_groups_and_leaves_have_their_own_signs():
    params = {"a": jnp.zeros(64), "b": jnp.zeros(64)}
    seen = set()
    for key in range(2):
        for step in range(2):
            grouped = zo.grouped_directions(
                zo.Directions(SMALL, groups=2), jax.random.key(key), step, params, None, 2, 3
            )
            for group in range(2):
                seen |= {bytes(np.asarray(grouped.at(0).of(group)[name])) for name in params}
    assert len(seen) == 16


def test_update_is_the_same_in_other_programs():
    params = parameters()
    tx = hiso_jax.hiso(0.1, sampler="hadamard")
    state, scalars, key = tx.init(params), jnp.ones((1, 40)) * jnp.arange(40), jax.random.key(2)

    def update(state, scalars):
        return tx.update(scalars, state, params, key=key)[0]

    alone = jax.jit(update)(state, scalars)
    inside = jax.jit(lambda s, x: jax.lax.map(lambda y: jax.tree.map(lambda u: u * 1, update(s, y)), x))(
        state, scalars[None]
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), alone, inside)


def test_a_step_learns_and_its_scalars_are_projections():
    target = jnp.linspace(-1, 1, 64)

    def loss(x, batch):
        return jnp.sum((x - batch) ** 2) / 2

    step = jax.jit(zo.step(loss, hiso_jax.decomfl(0.3, sampler="hadamard"), num_perturbations=32, mu=1e-3))
    params, state = jnp.zeros(64), hiso_jax.decomfl(0.3, sampler="hadamard").init(jnp.zeros(64))
    for r in range(20):
        params, state, value = step(params, state, target, jax.random.fold_in(jax.random.key(0), r))
    assert value < 0.05 * loss(jnp.zeros(64), target)


def test_refusals():
    with pytest.raises(ValueError, match="direction_blocks"):
        zo.Directions(zo.Hadamard(), groups=2, block=4)
    with pytest.raises(ValueError, match="pool"):
        zo.Directions(zo.Hadamard(), key=zo.in_order)
    with pytest.raises(ValueError, match="power of two"):
        zo.Hadamard(48)
    with pytest.raises(ValueError, match="single direction"):
        zo.direction(jax.random.key(0), parameters(), sampler="hadamard")
    step = zo.step(lambda x, b: x.sum(), hiso_jax.decomfl(0.1, sampler="hadamard"), directions="keep")
    with pytest.raises(ValueError, match="directions must be regenerate"):
        step(jnp.zeros(4), hiso_jax.decomfl(0.1, sampler="hadamard").init(jnp.zeros(4)), None, jax.random.key(0))
