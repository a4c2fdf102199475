"""The fused generator gives JAX's own bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiso_jax import zo
from hiso_jax.zo.threefry import drawn


@pytest.mark.thorough
@given(seed=st.integers(0, 2**31 - 1), fold=st.integers(0, 2**31 - 1), size=st.sampled_from([1, 6, 129]))
def test_the_bits_are_jax_s_own(seed, fold, size):
    key = jax.random.fold_in(jax.random.key(seed), fold)
    for draw in (jax.random.bits, jax.random.normal):
        np.testing.assert_array_equal(drawn(draw, key, (size, 2)), draw(key, (size, 2)))


def test_it_is_taken_on_cpu_for_threefry_keys_and_no_others():
    def loops(draw):
        # JAX's own draw has a loop over the hash's rounds on CPU; the fused generator has none.
        return "stablehlo.while" in jax.jit(draw).lower(jax.random.key(0)).as_text()

    on_cpu = jax.default_backend() == "cpu"
    assert loops(lambda key: jax.random.normal(key, (64,))) == on_cpu
    assert not loops(lambda key: zo.gaussian(key, (64,), jnp.float32))
    np.testing.assert_array_equal(
        zo.gaussian(jax.random.key(1, impl="rbg"), (8,), jnp.float32),
        jax.random.normal(jax.random.key(1, impl="rbg"), (8,)),
    )


def test_double_precision_draws_are_jax_s_own(x64):
    key = jax.random.key(3)
    np.testing.assert_array_equal(zo.gaussian(key, (5, 7), jnp.float64), jax.random.normal(key, (5, 7), jnp.float64))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="written for the CPU")
def test_a_draw_is_one_pass_without_temporaries():
    """A draw and its consumer fuse: nothing of the size of the draw is allocated beside the output."""
    size = 1 << 20
    program = jax.jit(lambda key, x: x + 1e-3 * zo.gaussian(key, (size,), jnp.float32))
    stats = program.lower(jax.random.key(0), jax.ShapeDtypeStruct((size,), jnp.float32)).compile().memory_analysis()
    assert stats.temp_size_in_bytes < size
