"""Finite differences along directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiso_jax import zo


def loss(params, batch):
    hidden = jnp.tanh(batch @ params["w"])
    return (hidden @ params["v"]).mean() + 0.5 * jnp.sum(params["v"] ** 4)


def problem(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"w": jax.random.normal(keys[0], (3, 4)), "v": jax.random.normal(keys[1], (4,))}
    return params, jax.random.normal(keys[2], (5, 3))


@functools.partial(jax.jit, static_argnames=("mu", "difference"))
def scalars(params, batch, key, curvature, step, *, mu, difference):
    return zo.scalars(
        loss, params, batch, key, step=step, curvature=curvature, num_perturbations=3, mu=mu, difference=difference
    )


@jax.jit
def derivatives(params, batch, key, curvature, step):
    def along(p):
        z = zo.direction(zo.perturbation_key(key, step, p), params, curvature)
        return jax.jvp(lambda x: loss(x, batch), (params,), (z,))[1]

    return jax.vmap(along)(jnp.arange(3))


@pytest.mark.thorough
@settings(max_examples=6)
@given(seed=st.integers(0, 10_000), step=st.integers(0, 5), shaped=st.booleans())
def test_scalars_tend_to_directional_derivatives(seed, step, shaped):
    """Compared with jax.jvp, forward differences have an error of order μ, and central ones of order μ²."""
    with jax.enable_x64(True):
        params, batch = problem(seed)
        curvature = jax.tree.map(lambda x: 0.5 + jnp.abs(x), params) if shaped else None
        inputs = (params, batch, jax.random.key(seed), curvature, step)
        exact, value = np.asarray(derivatives(*inputs)), loss(params, batch)
        errors = {}
        for method in ("forward", "central"):
            for mu in (1e-3, 1e-4):
                reported, estimated = scalars(*inputs, mu=mu, difference=method)
                errors[method, mu] = np.abs(np.asarray(estimated) - exact).max()
                np.testing.assert_allclose(reported, value, rtol=1e-3, atol=1e-3)
        # A tenfold smaller μ has about a tenth of the forward error and a hundredth of the central one.
        assert errors["forward", 1e-4] < 0.2 * errors["forward", 1e-3] + 1e-9
        assert errors["central", 1e-4] < 0.05 * errors["central", 1e-3] + 1e-9


def test_differences_are_taken_in_float32():
    params, batch = jnp.ones(4, jnp.bfloat16), jnp.zeros(4, jnp.bfloat16)
    value, scalars = zo.scalars(
        lambda x, b: jnp.sum((x - b) ** 2), params, batch, jax.random.key(0), num_perturbations=2, mu=0.1
    )
    assert value.dtype == scalars.dtype == jnp.float32


def test_memory_does_not_grow_with_the_number_of_perturbations():
    params = jnp.ones(1_000_000)

    def temporary_bytes(perturbations):
        run = jax.jit(
            lambda x, key: zo.scalars(
                lambda y, b: jnp.sum(y * y), x, None, key, num_perturbations=perturbations, mu=1e-3
            )
        )
        return run.lower(params, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(2), temporary_bytes(64)
    assert many <= few + 10_000
    assert many < 8 * params.nbytes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_perturbations": 0, "mu": 1e-3}, "num_perturbations must be at least 1, got 0"),
        ({"num_perturbations": 1, "mu": 0.0}, "mu must be a positive finite number, got 0.0"),
        ({"num_perturbations": 1, "mu": float("nan")}, "mu must be a positive finite number, got nan"),
        (
            {"num_perturbations": 1, "mu": 1e-3, "difference": "both"},
            "difference must be one of forward, central, second, or a Difference; got 'both'",
        ),
    ],
)
def test_an_estimator_that_cannot_be_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        zo.scalars(lambda x, b: x.sum(), jnp.ones(2), None, jax.random.key(0), **arguments)
