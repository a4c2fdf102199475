"""The fused generator gives JAX's own bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiso_jax import zo
from hiso_jax.zo.threefry import drawn, fold_in


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


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("data", [0, 7, 2**32 - 1, np.int32(-3), jnp.int32(5), jnp.uint32(2**31 + 1)])
def test_keys_are_folded_as_jax_folds_them(impl, data):
    key = jax.random.key(3, impl=impl)
    for fold in (fold_in, jax.jit(fold_in, static_argnums=1) if isinstance(data, int) else jax.jit(fold_in)):
        assert (
            jax.random.key_data(fold(key, data)).tolist() == jax.random.key_data(jax.random.fold_in(key, data)).tolist()
        )


def test_several_keys_are_folded_as_jax_folds_them():
    keys, data = jax.random.split(jax.random.key(0), 4), jnp.arange(4)
    ours, theirs = (jax.vmap(fold, (0, 0))(keys, data) for fold in (fold_in, jax.random.fold_in))
    assert (jax.random.key_data(ours) == jax.random.key_data(theirs)).all()


def test_batches_are_drawn_as_jax_draws_them():
    def draw(key, shape):
        return jax.random.randint(key, shape, 3, 20)

    key = jax.random.key(1)
    assert (drawn(draw, key, (4, 5)) == draw(key, (4, 5))).all()
