"""Models as pure functions; no training code."""

from hiso_jax.models.convolution import convolution
from hiso_jax.models.functional import Model, functional
from hiso_jax.models.vision import cnn, mlp

__all__ = ["Model", "cnn", "convolution", "functional", "mlp"]
