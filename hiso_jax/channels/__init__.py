"""What may happen to messages between clients and server, and how they become one: one file each.

A channel is a factory named as its file, ``name(*, options)``; its keywords are its options on the command line. What
it returns, a :data:`~hiso_jax.fed.algorithm.Send` or a :data:`~hiso_jax.fed.algorithm.Combine`, its annotation says.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_type_hints

from hiso_jax.fed.algorithm import Send

NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
FACTORIES: dict[str, Callable[..., Any]] = {name: getattr(import_module(f"{__name__}.{name}"), name) for name in NAMES}
globals().update(FACTORIES)
if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]:
        """A channel's factory is found under its file's name."""


__all__ = ["FACTORIES", "NAMES", "is_send", *NAMES]


def is_send(factory: Callable[..., Any]) -> bool:
    """Whether a factory makes what happens to messages on their way, and not how they become one."""
    return get_type_hints(factory)["return"] == Send
