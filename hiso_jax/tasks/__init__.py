"""Tasks: a model, its loss and metrics, and its data."""

from hiso_jax.tasks.classification import Classification
from hiso_jax.tasks.digits import digits, digits_network
from hiso_jax.tasks.freeze import Partial, train_only
from hiso_jax.tasks.mnist import fashion_mnist, mnist, mnist_network, mnist_shapes

NETWORKS = {"digits": digits_network, "mnist": mnist_network, "fashion-mnist": mnist_network}

__all__ = ["NETWORKS", "Classification", "Partial", "digits", "fashion_mnist", "mnist", "mnist_shapes", "train_only"]
