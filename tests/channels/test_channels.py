"""Channels, each by itself: their effect on messages."""

from fractions import Fraction
from math import floor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiso_jax import channels

KEY = jax.random.key(0)
SENDERS = None


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9),
    seed=st.integers(0, 99),
    share=st.floats(0, 0.49),
)
def test_combiners_of_those_that_count_only(values, seed, share):
    """Messages of weight zero may hold anything; the result is that of NumPy on the other messages."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 3, len(values)).astype(np.float32)
    weights[rng.integers(len(values))] = 1
    messages = np.where(weights > 0, np.array(values, np.float32), np.nan)
    kept, counted = messages[weights > 0], weights[weights > 0]
    cut = floor(Fraction(str(share)) * len(kept))
    inner = np.sort(kept)[cut : len(kept) - cut]
    wanted = {
        channels.mean(): np.average(kept, weights=counted),
        channels.median(): np.median(kept),
        channels.trimmed_mean(trim=share): inner.mean(),
    }
    average = np.average(kept, weights=counted)
    if abs(average) >= 1e-3:
        # Closer to zero the sign depends on rounding, and XLA takes subnormal numbers for zero.
        wanted[channels.majority()] = 1 if average >= 0 else -1
    for combine, value in wanted.items():
        np.testing.assert_allclose(combine(jnp.array(messages), jnp.array(weights), KEY), value, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["mean", "median", "trimmed_mean"])
def test_without_anyone_that_counts_an_aggregate_is_zero(name):
    combine = channels.FACTORIES[name]()
    assert combine(jnp.array([jnp.nan, 3.0]), jnp.zeros(2), KEY) == 0


def test_clipping_shortens_what_is_too_long_and_nothing_else():
    messages = {"a": jnp.array([[3.0, 0.0], [0.3, 0.0], [1e25, 0.0], [0.0, 0.0]]), "b": jnp.array([4.0, 0.4, 0.0, 0.0])}
    factors = channels.clip(clip_norm=1.0).factors(messages, jnp.ones(4))
    np.testing.assert_allclose(factors, [0.2, 1, 1e-25, 1], rtol=1e-6)
    # A message of weight zero has the factor 1, and its NaN does not affect the others.
    factors = channels.clip(clip_norm=1.0).factors({"a": jnp.array([jnp.nan, 5.0])}, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(factors, [1, 0.2], rtol=1e-6)


def test_signs():
    np.testing.assert_array_equal(channels.signs().apply(jnp.array([-3.0, 0.0, 2.0]), SENDERS, KEY), [-1, 1, 1])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: channels.clip(clip_norm=0.0), "clip_norm must be a positive finite number, got 0.0"),
        (lambda: channels.trimmed_mean(trim=0.5), "trim must be at least 0 and below 0.5, got 0.5"),
    ],
)
def test_options_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


COMBINERS = channels.names_of("combine")


@pytest.mark.parametrize("name", [name for name in COMBINERS if name not in ("majority", "private_mean")])
@pytest.mark.parametrize("who", [0, 3])
def test_the_only_message_that_counts_is_the_aggregate(name, who):
    messages = jnp.arange(1.0, 6.0, dtype=jnp.float32)[:, None, None] * jnp.ones((5, 1, 2))
    combined = channels.FACTORIES[name]()(messages, jnp.zeros(5).at[who].set(1.0), jax.random.key(0))
    np.testing.assert_allclose(combined, messages[who], rtol=1e-6)
