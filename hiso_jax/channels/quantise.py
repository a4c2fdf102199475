"""Scalars in a few bits each (DZOFL, arXiv 2409.16456): a step and codes, up and, of an aggregate, down."""

from hiso_jax.fed.algorithm import FewBits, Wire


def quantise() -> Wire:
    """Eight bits a scalar, unless an option says otherwise."""
    return FewBits(scalar_bits=8)
