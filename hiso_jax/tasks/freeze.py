"""A task of which a part of the parameters is trained and the rest stays as it began."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from jaxtyping import Array, Float, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError


@dataclass(frozen=True)
class Partial:
    """A task whose trained parameters are some entries of another's; see :func:`train_only`."""

    task: Any
    names: tuple[str, ...]
    frozen: Mapping[str, PyTree]

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The trained entries as the task begins them."""
        whole = self.task.init(key)
        return {name: whole[name] for name in self.names}

    def loss(self, params: PyTree, batch: Any, frozen: Mapping[str, PyTree]) -> Float[Array, "B"]:
        """The task's loss, with what is not trained put back."""
        return self.task.loss({**frozen, **params}, batch)

    def metrics(self, params: PyTree, batch: Any, frozen: Mapping[str, PyTree]) -> Mapping[str, Shaped[Array, "B ..."]]:
        """The task's metrics, likewise."""
        return self.task.metrics({**frozen, **params}, batch)

    def __getattr__(self, name: str) -> Any:
        """All else is the task's."""
        # What copies or unpickles asks before there is a task.
        if name == "task" or name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.task, name)
        return self._held_out_by(found) if name == "hold_out" else found

    def _held_out_by(self, hold_out: Callable[..., Any]) -> Callable[..., "Partial"]:
        def held(examples: int, **given: Any) -> Partial:
            return replace(self, task=hold_out(examples, **given))

        return held


def train_only(task: Any, *names: str, params: Mapping[str, PyTree] | None = None, seed: int = 0) -> Partial:
    """The same task, of which only some top-level entries of the parameters are trained.

    Directions are made, and curvature is kept, for those alone.

    Args:
      task: whose parameters are a dict.
      names: the entries that are trained.
      params: the whole parameters to keep the others of, of a pretrained model say; by default ``task.init``'s.
      seed: of ``task.init``, without ``params``.

    Raises:
      ValueError: the parameters are no dict, or lack one of the names, or all are named.

    Example:
      >>> import jax
      >>> from hiso_jax import tasks
      >>> task = tasks.train_only(tasks.digits(), "output")
      >>> list(task.init(jax.random.key(0)))
      ['output']
    """
    whole = task.init(jax.random.key(seed)) if params is None else params
    if not isinstance(whole, Mapping):
        raise ParameterError("task", f"must have a dict of parameters to train a part of, got a {type(whole).__name__}")
    unknown = [name for name in names if name not in whole]
    if unknown or not names or len(set(names)) == len(whole):
        raise ParameterError(
            "names", f"must be some, and not all, of {', '.join(map(str, whole))}; got {', '.join(names)}"
        )
    return Partial(task, tuple(dict.fromkeys(names)), {name: whole[name] for name in whole if name not in names})
