"""Rewards of generated text that are computed by Python on the host."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from hiso_jax.checks import ParameterError, first_line, function
from hiso_jax.tasks.text.generation import TextGeneration, prompts_of

Score = Callable[[str, str, str], float]
"""(prompt, the model's answer, the training target) → a reward."""
Value = Callable[[Mapping[str, Array], Mapping[str, Array]], Float[Array, "B"]]
"""(metrics of a batch by name, batch) → a value of each example, as :data:`hiso_jax.fed.Value`."""


@dataclass(frozen=True)
class TextReward:
    """A reward of texts; :func:`hiso_jax.fed.maximise` makes it a value of a generation task.

    Attributes:
      score: (prompt, answer, target) → number.
      is_on_host: True: each evaluation waits for Python.
    """

    score: Score
    is_on_host: bool = True

    def of_task(self, task: Any) -> Value:
        """The reward of each example of ``task``, whose tokenizer gives the texts.

        Raises:
          ParameterError: the task generates no text, or the reward fails for the first training example.
        """
        if not isinstance(task, TextGeneration):
            raise ParameterError(
                "objective",
                "must be of a task that generates text (squad, drop, xsum, chat) for a reward of text; "
                f"{getattr(task, 'name', type(task).__name__)} generates none",
            )
        if not isinstance(task.train["tokens"], np.ndarray):
            # Shapes alone have no texts.
            return self._value_of(task)
        first = jax.tree.map(lambda a: a[:1], task.train)
        self._scores(task, *self._given(first, first["tokens"][:, -1:]))
        return self._value_of(task)

    def _value_of(self, task: TextGeneration) -> Value:
        def value(metrics: Mapping[str, Array], batch: Mapping[str, Array]) -> Float[Array, "B"]:
            given = self._given(batch, metrics["generated"])
            shape = jax.ShapeDtypeStruct(given[0].shape[:1], np.float32)
            return jax.pure_callback(
                lambda *arrays: self._scores(task, *map(np.asarray, arrays)), shape, *given, vmap_method="sequential"
            )

        return value

    @staticmethod
    def _given(batch: Mapping[str, Any], generated: Any) -> tuple[Any, ...]:
        """Prompts and their lengths, generated tokens, and prompts with targets and the lengths of these."""
        return (*prompts_of(batch), generated, batch["tokens"], batch["answer"])

    def _scores(
        self,
        task: TextGeneration,
        prompts: np.ndarray,
        lengths: np.ndarray,
        generated: np.ndarray,
        tokens: np.ndarray,
        answers: np.ndarray,
    ) -> np.ndarray:
        read, width, whole = task.tokenizer.decode, prompts.shape[1], tokens.shape[1]
        own = [read(row[width - n :], skip_special_tokens=True) for row, n in zip(prompts, lengths, strict=True)]
        wanted = [read(row[whole - n :], skip_special_tokens=True) for row, n in zip(tokens, answers, strict=True)]
        rows = zip(own, task.answers(generated), map(str.strip, wanted), strict=True)
        return np.array([self._one(*row) for row in rows], np.float32)

    def _one(self, prompt: str, answer: str, target: str) -> float:
        try:
            return float(self.score(prompt, answer, target))
        except Exception as error:
            raise ParameterError(
                "objective",
                f"must return a number for prompt, answer and target; it fails for the answer {answer[:60]!r} "
                f"({type(error).__name__}: {first_line(error)})",
            ) from error


def text_reward(score: Score) -> TextReward:
    """A reward of generated text as an objective; it is maximised.

    Each evaluation of a batch waits until Python has scored it, also on an accelerator. A function of tokens,
    ``(metrics, batch) → [B]`` with ``metrics["generated"]``, is compiled instead.

    Args:
      score: ``(prompt, answer, target) → number``, called for each example with the prompt's text, the model's answer
        and the answer of the training data. It must depend on nothing else, or a run cannot be resumed to the same
        bits.

    Raises:
      ParameterError: ``score`` is not a function of three arguments.

    Example:
      >>> from hiso_jax.tasks.text import text_reward
      >>> def brief(*, words: int = 5):
      ...     return text_reward(lambda prompt, answer, target: -abs(len(answer.split()) - words))
    """
    function("score", score, "prompt, answer, target")
    return TextReward(score)
