"""Scores of generated tokens against wanted ones, inside a compiled program: what a run can maximise."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_f1(
    generated: Int[Array, "B N"], kept: Bool[Array, "B N"], golden: Int[Array, "B A"], wanted: Bool[Array, "B A"]
) -> Float[Array, "B"]:
    """2·|shared| / (|generated| + |golden|) of two bags of tokens; 1 if both are empty (SQuAD's F1, of tokens).

    Args:
      generated: generated tokens.
      kept: which of them count.
      golden: wanted tokens.
      wanted: which of them count.
    """
    # A token is shared if fewer equal ones stand before it than the wanted tokens have.
    alike = (generated[:, :, None] == generated[:, None, :]) & kept[:, None, :]
    before = jnp.tril(alike, -1).sum(2)
    there = ((generated[:, :, None] == golden[:, None, :]) & wanted[:, None, :]).sum(2)
    shared = (kept & (before < there)).sum(1)
    counts = kept.sum(1) + wanted.sum(1)
    return jnp.where(counts > 0, 2 * shared / jnp.maximum(counts, 1), 1.0).astype(jnp.float32)


def exact_match(
    generated: Int[Array, "B N"], kept: Bool[Array, "B N"], golden: Int[Array, "B A"], wanted: Bool[Array, "B A"]
) -> Bool[Array, "B"]:
    """Whether the tokens that count are the same in the same order; see :func:`token_f1` for the arguments."""
    place, wish = jnp.cumsum(kept, 1), jnp.cumsum(wanted, 1)
    met = kept[:, :, None] & wanted[:, None, :] & (place[:, :, None] == wish[:, None, :])
    differ = met & (generated[:, :, None] != golden[:, None, :])
    return (kept.sum(1) == wanted.sum(1)) & ~differ.any((1, 2))
