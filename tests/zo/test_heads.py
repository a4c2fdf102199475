"""The optax transformations over scalars."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import zo
from tests.marks import thorough

KEY = jax.random.key(7)


def params_of(dtype=jnp.float32):
    return {"a": jnp.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3), "b": {"c": jnp.ones(4, dtype)}}


def by_the_formulas(scalars, curvature, key, params, sampler, decay, eps, update):
    """Σ_k Δ_k and the next H, written from the formulas in NumPy float64."""
    steps, perturbations = scalars.shape
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    h = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(curvature)]
    deltas = []
    for k in range(steps):
        delta = [np.zeros_like(leaf) for leaf in leaves]
        for p in range(perturbations):
            perturbation = jax.random.fold_in(jax.random.fold_in(key, k), p)
            for i, leaf in enumerate(leaves):
                u = np.asarray(sampler(jax.random.fold_in(perturbation, i), leaf.shape, jnp.float64))
                delta[i] = delta[i] + scalars[k, p] * u / np.sqrt(h[i]) / perturbations
        deltas.append(delta)
    total = [sum(delta[i] for delta in deltas) for i in range(len(leaves))]
    for delta in deltas if update == "all" else deltas[-1:]:
        h = [decay * old + (1 - decay) * (d * d + eps) for old, d in zip(h, delta, strict=True)]
    return total, h


@pytest.mark.parametrize("update", ["last", "all"])
@pytest.mark.parametrize(("steps", "perturbations"), [(1, 1), (3, 4)])
@pytest.mark.parametrize("sampler", [zo.gaussian, zo.rademacher, zo.sphere])
def test_update_follows_the_formulas(update, steps, perturbations, sampler, x64):
    params = params_of(jnp.float64)
    tx = hiso_jax.scale_by_hiso(decay=0.9, eps=1e-3, curvature_update=update, sampler=sampler)
    state = tx.init(params)
    for r in range(3):
        key = jax.random.fold_in(KEY, r)
        scalars = np.random.default_rng(r).normal(size=(steps, perturbations))
        curvature = optax.tree.get(state, "curvature")
        expected, expected_h = by_the_formulas(scalars, curvature, key, params, sampler, 0.9, 1e-3, update)
        updates, state = jax.jit(tx.update)(jnp.asarray(scalars), state, params, key=key)
        for value, reference in zip(jax.tree.leaves(updates), expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-12, atol=1e-13)
        for value, reference in zip(jax.tree.leaves(state.curvature), expected_h, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-12)
    assert int(state.rounds) == 3


@pytest.mark.thorough
def test_expectation_of_squared_direction():
    """E[Δ²] = ∇ᵀH⁻¹∇ / (P H) + (1 + 1/P) ∇² / H² for exact directional derivatives."""
    gradient, h, perturbations = jnp.array([1.0, -2.0, 0.5]), jnp.array([1.0, 4.0, 0.5]), 3

    def squared(key):
        z = jax.vmap(lambda p: zo.direction(zo.perturbation_key(key, 0, p), h, h))(jnp.arange(perturbations))
        return zo.accumulate(key, z @ gradient, h, curvature=h) ** 2

    draws = jax.vmap(squared)(jax.random.split(KEY, 200_000))
    expected = (gradient**2 / h).sum() / (perturbations * h) + (1 + 1 / perturbations) * gradient**2 / h**2
    deviation = draws.std(0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - expected) < 6 * deviation)


def long_chain():
    return optax.chain(
        hiso_jax.scale_by_hiso(decay=0.95),
        optax.clip_by_global_norm(1.0),
        optax.trace(0.9),
        optax.add_decayed_weights(5e-4, mask={"a": True, "b": False}),
        optax.scale_by_adam(),
        optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, 100)),
        optax.scale(-1e-2),
    )


@pytest.mark.slow
def test_head_of_a_long_chain_under_jit_vmap_and_scan():
    tx, params = long_chain(), params_of()
    scalars = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 3)), jnp.float32)
    keys = jax.vmap(lambda r: jax.random.fold_in(KEY, r))(jnp.arange(8))

    def step(carry, inputs):
        params, state = carry
        updates, state = tx.update(inputs[0], state, params, key=inputs[1])
        return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    for r in range(8):
        carry, _ = jax.jit(step)(carry, (scalars[r], keys[r]))
    scanned, _ = jax.jit(lambda c: jax.lax.scan(step, c, (scalars, keys)))((params, tx.init(params)))
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    curvature = optax.tree.get(scanned[1], "curvature")
    assert jax.tree.structure(curvature) == jax.tree.structure(params)
    assert all((leaf > 0).all() for leaf in jax.tree.leaves(curvature))
    assert any((leaf != 1).any() for leaf in jax.tree.leaves(curvature))

    # Two models side by side, each with its own scalars.
    many = jax.tree.map(lambda x: jnp.stack([x, x + 1]), params)
    states = jax.vmap(tx.init)(many)
    updates, states = jax.vmap(lambda g, s, p, k: tx.update(g, s, p, key=k))(scalars[:2], states, many, keys[:2])
    alone, _ = tx.update(scalars[1], tx.init(params), jax.tree.map(lambda x: x + 1, params), key=keys[1])
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-7)


def test_inject_hyperparams_schedules_and_overrides():
    params = params_of()
    scalars = jnp.ones((1, 2))
    tx = optax.inject_hyperparams(hiso_jax.hiso)(
        learning_rate=optax.linear_schedule(1.0, 0.0, 2), decay=optax.constant_schedule(0.5), eps=0.0
    )
    state = tx.init(params)
    first, state = jax.jit(tx.update)(scalars, state, params, key=KEY)
    second, state = jax.jit(tx.update)(scalars, state, params, key=KEY)
    plain = hiso_jax.hiso(1.0, decay=0.5, eps=0.0)
    plain_state = plain.init(params)
    one, plain_state = plain.update(scalars, plain_state, params, key=KEY)
    two, _ = plain.update(scalars, plain_state, params, key=KEY)
    np.testing.assert_allclose(first["a"], one["a"], rtol=1e-6)
    np.testing.assert_allclose(second["a"], 0.5 * two["a"], rtol=1e-5)
    assert optax.tree.get(state, "curvature")["a"].shape == (2, 3)
    assert float(state.hyperparams["learning_rate"]) == 0.5
    for factory in (hiso_jax.decomfl, hiso_jax.hiso):
        injected = optax.inject_hyperparams(factory)(learning_rate=0.1)
        state = injected.init(params)
        state.hyperparams["learning_rate"] = jnp.float32(0.0)
        updates, _ = injected.update(scalars, state, params, key=KEY)
        assert all(not leaf.any() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("steps", [thorough(1), 3])
def test_decay_one_is_decomfl_bit_for_bit(steps):
    params = params_of()
    one, other = hiso_jax.hiso(0.1, decay=1), hiso_jax.decomfl(0.1)
    a_params = b_params = params
    a_state, b_state = one.init(params), other.init(params)
    for r in range(4):
        scalars = jnp.asarray(np.random.default_rng(r).normal(size=(steps, 5)), jnp.float32)
        key = jax.random.fold_in(KEY, r)
        a_updates, a_state = jax.jit(one.update)(scalars, a_state, a_params, key=key)
        b_updates, b_state = jax.jit(other.update)(scalars, b_state, b_params, key=key)
        a_params, b_params = optax.apply_updates(a_params, a_updates), optax.apply_updates(b_params, b_updates)
        for a, b in zip(jax.tree.leaves((a_updates, a_params)), jax.tree.leaves((b_updates, b_params)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(optax.tree.get(a_state, "curvature")))
    assert optax.tree.get(b_state, "curvature") is None


def test_decay_one_survives_an_infinite_direction():
    tx = hiso_jax.scale_by_hiso(decay=1.0)
    _, state = tx.update(jnp.full((1, 1), jnp.inf), tx.init(jnp.ones(3)), jnp.ones(3), key=KEY)
    np.testing.assert_array_equal(state.curvature, 1.0)


def test_curvature_and_updates_of_bfloat16_parameters_are_float32():
    params = params_of(jnp.bfloat16)
    tx = hiso_jax.scale_by_hiso()
    updates, state = tx.update(jnp.ones((1, 2)), tx.init(params), params, key=KEY)
    for leaf in jax.tree.leaves((updates, state.curvature)):
        assert leaf.dtype == jnp.float32
    assert optax.apply_updates(params, updates)["a"].dtype == jnp.bfloat16


def test_state_says_which_directions_it_expects():
    params = params_of()
    shaped = zo.zo_state(optax.chain(hiso_jax.scale_by_hiso(sampler=zo.sphere), optax.trace(0.9)).init(params))
    assert shaped.directions == zo.Directions(zo.sphere)
    assert zo.zo_state(hiso_jax.decomfl(0.1).init(params)).directions == zo.Directions(zo.gaussian)
    for wrong in (optax.adam(1e-3), optax.chain(hiso_jax.scale_by_zo(), hiso_jax.scale_by_hiso())):
        with pytest.raises(ValueError, match="exactly one of scale_by_hiso or scale_by_zo"):
            zo.zo_state(wrong.init(params))


@pytest.mark.parametrize("tx", [hiso_jax.hiso(0.1), hiso_jax.decomfl(0.1)])
def test_misuse_is_answered_with_one_sentence(tx):
    params, scalars = params_of(), jnp.ones((1, 2))
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"take the \[K, P\] array of a round's scalars.*head of a chain; got a dict"):
        tx.update(params, state, params, key=KEY)
    with pytest.raises(TypeError, match=r"head of a chain; got float32 array of shape \(2,\)"):
        tx.update(jnp.ones(2), state, params, key=KEY)
    with pytest.raises(TypeError, match="int32 array"):
        tx.update(jnp.ones((1, 2), jnp.int32), state, params, key=KEY)
    with pytest.raises(ValueError, match="must not be empty"):
        tx.update(jnp.ones((1, 0)), state, params, key=KEY)
    with pytest.raises(ValueError, match="update needs params="):
        tx.update(scalars, state, None, key=KEY)
    with pytest.raises(ValueError, match="update needs key="):
        tx.update(scalars, state, params)
    late = optax.chain(tx, hiso_jax.scale_by_zo())
    with pytest.raises(TypeError, match="stand at the head of a chain"):
        late.update(scalars, late.init(params), params, key=KEY)
    with pytest.raises(TypeError, match=r"parameter \['n'\] has dtype int32"):
        tx.init({"n": jnp.arange(3)})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"decay": 1.5}, "decay must be between 0 and 1"),
        ({"eps": -1.0}, "eps must be a finite number"),
        ({"curvature_update": "first"}, "curvature_update must be 'last' or 'all', got 'first'"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        hiso_jax.scale_by_hiso(**arguments)


@pytest.mark.parametrize("make", [hiso_jax.hiso, hiso_jax.decomfl, hiso_jax.mosaic, hiso_jax.algorithms.zo_adam])
@pytest.mark.parametrize("rate", [-1, float("nan"), np.float32("nan"), "0.1", True])
def test_a_rate_that_is_none_is_refused(make, rate):
    with pytest.raises(ValueError, match="learning_rate must be a finite number ≥ 0 or a schedule"):
        make(rate)


@pytest.mark.parametrize("rate", [0.1, jnp.float32(0.1), optax.constant_schedule(0.1)])
def test_every_kind_of_rate_is_taken(rate):
    assert hiso_jax.hiso(rate).init({"w": jnp.ones(2)})


@pytest.mark.parametrize("rate", [np.float32(0.1), np.array(0.1)])
def test_rates_of_numpy_are_no_misuse(rate):
    """NumPy's numbers are accepted, though optax's annotation does not name them."""
    assert hiso_jax.hiso(rate).init({"w": jnp.ones(2)})


def test_a_mask_around_a_head_is_refused():
    params = {"w": jnp.ones(2), "b": jnp.ones(1)}
    with pytest.raises(TypeError, match="passing that part alone"):
        optax.masked(hiso_jax.hiso(0.1), {"w": True, "b": False}).init(params)
