"""The requirements of optax on its members, for every head: jit, vmap, chain, inject_hyperparams, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiso_jax import zo
from tests.fed.problems import assert_trees_identical
from tests.marks import slow

HEADS = {
    "scale_by_zo": zo.scale_by_zo,
    "scale_by_hiso": zo.scale_by_hiso,
    "scale_by_hiso, every step": lambda **given: zo.scale_by_hiso(curvature_update="all", **given),
    "head": lambda **given: zo.head(curvature=lambda params: jax.tree.map(jnp.ones_like, params), **given),
}
ALIASES = {"decomfl": zo.decomfl, "hiso": zo.hiso}
SCALARS = jnp.array([[0.5, -1.0, 2.0], [1.0, 0.25, -0.5]])
KEY = jax.random.key(4)
heads = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)


def parameters(dtype=jnp.float32):
    return {"w": jnp.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4), "b": jnp.ones(4, dtype)}


@heads
@pytest.mark.parametrize("sampler", ["gaussian", *(slow(name) for name in ("rademacher", "sphere"))])
def test_jitted_it_is_the_same(make, sampler):
    tx, params = make(sampler=sampler), parameters()
    state = jax.jit(tx.init)(params)
    assert_trees_identical(state, tx.init(params))
    plain, jitted = (update(SCALARS, state, params, key=KEY) for update in (tx.update, jax.jit(tx.update)))
    # Without jit no operations are contracted, so the last bit may differ.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), plain, jitted)
    assert jax.tree.structure(plain[0]) == jax.tree.structure(params)


@heads
def test_vmapped_it_is_each_by_itself(make):
    tx = make()
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), parameters())
    keys, scalars = jax.random.split(KEY, 2), jnp.stack([SCALARS, -2 * SCALARS])
    states = jax.vmap(tx.init)(params)

    def update(scalars, state, params, key):
        return tx.update(scalars, state, params, key=key)

    both = jax.vmap(update)(scalars, states, params, keys)
    for place in range(2):
        own = jax.tree.map(lambda x, place=place: x[place], (scalars, states, params, keys))
        alone = update(*own)
        jax.tree.map(
            lambda a, b, place=place: np.testing.assert_allclose(a[place], b, rtol=1e-5, atol=1e-6), both, alone
        )


@heads
def test_it_heads_a_chain(make):
    tx = optax.chain(
        optax.clip(10.0), make(), optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1)
    )
    params = parameters()
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(SCALARS, state, params, key=KEY)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert int(optax.tree.get(after, "rounds")) == 1


@pytest.mark.parametrize("make", ALIASES.values(), ids=ALIASES)
def test_its_hyperparameters_may_be_injected(make):
    params, schedule = parameters(), optax.linear_schedule(0.1, 0.0, 2)
    tx = optax.inject_hyperparams(make)(learning_rate=schedule)
    state, plain = tx.init(params), make(0.1)
    wanted, _ = plain.update(SCALARS, plain.init(params), params, key=KEY)
    updates, state = jax.jit(tx.update)(SCALARS, state, params, key=KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, wanted)
    updates, state = jax.jit(tx.update)(SCALARS, state, params, key=KEY)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.05)
    assert zo.zo_state(state).rounds == 2


def test_numbers_of_the_head_may_be_injected_too():
    params = parameters()
    tx = optax.inject_hyperparams(zo.scale_by_hiso)(decay=lambda count: jnp.where(count == 0, 1.0, 0.5))
    _, first = tx.update(SCALARS, tx.init(params), params, key=KEY)
    assert_trees_identical(zo.zo_state(first).curvature, zo.zo_state(tx.init(params)).curvature)
    _, second = tx.update(SCALARS, first, params, key=KEY)
    assert (zo.zo_state(second).curvature["w"] != 1).all()


@pytest.mark.thorough
@heads
@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, *(slow(each) for each in (jnp.float16, jnp.float32, jnp.float64))],
)
def test_updates_are_in_the_wider_dtype_and_parameters_keep_theirs(make, dtype, x64):
    tx, params = make(), parameters(dtype)
    updates, state = tx.update(SCALARS, tx.init(params), params, key=KEY)
    wide = jnp.promote_types(dtype, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {wide}
    curvature = zo.zo_state(state).curvature
    assert {leaf.dtype for leaf in jax.tree.leaves(curvature)} <= {wide, jnp.dtype(dtype)}
    after = zo.apply_updates(params, updates, KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(dtype)}


def test_strings_name_values():
    assert zo.scale_by_zo(sampler="sphere").init(parameters()).directions == zo.Directions(zo.sphere)
    with pytest.raises(
        ValueError,
        match=f"sampler must be one of {', '.join(zo.SAMPLERS)}, or a function; got 'x'",
    ):
        zo.scale_by_hiso(sampler="x")
    with pytest.raises(ValueError, match="difference must be one of forward, central, second, or a Difference"):
        zo.step(lambda p, b: p, zo.hiso(0.1), difference="x")


def test_a_difference_counts_its_evaluations_and_is_exact_on_a_quadratic(x64):
    counts = {name: difference.passes(5) for name, difference in zo.DIFFERENCES.items()}
    assert counts == {"forward": 6, "central": 10, "second": 11}
    params, hessian = jnp.array([0.3, -0.2, 0.7]), jnp.array([2.0, 1.0, 0.5])
    _, numbers = zo.scalars(
        lambda x, _: 0.5 * (hessian * x**2).sum(), params, None, KEY, num_perturbations=4, mu=1e-2, difference="second"
    )
    for p in range(4):
        z = zo.direction(zo.perturbation_key(KEY, 0, p), params)
        np.testing.assert_allclose(numbers["slope"][p], (hessian * params * z).sum(), rtol=1e-9)
        np.testing.assert_allclose(numbers["curvature"][p], (hessian * z**2).sum(), rtol=1e-6)


def test_a_key_rule_of_ones_own_reaches_measurement_and_update():
    """The directions come from a pool of four, whatever the round."""

    def of_pool(round_key, step, index):
        chosen = jax.random.randint(zo.perturbation_key(round_key, step, index), (), 0, 4)
        return jax.random.fold_in(jax.random.key(9), chosen)

    tx = zo.decomfl(0.1, sampler=zo.Directions(zo.gaussian, of_pool))
    params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
    step = jax.jit(zo.step(lambda p, b: (p["w"] ** 2).sum(), tx, num_perturbations=1))
    pool = [zo.direction(jax.random.fold_in(jax.random.key(9), i), params)["w"].reshape(-1) for i in range(4)]
    for number in range(6):
        after, _, _ = step(params, tx.init(params), None, jax.random.key(number))
        moved = (after["w"] - params["w"]).reshape(-1)
        cosines = [abs(moved @ z) / jnp.linalg.norm(moved) / jnp.linalg.norm(z) for z in pool]
        assert max(cosines) > 0.999
