"""Scalars in a few bits each (DZOFL, arXiv 2409.16456): a step and codes, in messages and optionally in aggregates."""

from hiso_jax.fed.algorithm import FewBits, Wire


def quantise() -> Wire:
    """Eight bits a scalar by default."""
    return FewBits(scalar_bits=8)
