"""A task that trains a part of its parameters and keeps the rest at their initial values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from jaxtyping import Array, Float, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError


@dataclass(frozen=True)
class Partial:
    """A task that trains some entries of another task's parameters; see :func:`train_only`."""

    task: Any
    names: tuple[str, ...]
    frozen: Mapping[str, PyTree]

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The initial values of the trained entries."""
        whole = self.task.init(key)
        return {name: whole[name] for name in self.names}

    def loss(self, params: PyTree, batch: Any, frozen: Mapping[str, PyTree]) -> Float[Array, "B"]:
        """The task's loss, computed with the trained and the frozen entries."""
        return self.task.loss({**frozen, **params}, batch)

    def metrics(self, params: PyTree, batch: Any, frozen: Mapping[str, PyTree]) -> Mapping[str, Shaped[Array, "B ..."]]:
        """The task's metrics, computed with the trained and the frozen entries."""
        return self.task.metrics({**frozen, **params}, batch)

    def __getattr__(self, name: str) -> Any:
        """Every other attribute is the task's."""
        # copy and pickle look attributes up before ``task`` is set.
        if name == "task" or name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.task, name)
        return self._held_out_by(found) if name == "hold_out" else found

    def _held_out_by(self, hold_out: Callable[..., Any]) -> Callable[..., "Partial"]:
        def held(examples: int, **given: Any) -> Partial:
            return replace(self, task=hold_out(examples, **given))

        return held


def train_only(task: Any, *names: str, params: Mapping[str, PyTree] | None = None, seed: int = 0) -> Any:
    """The same task, in which only some top-level entries of the parameters are trained.

    Only these entries have directions and curvature.

    Args:
      task: a task whose parameters are a dict.
      names: the entries that are trained.
      params: all parameters, from which the frozen entries are taken, for example of a pretrained model; by default
        those of ``task.init``.
      seed: the seed of ``task.init``, used without ``params``.

    Raises:
      ValueError: the parameters are not a dict, or ``names`` is empty, has an unknown name, or has all names.

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
