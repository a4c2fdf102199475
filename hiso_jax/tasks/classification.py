"""Classification of arrays: a model's two functions and two data splits make a task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from hiso_jax.tasks.splits import held_out


@dataclass(frozen=True)
class Classification:
    """A classification task over arrays, with cross-entropy loss; it satisfies ``hiso_jax.fed.Task``.

    Attributes:
      model_init: key → parameters.
      model_apply: (parameters, inputs [B, ...]) → logits [B, classes].
      train: {"input": [n, ...], "label": int [n]}.
      test: the same for the test split.
      name: what reports call it.
      target: the accuracy at which methods are compared, or None.
      metric: the one that counts.
    """

    model_init: Callable[[Key[Array, ""]], PyTree]
    model_apply: Callable[[PyTree, Any], Float[Array, "B classes"]]
    train: Mapping[str, Any]
    test: Mapping[str, Any]
    name: str = "classification"
    target: float | None = None
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        """Check the splits.

        Raises:
          ValueError: a split without "input" and "label", empty, or of unequal lengths.
        """
        for split in ("train", "test"):
            data = getattr(self, split)
            if set(data) != {"input", "label"}:
                raise ValueError(f'{split} must have the entries "input" and "label", got {sorted(data)}')
            if len(data["input"]) != len(data["label"]) or not len(data["label"]):
                raise ValueError(
                    f"{split} must have as many inputs as labels and at least one, "
                    f"got {len(data['input'])} and {len(data['label'])}"
                )

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The initial parameters."""
        return self.model_init(key)

    def loss(self, params: PyTree, batch: Mapping[str, Array]) -> Float[Array, "B"]:
        """The cross-entropy of each example, in float32 or wider."""
        logits = self.model_apply(params, batch["input"])
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    def metrics(self, params: PyTree, batch: Mapping[str, Array]) -> dict[str, Float[Array, "B"]]:
        """``loss`` and ``accuracy`` of each example."""
        logits = self.model_apply(params, batch["input"])
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]),
            "accuracy": (logits.argmax(-1) == batch["label"]).astype(jnp.float32),
        }

    def hold_out(self, examples: int, *, seed: int = 0) -> "Classification":
        """The same task with ``examples`` random training examples for its test split: for tuning.

        Raises:
          ValueError: ``examples`` does not leave both splits an example.
        """
        kept, held = held_out(self.train, examples, seed)
        return replace(self, train=kept, test=held)
