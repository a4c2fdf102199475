"""A loss in half precision trains as a loss in float32 does, or a warning says that it cannot."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import zo
from hiso_jax.zo import precision

TARGET = np.random.default_rng(0).normal(size=50).astype(np.float32)


def residual(params, dtype):
    return params["w"].astype(dtype) - jnp.asarray(TARGET, dtype)


LOSSES = {
    "sum": lambda r: jnp.sum(r**2),
    "scaled mean": lambda r: 50 * jnp.mean(r**2) + 0.5,
    "jitted": jax.jit(lambda r: jnp.mean(r * r)),
    "a call inside": lambda r: 2 * jax.jit(lambda r: jnp.mean(r * r))(r) + jnp.sum(r) * 0,
    "optax": lambda r: optax.l2_loss(r).sum(),
}


def trained(loss, dtype, steps=400):
    tx, params = hiso_jax.decomfl(0.005 if loss is LOSSES["sum"] else 0.1), {"w": jnp.zeros(50)}
    step = jax.jit(zo.step(lambda p, batch: loss(residual(p, dtype)), tx))
    state = tx.init(params)
    for number in range(steps):
        params, state, _ = step(params, state, None, jax.random.fold_in(jax.random.key(0), number))
    return float(np.square(np.asarray(params["w"]) - TARGET).sum())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_loss_in_half_precision_trains(dtype, caplog):
    """Differences of a rounded loss would not train: the distance would stay above that of the beginning."""
    begun = float(np.square(TARGET).sum())
    with caplog.at_level(logging.WARNING, logger="hiso_jax"):
        assert trained(LOSSES["sum"], dtype) < 0.02 * begun
    assert not caplog.records


@pytest.mark.parametrize("name", LOSSES)
def test_the_last_rounding_is_taken_off_and_nothing_else(name):
    params = {"w": jnp.linspace(-1, 1, 50)}
    found = jax.jit(zo.in_float32(lambda p: LOSSES[name](residual(p, jnp.bfloat16))))(params)
    assert found.dtype == jnp.float32
    # The expected value sums the same rounded residuals in double precision.
    entries = np.asarray(residual(params, jnp.bfloat16), np.float64)
    squares = np.asarray(jnp.asarray(residual(params, jnp.bfloat16)) ** 2, np.float64)
    expected = {
        "sum": squares.sum(),
        "scaled mean": 50 * squares.mean() + 0.5,
        "jitted": squares.mean(),
        "a call inside": 2 * squares.mean(),
        "optax": (squares / 2).sum(),
    }[name]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    rounded = float(LOSSES[name](residual(params, jnp.bfloat16)))
    assert abs(float(found) - expected) <= abs(rounded - expected)
    assert entries.shape == (50,)


def test_a_loss_in_float32_is_left_alone():
    def loss(p):
        return LOSSES["sum"](residual(p, jnp.float32))

    params = {"w": jnp.linspace(-1, 1, 50)}
    assert str(jax.make_jaxpr(zo.in_float32(loss))(params)) == str(jax.make_jaxpr(loss)(params))


def test_a_loss_that_was_rounded_before_says_so(caplog):
    precision._warn.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hiso_jax"):
        zo.in_float32(lambda p: jnp.max(jnp.abs(residual(p, jnp.bfloat16))))({"w": jnp.zeros(50)})
        zo.in_float32(lambda p: jnp.max(jnp.abs(residual(p, jnp.bfloat16))))({"w": jnp.zeros(50)})
    assert ["in bfloat16, in which numbers near 1 are 0.0078 apart" in line for line in caplog.messages] == [True]


def test_parameters_that_mu_does_not_move_are_counted(caplog):
    # Spacings of bfloat16: 2⁻⁸ from 0.5 to 1, 2⁻¹¹ from 1/16 to 1/8.
    params = {"w": jnp.array([0.75, 0.7, 0.07, 0.08], jnp.bfloat16), "b": jnp.ones(4)}
    assert zo.unmoved_share(params, 1e-3) == 2 / 8
    assert zo.unmoved_share(params, 1e-2) == 0
    precision.warn_of_parameters.cache_clear()
    tx = hiso_jax.decomfl(0.01)
    with caplog.at_level(logging.WARNING, logger="hiso_jax"):
        jax.eval_shape(
            zo.step(lambda p, batch: p["w"].astype(jnp.float32).sum(), tx),
            params,
            tx.init(params),
            None,
            jax.random.key(0),
        )
    assert "parameters are kept in bfloat16, in which mu = 0.001 does not move those above 0.26" in caplog.text
