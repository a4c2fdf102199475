"""What the federation needs to know of a task, and no more."""

from collections.abc import Mapping
from typing import Any, Protocol

from jaxtyping import Array, Float, Key, PyTree


class Task(Protocol):
    """A model, its loss, its metrics and its data. Any object with these members will do.

    ``train`` and ``test`` are pytrees of arrays that share their leading axis, the examples; a batch is the same
    pytree with B examples.
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

    def metrics(self, params: PyTree, batch: Any) -> Mapping[str, Float[Array, "B"]]:
        """Named metrics of each example; they are reported as means over ``test``."""
