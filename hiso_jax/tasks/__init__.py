"""Tasks: a model, its loss and metrics, and its data."""

from hiso_jax.tasks.classification import Classification
from hiso_jax.tasks.digits import digits
from hiso_jax.tasks.mnist import mnist

__all__ = ["Classification", "digits", "mnist"]
