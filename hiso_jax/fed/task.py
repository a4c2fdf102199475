"""What the federation needs to know of a task, and no more."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Float, Key, PyTree, Shaped


class Task(Protocol):
    """A model, its loss, its metrics and its data. Any object with these members will do.

    ``train`` and ``test`` are pytrees of arrays that share their leading axis, the examples; a batch is the same
    pytree with B examples.

    Two members are optional. ``frozen``, a pytree of arrays, holds what the model needs and nobody trains: it then is
    the third argument of ``loss`` and ``metrics``. ``summarise(outputs)`` turns what ``metrics`` gave for every test
    example, {name: array [n, ...]}, into the reported {name: number}; without it they are means.
    """

    @property
    def train(self) -> PyTree:
        """The training examples, partitioned among the clients."""

    @property
    def test(self) -> PyTree:
        """The examples on which ``metrics`` are reported."""

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The initial parameters: a pytree of floating-point arrays."""

    def loss(self, params: PyTree, batch: Any) -> Float[Array, "B"]:
        """The loss of each example."""

    def metrics(self, params: PyTree, batch: Any) -> Mapping[str, Shaped[Array, "B ..."]]:
        """Named metrics of each example; they are reported as means over ``test`` unless ``summarise`` says how."""


def frozen_of(task: Task) -> PyTree | None:
    """What the task's model needs beside its trained parameters, or None."""
    return getattr(task, "frozen", None)


def bind(function: Callable[..., Any], frozen: PyTree | None) -> Callable[[PyTree, Any], Any]:
    """A task's ``loss`` or ``metrics`` as a function of trained parameters and batch."""
    return function if frozen is None else lambda params, batch: function(params, batch, frozen)


def summarise(task: Task, outputs: Mapping[str, Shaped[np.ndarray, "n ..."]]) -> dict[str, float]:
    """The reported metrics from those of every test example."""
    reduce = getattr(task, "summarise", None)
    if reduce is None:
        return {name: float(np.mean(values, dtype=np.float64)) for name, values in outputs.items()}
    return {name: float(value) for name, value in reduce(outputs).items()}
