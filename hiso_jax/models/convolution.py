"""Convolutions and max-pools with fast derivatives on CPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

Pads = tuple[tuple[int, int], tuple[int, int]]
LAYOUT = ("NHWC", "HWIO", "NHWC")
# The arguments that the derivative knows; with any other, XLA's is taken.
KNOWN = (
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "precision",
    "preferred_element_type",
)


def convolution(
    inputs: Float[Array, "B H W C"],
    kernel: Float[Array, "h w C F"],
    strides: Any,
    padding: Any,
    **rest: Any,
) -> Float[Array, "B H2 W2 F"]:
    """``lax.conv_general_dilated`` with a fast derivative, for ``nnx.Conv(…, conv_general_dilated=convolution)``.

    The value has the bits of ``lax.conv_general_dilated``; where a derivative is taken on CPU, too, it is equal up to
    rounding. On CPU, XLA computes the derivative of a convolution by plain loops when it stands inside a loop over
    clients or local steps. There this function differentiates a matrix product over patches instead: the gradients of 8
    clients with 32 images each, of the MNIST network, take 0.12 s in place of 1.2 s (``docs/reference/benchmarks``).
    Other platforms and other layouts keep the derivative of XLA.

    Args:
      inputs: images.
      kernel: weights.
      strides: one step for each spatial axis.
      padding: ``"SAME"``, ``"VALID"``, or (low, high) for each spatial axis.
      rest: the other arguments of ``lax.conv_general_dilated``; with dilation, groups or other dimensions it is called
        as it is.
    """

    def plain() -> Array:
        return lax.conv_general_dilated(inputs, kernel, strides, padding, **rest)

    ones = all(tuple(rest.get(name) or (1, 1)) == (1, 1) for name in ("lhs_dilation", "rhs_dilation"))
    grouped = rest.get("feature_group_count", 1) != 1 or rest.get("batch_group_count", 1) != 1
    is_known = inputs.ndim == 4 and _is_layout(inputs, kernel, rest.get("dimension_numbers"))
    others = [value for name, value in rest.items() if name not in KNOWN and value is not None]
    if strides is None or not is_known or not ones or grouped or others:
        return plain()
    pads = (
        lax.padtype_to_pads(inputs.shape[1:3], kernel.shape[:2], strides, padding)
        if isinstance(padding, str)
        else padding
    )
    reach = [size + sum(pair) - own for size, own, pair in zip(inputs.shape[1:3], kernel.shape[:2], pads, strict=True)]
    if min(map(min, pads)) < 0 or min(reach) < 0:
        # Cropped inputs, or an empty output.
        return plain()
    precision, wider = rest.get("precision"), rest.get("preferred_element_type")
    return _convolved(inputs, kernel, tuple(strides), tuple(map(tuple, pads)), precision, wider)


def _is_layout(inputs: Array, kernel: Array, numbers: Any) -> bool:
    return lax.conv_dimension_numbers(inputs.shape, kernel.shape, numbers) == lax.conv_dimension_numbers(
        inputs.shape, kernel.shape, LAYOUT
    )


def _plain(inputs: Array, kernel: Array, strides: tuple[int, int], pads: Pads, precision: Any, wider: Any) -> Array:
    return lax.conv_general_dilated(
        inputs,
        kernel,
        strides,
        pads,
        dimension_numbers=LAYOUT,
        precision=precision,
        preferred_element_type=wider,
    )


_convolved = partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))(_plain)


@_convolved.defjvp
def _derivative(
    strides: tuple[int, int],
    pads: Pads,
    precision: Any,
    wider: Any,
    primals: tuple[Array, Array],
    tangents: tuple[Array, Array],
) -> tuple[Array, Array]:
    def of_patches(inputs: Array, kernel: Array, moved: Array, turned: Array) -> tuple[Array, Array]:
        def product(rows: Array, kernel: Array) -> Array:
            flat = kernel.reshape(-1, kernel.shape[-1])
            return jnp.matmul(rows, flat, precision=precision, preferred_element_type=wider)

        rows = _patches(inputs, kernel.shape[:2], strides, pads)
        along = product(_patches(moved, kernel.shape[:2], strides, pads), kernel)
        return product(rows, kernel), along + product(rows, turned)

    def of_convolutions(inputs: Array, kernel: Array, moved: Array, turned: Array) -> tuple[Array, Array]:
        def plain(inputs: Array, kernel: Array) -> Array:
            return _plain(inputs, kernel, strides, pads, precision, wider)

        return plain(inputs, kernel), plain(moved, kernel) + plain(inputs, turned)

    return lax.platform_dependent(*primals, *tangents, cpu=of_patches, default=of_convolutions)


def _patches(inputs: Array, window: tuple[int, ...], strides: tuple[int, int], pads: Pads) -> Float[Array, "B H W hwC"]:
    """The h×w window around every output, flattened; slices, whose derivative is a sum of padded slices."""
    padded = jnp.pad(inputs, ((0, 0), *pads, (0, 0)))
    ends = [(size - own) // step * step + 1 for size, own, step in zip(padded.shape[1:3], window, strides, strict=True)]
    offsets = [(i, j) for i in range(window[0]) for j in range(window[1])]
    cut = [padded[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]] for i, j in offsets]
    return jnp.concatenate(cut, -1)


def max_pool(inputs: Float[Array, "B H W C"], window: tuple[int, int]) -> Float[Array, "B H/h W/w C"]:
    """The maximum over windows that do not overlap: ``nnx.max_pool(inputs, window, window)`` with a fast derivative.

    Value and derivative have the bits of ``nnx.max_pool``: the derivative goes to the first maximum of a window. XLA
    computes that by a loop over windows on CPU; here it is a selection between strided slices, fifteen times as
    fast (``docs/reference/benchmarks``).

    Args:
      inputs: images; rows and columns beyond the last complete window are dropped.
      window: its height and width.
    """
    (height, width), (tall, wide) = inputs.shape[1:3], window
    return _pooled(inputs[:, : height - height % tall, : width - width % wide], window)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _pooled(inputs: Array, window: tuple[int, int]) -> Array:
    return nnx.max_pool(inputs, window, window)


@_pooled.defjvp
def _pooled_derivative(window: tuple[int, int], primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    def slices(array: Array) -> list[Array]:
        return [array[:, i :: window[0], j :: window[1]] for i in range(window[0]) for j in range(window[1])]

    (best, *values), (chosen, *moved) = slices(*primals), slices(*tangents)
    for value, move in zip(values, moved, strict=True):
        later = value > best
        best, chosen = jnp.where(later, value, best), jnp.where(later, move, chosen)
    return best, chosen
