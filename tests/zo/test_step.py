"""Fine-tuning without a federation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import zo


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("tx", [hiso_jax.hiso(0.02), optax.chain(hiso_jax.scale_by_zo(), optax.sgd(0.02))])
def test_step_descends(tx, method):
    target = jnp.linspace(-1, 1, 20).reshape(4, 5)
    step = zo.step(lambda p, b: jnp.mean((p["w"] + p["b"] - b) ** 2), tx, num_perturbations=4, difference=method)
    params = {"w": jnp.zeros((4, 5)), "b": jnp.zeros(5)}

    def body(carry, i):
        *carry, loss = step(*carry, target, jax.random.fold_in(jax.random.key(0), i))
        return tuple(carry), loss

    _, losses = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(600)))((params, tx.init(params)))
    assert losses[-1] < 0.1 * losses[0]


def test_step_is_scalars_then_update():
    tx = hiso_jax.hiso(0.1)
    params, batch, key = jnp.arange(3.0), jnp.ones(3), jax.random.key(4)

    def loss_fn(p, b):
        return jnp.sum((p - b) ** 2)

    state = tx.init(params)
    loss, g = zo.scalars(loss_fn, params, batch, key, curvature=jnp.ones(3), num_perturbations=5, mu=1e-3)
    updates, _ = tx.update(g[None], state, params, key=key)
    stepped, _, reported = zo.step(loss_fn, tx)(params, state, batch, key)
    np.testing.assert_array_equal(stepped, optax.apply_updates(params, updates))
    assert reported == loss


def test_an_optimizer_without_a_zeroth_order_head_is_refused():
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="exactly one of scale_by_hiso or scale_by_zo"):
        zo.step(lambda p, b: p.sum(), tx)(jnp.ones(2), tx.init(jnp.ones(2)), None, jax.random.key(0))


@pytest.mark.parametrize(
    ("loss_fn", "sentence"),
    [
        (lambda w, b: (w - b) ** 2, r"must return one number, got an array of shape \(3,\): take the mean"),
        (lambda w, b: (jnp.sum(w), {"aux": b}), "must return the loss alone, got a tuple"),
    ],
)
def test_a_loss_that_is_not_one_number_is_refused(loss_fn, sentence):
    tx, params, key = hiso_jax.hiso(0.1), jnp.ones(3), jax.random.key(0)
    with pytest.raises(ValueError, match=sentence):
        zo.step(loss_fn, tx)(params, tx.init(params), jnp.zeros(3), key)
    with pytest.raises(ValueError, match=sentence):
        zo.scalars(loss_fn, params, jnp.zeros(3), key, num_perturbations=2, mu=1e-3)
