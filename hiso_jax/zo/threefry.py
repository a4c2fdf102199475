"""JAX's default generator, threefry 2x32 (Salmon et al., SC 2011), in a form that CPUs run nearly three times as fast.

On CPU JAX runs the twenty rounds of the hash in a loop, whose state goes through memory in every iteration. Unrolled,
they fuse with the draw that follows and its consumer into one pass over the output: the same bits, nearly three times
the speed, and no temporary as large as the draw (``docs/reference/benchmarks``). On accelerators JAX already
unrolls them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import define_prng_impl, threefry_prng_impl
from jaxtyping import Array, ArrayLike, Integer, Key, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def _rotate(x: UInt32[Array, "..."], distance: int) -> UInt32[Array, "..."]:
    return (x << jnp.uint32(distance)) | (x >> jnp.uint32(32 - distance))


# Jitted, so that it is traced once for each shape.
@jax.jit
def _hash(
    key: UInt32[Array, "2"], high: UInt32[Array, "..."], low: UInt32[Array, "..."]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Threefry 2x32 with 20 rounds of the counter (high, low)."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x, y = high + schedule[0], low + schedule[1]
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ _rotate(y, distance)
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def _fold_in(key: UInt32[Array, "2"], data: Any) -> UInt32[Array, "2"]:
    return jnp.stack(_hash(key, jnp.uint32(0), data))


def _split(key: UInt32[Array, "2"], shape: Sequence[int]) -> UInt32[Array, "... 2"]:
    low = lax.iota(jnp.uint32, math.prod(shape))
    return jnp.stack(_hash(key, jnp.zeros_like(low), low), axis=-1).reshape(*shape, 2)


def _random_bits(key: UInt32[Array, "2"], bit_width: int, shape: Sequence[int]) -> Array:
    size = math.prod(shape)
    if bit_width != 32 or size >= 2**32:
        return threefry_prng_impl.random_bits(key, bit_width, shape)
    low = lax.iota(jnp.uint32, size)
    x, y = _hash(key, jnp.zeros_like(low), low)
    return (x ^ y).reshape(shape)


_FUSED = define_prng_impl(
    key_shape=threefry_prng_impl.key_shape,
    seed=threefry_prng_impl.seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32_fused",
    tag="f3",
)


def drawn(draw: Callable[[Any, Sequence[int]], Array], key: Key[Array, ""], shape: Sequence[int]) -> Array:
    """``draw(key, shape)`` with the same bits, in the form that suits the platform of the lowered program.

    On CPU, XLA compiles the counters of a flat draw four times faster, because it has no index arithmetic of several
    axes, and the code is no slower. On GPUs a flat draw takes a tenth less memory in a large model's round. On TPUs it
    would be copied into the tiles of its shape. The hash itself is unrolled on CPU.

    Args:
      draw: (key, shape) → the draw; an element's bits depend only on the key and its place.
      key: a key of any generator.
      shape: the shape of the draw.
    """
    # The fused hash has the counter layout that is JAX's default.
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    if str(jax.random.key_impl(key)) != "threefry2x32" or not partitionable:
        return draw(key, shape)
    words, size = jax.random.key_data(key), math.prod(shape)
    return lax.platform_dependent(
        words,
        cpu=lambda words: draw(jax.random.wrap_key_data(words, impl=_FUSED), (size,)).reshape(shape),
        tpu=lambda words: draw(jax.random.wrap_key_data(words, impl=threefry_prng_impl), shape),
        default=lambda words: draw(jax.random.wrap_key_data(words, impl=threefry_prng_impl), (size,)).reshape(shape),
    )


def fold_in(key: Key[Array, ""], data: Integer[ArrayLike, ""]) -> Key[Array, ""]:
    """``jax.random.fold_in(key, data)``, the same key, with the hash unrolled.

    On CPU JAX's hash is a loop whose steps are small programs, and a round derives a key for every client, local step,
    direction and parameter. On the digits rounds a second were 1.05 to 1.22 times as many without the loop, by method
    (``docs/reference/benchmarks/speed.md``).

    Args:
      key: a scalar key; one of another generator than threefry is folded by JAX.
      data: an integer of 32 bits; a traced one may be signed.

    Returns:
      The scalar key that ``jax.random.fold_in`` gives, bit for bit.

    Raises:
      OverflowError: ``data`` is a Python integer outside 0 ≤ data < 2³².
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or str(jax.random.key_impl(key)) != "threefry2x32":
        return jax.random.fold_in(key, data)
    words = _fold_in(jax.random.key_data(key), jnp.asarray(data, jnp.uint32))
    return jax.random.wrap_key_data(words, impl="threefry2x32")
