"""Initial weights are JAX's own, whatever layout they are drawn in."""

import jax
import numpy as np
import pytest

from hiso_jax.models.functional import lecun_normal


@pytest.mark.parametrize("shape", [(64, 32), (5, 5, 3, 16), (7, 1)])
def test_they_are_lecun_s_to_the_bit(shape):
    for seed in range(3):
        key = jax.random.key(seed)
        ours, theirs = (
            jax.jit(draw, static_argnums=1)(key, shape) for draw in (lecun_normal, jax.nn.initializers.lecun_normal())
        )
        np.testing.assert_array_equal(ours, theirs)
