"""Scalars as codes of a few bits, with one quantisation step for each message.

A message of n scalars in b bits is a step a and n codes c = ⌊g / a⌋, clamped to −2^{b−1} … 2^{b−1} − 1; the decoded
scalars are (c + ½)·a. The noise of a direction is much larger than this rounding (DZOFL, arXiv 2409.16456). The scalars
of one client have similar scales, so rounding shrinks all of them by one gain: 0.64, 0.89 and 1 for 1, 2 and more bits.
The learning rate compensates for the gain.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int8, PyTree, Shaped

from hiso_jax.zo import directional_derivatives, pin

# The step for 2 bits in units of the root mean square: the optimum for Gaussian scalars.
TWO_BIT_STEP = 0.996


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coded:
    """Scalars [..., K, P] in few bits.

    The arrays are on the device or in the host's memory.

    Attributes:
      codes: int8 [..., K, P].
      step: a, one for all K·P codes, [...]; NaN if the scalars cannot be sent.
      bits: b, the bits of a code.
    """

    codes: Any
    step: Any
    bits: int = field(metadata={"static": True})

    def decoded(self) -> Float[Array, "... K P"]:
        """The scalars (c + ½)·a, in the step's dtype."""
        step = jnp.asarray(self.step)
        return pin((jnp.asarray(self.codes).astype(step.dtype) + 0.5) * step[..., None, None])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Relayed:
    """The codes of a round's valid clients, broadcast in place of their aggregate.

    The server weights a client's step once: a'_i = a_i w_i φ_i G / W, so that (c + ½)·a' is the client's part of ĝ.

    Attributes:
      codes: int8 [..., C, K, P]; 0 for a client that is not valid.
      step: a' [..., C]; 0 for a client that is not valid.
      valid: mask of the valid clients, [..., C].
      bits: b, the bits of a code.
    """

    codes: Any
    step: Any
    valid: Any
    bits: int = field(metadata={"static": True})

    def decoded(self, groups: int) -> Float[Array, "K GP"]:
        """ĝ [K, G·P]: the parts of every group's clients, added in the cohort's order."""
        parts = Coded(self.codes, self.step, self.bits).decoded()
        clients, steps, perturbations = parts.shape
        turns = -(-clients // groups)
        whole = jnp.pad(parts, ((0, turns * groups - clients), (0, 0), (0, 0)))
        rows = whole.reshape(turns, groups, steps, perturbations)
        zero = jnp.zeros(rows.shape[1:], rows.dtype)
        total = lax.scan(lambda total, row: (pin(total + row), None), zero, rows)[0]
        return jnp.moveaxis(total, 0, 1).reshape(steps, groups * perturbations)


def is_coded(node: Any) -> bool:
    """Whether ``node`` is a tree leaf of coded scalars."""
    return isinstance(node, Coded | Relayed)


def decoded(messages: PyTree) -> PyTree:
    """The messages, with coded messages decoded to scalars."""
    return jax.tree.map(lambda m: m.decoded() if isinstance(m, Coded) else m, messages, is_leaf=is_coded)


def received(aggregate: PyTree, groups: int) -> PyTree:
    """The optimizer's input, decoded from a broadcast aggregate: ĝ [K, G·P], or a tree."""

    def one(node: Any) -> Any:
        return node.decoded(groups) if isinstance(node, Relayed) else decoded(node)

    return jax.tree.map(one, aggregate, is_leaf=is_coded)


def are_finite(messages: PyTree[Shaped[Array, "C ..."]]) -> Bool[Array, "C"]:
    """The mask of clients whose messages hold only finite values and no negative step."""

    def one(message: Any) -> Bool[Array, "C"]:
        numbers = decoded(message)
        finite = jnp.isfinite(numbers).reshape(len(numbers), -1).all(1)
        return finite & (message.step >= 0) if isinstance(message, Coded) else finite

    return jnp.stack([one(m) for m in jax.tree.leaves(messages, is_leaf=is_coded)]).all(0)


def by_message(function: Callable[[Array], PyTree], messages: Shaped[Array, "C ..."]) -> PyTree:
    """Apply ``function`` to one message after the other.

    The loop has at least two iterations: sums are then compiled apart from the surrounding code, and have the same last
    bit in every program.
    """
    count = len(messages)
    rows = jnp.pad(messages, [(0, max(2 - count, 0))] + [(0, 0)] * (messages.ndim - 1), mode="edge")
    return jax.tree.map(lambda x: x[:count], lax.map(function, rows))


def root_mean_square(numbers: Float[Array, "..."]) -> Float[Array, ""]:
    """The root mean square, computed in units of the largest magnitude, because its square may overflow a float."""
    largest = jnp.abs(numbers).max()
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(jnp.square(numbers / unit).mean())


def _step(numbers: Float[Array, "..."], bits: int) -> Float[Array, ""]:
    if bits == 1:
        return 2 * jnp.abs(numbers).mean()
    if bits == 2:
        return TWO_BIT_STEP * root_mean_square(numbers)
    return jnp.abs(numbers).max() / (2 ** (bits - 1) - 0.5)


def quantise(messages: Float[Array, "C K P"], bits: int) -> Coded:
    """Quantise messages to ``bits`` bits; a message with a non-finite scalar or an overflowing step gets step NaN."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def one(numbers: Float[Array, "K P"]) -> tuple[Array, Array]:
        step = _step(numbers, bits)
        step = jnp.where(jnp.isfinite(numbers).all() & jnp.isfinite(step), step, jnp.nan)
        # If the step underflows to 0, every code and every decoded scalar is 0.
        codes = jnp.clip(jnp.floor(numbers / jnp.where(step > 0, step, 1)), low, high)
        return jnp.where(step > 0, codes, 0).astype(jnp.int8), step

    codes, step = by_message(one, messages)
    return Coded(codes, step, bits)


def offsets_of(scalars: PyTree, valid: Bool[np.ndarray, "R C"]) -> list[Float[np.ndarray, "v"]]:
    """Mean / standard deviation of the scalars of every valid message, round by round, in the host's memory.

    For random directions it is about 0; forward differences add μ·tr(∇²f)/2 to every scalar.

    Args:
      scalars: the scalars of some rounds, [R, C, K, P], or coded; if a direction has several estimates, the
        directional derivatives are used.
      valid: mask of the messages that count.

    Returns:
      One array for each round; an empty list if no scalars are kept, or a message has fewer than two.
    """
    own = directional_derivatives(scalars)
    if isinstance(own, Coded):
        own = (own.codes + 0.5) * own.step[..., None, None]
    if own is None or own[0, 0].size < 2:
        return []
    found = []
    for row, counted in zip(np.asarray(own, np.float64), np.asarray(valid), strict=True):
        messages = row[counted].reshape(np.count_nonzero(counted), row[0].size)
        spread = messages.std(1)
        found.append(messages.mean(1) / np.where(spread > 0, spread, 1))
    return found


def zeros_of(scalars: PyTree, valid: Bool[np.ndarray, "R C"]) -> tuple[int, int]:
    """How many scalars of the valid messages are zero, and how many there are; (0, 0) if none are kept.

    A message of codes is zero as a whole, when its step is.
    """
    own = directional_derivatives(scalars)
    if own is None:
        return 0, 0
    if isinstance(own, Coded):
        each = math.prod(own.codes.shape[2:])
        return each * int((np.asarray(own.step) == 0)[valid].sum()), each * int(np.sum(valid))
    counted = np.asarray(own)[valid]
    return int((counted == 0).sum()), counted.size


# ---------------------------------------------------------------- bytes


def packed_size(count: int, bits: int) -> int:
    """The bytes that ``count`` codes of ``bits`` bits need."""
    return -(-count * bits // 8)


def pack(codes: Int8[np.ndarray, "... K P"], bits: int) -> np.ndarray:
    """Pack codes into bytes, uint8 [..., n]: c + 2^{b−1} in b bits, the first code in the first byte's lowest bits."""
    outer, count = codes.shape[:-2], math.prod(codes.shape[-2:])
    rows = np.asarray(codes).reshape(*outer, count).astype(np.int16) + 2 ** (bits - 1)
    each = (rows[..., None] >> np.arange(bits)) & 1
    return np.packbits(each.reshape(*outer, count * bits).astype(np.uint8), axis=-1, bitorder="little")


def unpack(content: np.ndarray, bits: int, shape: Sequence[int]) -> Int8[np.ndarray, "... K P"]:
    """The inverse of :func:`pack`; ``shape`` is (K, P)."""
    count = math.prod(shape)
    each = np.unpackbits(content, axis=-1, count=count * bits, bitorder="little")
    values = (each.reshape(*content.shape[:-1], count, bits).astype(np.int16) << np.arange(bits)).sum(-1)
    return (values - 2 ** (bits - 1)).astype(np.int8).reshape(*content.shape[:-1], *shape)
