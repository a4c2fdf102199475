"""Models as pure functions; no training code. ``models.lm``, language models, is imported at its first use."""

from importlib import import_module
from types import ModuleType

from hiso_jax.models.convolution import convolution, max_pool
from hiso_jax.models.functional import Model, functional
from hiso_jax.models.vision import cnn, lenet, mlp, resnet18


def __getattr__(name: str) -> ModuleType:
    """Import ``lm`` at its first use, because it imports readers of checkpoints."""
    if name == "lm":
        return import_module("hiso_jax.models.lm")
    raise AttributeError(f"{__name__} has no attribute {name!r}")


__all__ = ["Model", "cnn", "convolution", "functional", "lenet", "max_pool", "mlp", "resnet18"]
