"""Codes of few bits: decoded numbers, packed bytes, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import hiso_jax
from hiso_jax import channels, fed
from hiso_jax.fed.codes import are_finite, pack, packed_size, quantise, unpack

FEW = (1, 2, 4, 8)
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.sampled_from(FEW), array_shapes(min_dims=3, max_dims=4, max_side=9), st.randoms())
def test_packing_inverts(bits, shape, random):
    codes = np.random.default_rng(random.randrange(2**32)).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    codes = codes.astype(np.int8)
    content = pack(codes, bits)
    assert content.shape == (*shape[:-2], packed_size(shape[-2] * shape[-1], bits))
    np.testing.assert_array_equal(unpack(content, bits, shape[-2:]), codes)


def test_the_first_code_is_in_the_lowest_bits():
    assert pack(np.array([[-2, -1, 0, 1]], np.int8), 2).tolist() == [0b11100100]


@pytest.mark.thorough
@pytest.mark.parametrize("bits", FEW)
@given(numbers=arrays(np.float32, (2, 1, 7), elements=NUMBERS))
def test_a_number_lies_within_half_a_step_where_it_is_not_clamped(bits, numbers):
    coded = quantise(jnp.asarray(numbers), bits)
    codes, step = np.asarray(coded.codes, np.float64), np.asarray(coded.step, np.float64)[:, None, None]
    inside = (numbers >= -(2.0 ** (bits - 1)) * step) & (numbers <= 2.0 ** (bits - 1) * step)
    error = np.abs((codes + 0.5) * step - numbers)
    assert (error <= step * (0.5 + 1e-5))[inside].all()
    # With 4 bits or more no number is clamped, unless the step underflows.
    assert bits < 4 or (inside | (step < 1e-37)).all()


def test_the_steps_are_those_that_are_stated():
    g = jnp.array([[[0.5, -3.0, 1.0, 2.0]]])
    expected = {1: 2 * 6.5 / 4, 2: 0.996 * np.sqrt((0.25 + 9 + 1 + 4) / 4), 4: 3 / 7.5, 8: 3 / 127.5}
    for bits, step in expected.items():
        np.testing.assert_allclose(quantise(g, bits).step, [step], rtol=1e-6)


@pytest.mark.parametrize(("bits", "gain"), [(1, 0.64), (2, 0.89), (4, 1.0), (8, 1.0)])
def test_rounding_shrinks_gaussian_scalars_by_one_gain(bits, gain):
    g = jax.random.normal(jax.random.key(0), (500, 1, 64))
    np.testing.assert_allclose((quantise(g, bits).decoded() * g).mean() / (g * g).mean(), gain, atol=0.01)


@pytest.mark.parametrize("bits", FEW)
def test_what_cannot_be_sent_is_not_a_number_and_what_underflows_is_zero(bits):
    # Two of the largest float32 numbers need a step that overflows for one bit; the other steps are finite.
    rows = [[jnp.nan, 1.0], [jnp.inf, 1.0], [3.4e38, 3.4e38], [0.0, 0.0], [1e-45, 0.0], [1.0, 2.0]]
    coded = quantise(jnp.array(rows, jnp.float32)[:, None], bits)
    finite = np.asarray(are_finite(coded))
    assert finite.tolist() == [False, False, bits != 1, True, True, True]
    assert (np.asarray(coded.codes)[:2] == 0).all()
    np.testing.assert_array_equal(coded.decoded()[3:5], 0)


def test_a_received_step_must_be_finite_and_not_negative():
    codes = jnp.zeros((4, 1, 3), jnp.int8)
    steps = jnp.array([1.0, -1.0, jnp.nan, jnp.inf])
    assert np.asarray(are_finite(fed.Coded(codes, steps, 2))).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "scalar_bits must be given, or `bytes_up`"),
        ({"scalar_bits": 2, "bytes_up": 20}, "scalar_bits must not be given beside `bytes_up`"),
        ({"scalar_bits": 3}, "scalar_bits must be one of 1, 2, 4, 8, 32, got 3"),
        ({"bytes_up": 0}, "bytes_up must be at least 1"),
        ({"scalar_bits": 2, "aggregate_bits": 2}, "aggregate_bits must be one of 4, 8, 32, got 2"),
        ({"scalar_bits": 2, "relay": "all"}, "relay must be messages or aggregate"),
        ({"scalar_bits": 2, "relay": "messages", "aggregate_bits": 8}, "must be 32 with relay messages"),
        ({"scalar_bits": 32, "relay": "messages"}, "relay must be aggregate for scalars of 32 bits"),
    ],
)
def test_bits_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fed.FewBits(**options)


def test_a_message_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="bytes_up must be at least 12 for 64 scalars a message, got 11"):
        fed.FewBits(bytes_up=11).bits_of(64)
    # In double precision the step takes eight bytes.
    assert [fed.FewBits(bytes_up=20).bits_of(64, itemsize) for itemsize in (4, 8)] == [2, 1]


def test_messages_are_told_of_a_mean_only():
    wire = fed.FewBits(scalar_bits=2, relay="messages")
    assert fed.Algorithm(hiso_jax.decomfl(0.1), wire=wire).wire is wire
    with pytest.raises(ValueError, match="relay must be aggregate unless the combiner is the mean"):
        fed.Algorithm(hiso_jax.decomfl(0.1), wire=wire, combine=channels.median())


def test_a_message_of_several_numbers_a_direction_fits_as_a_whole():
    """HiZOO sends a directional derivative and a curvature; once, each of the two took all of the bytes."""
    wire = fed.FewBits(bytes_up=20)
    messages = {"slope": jnp.ones((3, 1, 5)), "curvature": jnp.ones((3, 1, 5))}
    coded = wire.encode(messages)
    assert {part.bits for part in coded.values()} == {8}
    shapes = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], coded))
    assert wire.up(shapes) == 2 * (4 + 5) <= 20
    # One bit for each of 128 scalars, and two steps, do not fit.
    with pytest.raises(ValueError, match="bytes_up must be at least 24 for 128 scalars a message, got 20"):
        wire.bits_of([64, 64])
    assert wire.bits_of([32, 32]) == 1
