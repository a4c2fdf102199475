"""Text tasks with shapes instead of data and parameters: nothing is loaded."""

from typing import Any

import jax
import numpy as np

from hiso_jax.checks import ParameterError
from hiso_jax.models.lm import Tuned
from hiso_jax.tasks.text.choice import TextChoice
from hiso_jax.tasks.text.encode import check_length
from hiso_jax.tasks.text.generation import TextGeneration
from hiso_jax.tasks.text.prompts import SOURCES
from hiso_jax.tasks.text.tasks import DEFAULT_MAX_LENGTH, GENERATION, NEW_TOKENS, SCORINGS

ROWS = (8192, 1000)


def text_shapes(
    name: str,
    model: Tuned,
    *,
    classes: int = 2,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    rows: tuple[int, int] = ROWS,
) -> TextChoice | TextGeneration:
    """A text task of shapes, in which every prompt has the greatest length.

    Args:
      name: the name of the task.
      model: the result of :func:`hiso_jax.models.lm.tuned_shapes`.
      classes: the number of classes, for classification.
      max_length: tokens of a text, prompt and answer together; by default the task's or the model's, whichever is less.
      max_new_tokens: tokens of an answer, for generation.
      rows: the numbers of training and test rows.

    Raises:
      ValueError: texts exceed the model's positions, or an answer leaves no room for its prompt.
    """
    source, config = SOURCES.get(name), model.decoder.config
    most = config.max_positions - model.decoder.adapters.prefix
    length = (
        min(DEFAULT_MAX_LENGTH if source is None else source.max_length, most) if max_length is None else max_length
    )
    answer = (max_new_tokens or NEW_TOKENS[name]) if name in GENERATION else 0
    check_length(length, model)
    if answer and not answer < length:
        raise ParameterError("max_new_tokens", f"must be at least 1 and below `max_length`, {length}, got {answer}")
    # A prompt is cut so that its answer fits after it.
    width = length

    def split(count: int) -> dict[str, Any]:
        own = {"tokens": (count, width), "length": (count,), ("answer" if answer else "label"): (count,)}
        return {entry: jax.ShapeDtypeStruct(shape, np.int32) for entry, shape in own.items()}

    data: dict[str, Any] = {"train": split(rows[0]), "test": split(rows[1])}
    if not answer:
        return TextChoice(model=model, words=tuple(range(classes)), buckets=(width,), name=name, **data)
    return TextGeneration(
        model=model,
        tokenizer=None,
        buckets=(width,),
        answer_length=answer,
        max_new_tokens=answer,
        stop_tokens=(),
        scoring=SCORINGS.get(name, "span"),
        golden=(),
        name=name,
        **data,
    )
