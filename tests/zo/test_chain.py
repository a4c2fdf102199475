"""Members of optax around a head: they read the loss, receive the scalars first, or are refused by their name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import zo

PARAMS = {"w": jnp.ones(4), "b": jnp.zeros(())}


def loss(params, batch):
    return jnp.sum(params["w"] ** 2) + params["b"] ** 2


def trained(tx, steps=12):
    params, state, losses = PARAMS, tx.init(PARAMS), []
    step = jax.jit(zo.step(loss, tx, num_perturbations=2))
    for number in range(steps):
        params, state, value = step(params, state, None, jax.random.fold_in(jax.random.key(0), number))
        losses.append(float(value))
    return state, losses


def test_what_reads_the_loss_is_given_it():
    """reduce_on_plateau agrees with its rule in NumPy: two losses in a row without an improvement halve the rate."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=0.0, atol=1e-12)
    # At this rate the loss wanders.
    state, losses = trained(optax.chain(hiso_jax.scale_by_zo(), optax.scale(-3.0), plateau), steps=30)
    best, worse, scale = np.inf, 0, 1.0
    for value in losses:
        best, worse = (value, 0) if value < best else (best, worse + 1)
        scale, worse = (scale / 2, 0) if worse >= 2 else (scale, worse)
    assert optax.tree_utils.tree_get(state, "scale") == pytest.approx(scale)
    assert scale < 1
    _, losses = trained(optax.chain(hiso_jax.scale_by_zo(), optax.scale_by_polyak(), optax.scale(-1.0)))
    assert losses[-1] < losses[0]


def test_zero_nans_before_the_head_sees_the_scalars():
    tx = optax.chain(optax.zero_nans(), hiso_jax.decomfl(0.01))
    state, losses = trained(tx)
    plain, expected = trained(hiso_jax.decomfl(0.01))
    np.testing.assert_array_equal(losses, expected)
    assert jax.tree.leaves(state[0])[0].shape == ()
    # A scalar that is not a number becomes zero.
    first = zo.settled(optax.with_extra_args_support(tx), tx.init(PARAMS), PARAMS)
    updates, _ = tx.update(jnp.array([[jnp.nan, 1.0]]), first, PARAMS, key=jax.random.key(0))
    alone, _ = hiso_jax.decomfl(0.01).update(jnp.array([[0.0, 1.0]]), plain, PARAMS, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, updates, alone)


@pytest.mark.parametrize(
    ("tx", "said"),
    [
        (optax.apply_if_finite(hiso_jax.decomfl(0.01), 3), "optax.apply_if_finite cannot wrap scale_by_hiso"),
        (optax.MultiSteps(hiso_jax.decomfl(0.01), 2), "optax.MultiSteps cannot wrap .* take more perturbations"),
    ],
)
def test_a_wrapper_that_cannot_stand_around_a_head_is_refused_by_name(tx, said):
    with pytest.raises(TypeError, match=said):
        trained(tx, steps=1)


def test_what_a_step_does_not_have_is_named():
    line_search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=3)
    with pytest.raises(ValueError, match=r"the optimizer asks for what a round does not have: .*value_fn"):
        trained(optax.chain(hiso_jax.scale_by_zo(), line_search), steps=1)


def test_a_wrapper_behind_the_head_works():
    tx = optax.chain(hiso_jax.scale_by_zo(), optax.apply_if_finite(optax.adam(0.1), 3))
    _, losses = trained(tx)
    assert losses[-1] < losses[0]


def test_whether_the_loss_is_read_is_seen_in_the_update():
    scalars = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    plateau = optax.chain(hiso_jax.decomfl(0.01), optax.contrib.reduce_on_plateau())
    assert zo.reads_loss(plateau, PARAMS, scalars)
    assert not zo.reads_loss(optax.chain(hiso_jax.hiso(0.01), optax.trace(0.9)), PARAMS, scalars)
