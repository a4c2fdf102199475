"""Tasks: a model, its loss and metrics, and its data. ``tasks.text``, for language models, is imported at first use."""

from importlib import import_module
from types import ModuleType

from hiso_jax.tasks.classification import Classification
from hiso_jax.tasks.digits import digits, digits_network
from hiso_jax.tasks.freeze import Partial, train_only
from hiso_jax.tasks.images import cifar10, cifar10_shapes, image_classification
from hiso_jax.tasks.mnist import fashion_mnist, mnist, mnist_network, mnist_shapes

NETWORKS = {"digits": digits_network, "mnist": mnist_network, "fashion-mnist": mnist_network}


def __getattr__(name: str) -> ModuleType:
    """Import ``text`` at its first use, because it imports tokenizers."""
    if name == "text":
        return import_module("hiso_jax.tasks.text")
    raise AttributeError(f"{__name__} has no attribute {name!r}")


__all__ = [
    "NETWORKS",
    "Classification",
    "Partial",
    "cifar10",
    "cifar10_shapes",
    "digits",
    "fashion_mnist",
    "image_classification",
    "mnist",
    "mnist_shapes",
    "train_only",
]
