"""Low-precision storage keeps the sum of many updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given
from hypothesis import strategies as st

import hiso_jax
from hiso_jax import zo
from hiso_jax.stacked import Stacked
from hiso_jax.zo.rounding import stochastic_round

DRAWS = 20_000


@given(value=st.floats(-(2.0**99), 2.0**99, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30))
def test_rounding_is_to_a_neighbour_and_right_in_the_mean(value):
    words = jax.random.bits(jax.random.key(0), (DRAWS,), jnp.uint32)
    rounded = np.asarray(stochastic_round(words, jnp.full(DRAWS, value, jnp.float32))).astype(np.float64)
    cut = (np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    gap = abs(float((np.float32(cut).view(np.uint32) + np.uint32(0x10000)).view(np.float32)) - float(cut))
    assert np.all(np.abs(rounded - value) < gap)
    # The deviation of a coin between two neighbours is at most half the gap.
    assert abs(rounded.mean() - value) < 6 * gap / 2 / np.sqrt(DRAWS) + 1e-12 * abs(value)


def test_what_bfloat16_holds_and_what_is_not_finite_stay():
    words = jnp.full(6, 0xFFFFFFFF, jnp.uint32)
    x = jnp.array([0.0, -0.0, 1.5, -3.0, jnp.inf, jnp.nan])
    rounded = stochastic_round(words, x).astype(jnp.float32)
    np.testing.assert_array_equal(rounded, x)


def drift(update, steps=200):
    """The mean change of weights near 0.04 after many updates of 5e-6."""
    params = jnp.full(4096, 0.04, jnp.bfloat16)

    def step(params, key):
        return update(params, jnp.full(4096, -5e-6), key), None

    keys = jax.random.split(jax.random.key(1), steps)
    last, _ = jax.lax.scan(step, params, keys)
    return float(last.astype(jnp.float32).mean() - params.astype(jnp.float32).mean()), last.dtype


def test_updates_below_half_a_unit_in_the_last_place_arrive():
    lost, _ = drift(lambda params, update, key: optax.apply_updates(params, update))
    kept, dtype = drift(zo.apply_updates)
    assert lost == 0.0
    assert dtype == jnp.bfloat16
    np.testing.assert_allclose(kept, -200 * 5e-6, rtol=0.05)


def test_float32_parameters_are_updated_as_optax_does():
    params, updates = jnp.arange(5.0), jnp.full(5, 0.1)
    np.testing.assert_array_equal(
        zo.apply_updates(params, updates, jax.random.key(0)), optax.apply_updates(params, updates)
    )


def test_layers_round_by_keys_of_their_own():
    params = Stacked(jnp.full((3, 1000), 0.04, jnp.bfloat16))
    moved = zo.apply_updates(params, jax.tree.map(lambda x: jnp.full(x.shape, 1e-4), params), jax.random.key(2))
    apart = zo.apply_updates(params.unstacked(), [jnp.full(1000, 1e-4) for _ in range(3)], jax.random.key(2))
    np.testing.assert_array_equal(moved.layers, jnp.stack(apart))
    assert not np.array_equal(moved.layers[0], moved.layers[1])


def test_a_bfloat16_curvature_follows_the_float32_one():
    tx = {dtype: hiso_jax.scale_by_hiso(curvature_dtype=dtype) for dtype in (None, jnp.bfloat16)}
    params = jnp.zeros(20_000)
    mean = {}
    for dtype, head in tx.items():
        state = head.init(params)

        def step(state, key, head=head):
            return head.update(jnp.full((1, 2), 0.9), state, params, key=key)[1], None

        state, _ = jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 60))
        assert state.curvature.dtype == (jnp.float32 if dtype is None else dtype)
        mean[dtype] = float(state.curvature.astype(jnp.float32).mean())
    np.testing.assert_allclose(mean[jnp.bfloat16], mean[None], rtol=0.01)
    assert abs(mean[None] - 1) > 0.1
