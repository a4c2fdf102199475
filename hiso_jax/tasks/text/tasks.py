"""Text tasks by name: data, prompts and a language model made into a task."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from hiso_jax.checks import ParameterError, integer
from hiso_jax.models.lm import Pretrained, Tuned
from hiso_jax.tasks.text.choice import TextChoice, text_choice
from hiso_jax.tasks.text.data import (
    given_rows,
    label_names,
    load_rows,
    number_labels,
    numbered_clients,
    plain_label,
    sample_rows,
    with_labels,
    with_text,
)
from hiso_jax.tasks.text.generation import TextGeneration, text_generation
from hiso_jax.tasks.text.prompts import SOURCES, Prompt, PromptSet, Row, checked_words, prompt_for, user_prompt

TEXT_CLASSIFICATION = "text-classification"
CLASSIFICATION = ("sst2", "qqp", "rte", "boolq", "cb", "wic", "wsc", "multirc", "ag_news", TEXT_CLASSIFICATION)
GENERATION = ("squad", "drop", "xsum")
TEXT_TASKS = (*CLASSIFICATION, *GENERATION)
# The authors' numbers of rows for generation.
GENERATION_ROWS = (1000, 100)
NEW_TOKENS = {"squad": 32, "drop": 32, "xsum": 64}
DEFAULT_MAX_LENGTH = 128
EXAMPLES = {"template": "'{text} It was'", "verbalizer": "' bad, good'"}


@dataclass(frozen=True)
class TextData:
    """What a text task asks, and of which rows: all of it that needs no model.

    Attributes:
      name: of the task, one of ``TEXT_TASKS``.
      prompt: how a row becomes a prompt, and what may follow it.
      rows: of the splits ``train`` and ``test``; a classification's labels are numbers.
      labels: the name of each label in the order of the prompt's words; empty for generation.
      max_length: the most tokens of a prompt, unless another is asked for.
      target: the accuracy at which methods are compared, or None.
      clients: whose each training row is, numbers of the names in their order, or None.
    """

    name: str
    prompt: Prompt
    rows: Mapping[str, Sequence[Row]]
    labels: tuple[str, ...]
    max_length: int
    target: float | None
    clients: Int[np.ndarray, "n"] | None = None

    @property
    def label_words(self) -> str:
        """Which word stands for which label, as a sentence; empty for generation."""
        pairs = [
            f"{label} is {word!r}" for label, word in zip(self.labels, self.prompt.words, strict=bool(self.labels))
        ]
        return ", ".join(pairs)


def text_data(
    name: str,
    *,
    rows: Mapping[str, Iterable[Row]] | None = None,
    data_dir: str | Path | None = None,
    prompts: PromptSet = "decomfl",
    template: str | None = None,
    verbalizer: Sequence[str] | Mapping[Any, str] | None = None,
    labels: Sequence[str] | None = None,
    train_rows: int | None = None,
    test_rows: int | None = None,
    client_column: str | None = None,
    seed: int = 0,
) -> TextData:
    """The data and the prompt of a text task, read and checked before any model is loaded.

    Args:
      name: one of ``TEXT_TASKS``.
      rows: {"train": rows, "test": rows}, each row a dict of the task's columns; a list of them or a
        ``datasets.Dataset``.
      data_dir: in their place, a folder with train and validation files of these columns; without either the datasets
        hub is asked.
      prompts: whose prompts and answer words.
      template: of text-classification, or in place of the task's prompt.
      verbalizer: the answer words, in place of the task's; or label → word, which then says the labels, too.
      labels: the label that each answer word stands for, in the words' order; by default the numbers 0, 1, …, for
        labels that are text their alphabetical order, and for numbers in quotes that of the numbers.
      train_rows, test_rows: how many random rows to use; None is all, for generation 1,000 and 100.
      client_column: a column that names the client whose each training row is; the task's training data then has
        ``client``, their numbers, for :func:`hiso_jax.fed.by_column`.
      seed: of the choice of rows.

    Raises:
      ValueError: an option, the data or its columns are not of this task.
    """
    if name not in TEXT_TASKS:
        raise ParameterError("task", f"must be one of {', '.join(TEXT_TASKS)}, got {name}")
    for option, count in (("train_rows", train_rows), ("test_rows", test_rows)):
        if count is not None:
            integer(option, count, 1)
    verbalizer, labels = _words_and_labels(verbalizer, labels)
    source = SOURCES.get(name)
    for option, value in (("template", template), ("verbalizer", verbalizer)):
        if source is None and value is None:
            raise ParameterError(option, f"must be given for text-classification, like {EXAMPLES[option]}")
        if name in GENERATION and value is not None:
            raise ParameterError(option, f"is for classification; {name} generates its answers")
    if labels is not None and name in GENERATION:
        raise ParameterError("labels", f"are for classification; {name} generates its answers")
    prompt = prompt_for(name, prompts) if source is not None else user_prompt(template or "", tuple(verbalizer or ()))
    if source is not None and template is not None:
        prompt = user_prompt(template, tuple(verbalizer or prompt.words))
    elif source is not None and verbalizer is not None:
        prompt = replace(prompt, words=checked_words(verbalizer))
    answer_columns = {"squad": ("answers",), "drop": ("answers_spans",), "xsum": ("summary",)}.get(name, ("label",))
    derived = {"wsc": ("span2_text",)}.get(name, ()) if template is None else ()
    columns = (*prompt.columns, *derived, *answer_columns)
    found = load_rows(source, data_dir, columns) if rows is None else given_rows(rows, columns)
    found = with_text(found, (*prompt.columns, *derived, *(("summary",) if name == "xsum" else ())))
    names: tuple[str, ...] = ()
    if name in CLASSIFICATION:
        found = with_labels(found)
        names = label_names(found, len(prompt.words), labels)
        found = number_labels(found, names)
    else:
        train_rows, test_rows = train_rows or GENERATION_ROWS[0], test_rows or GENERATION_ROWS[1]
    chosen = {
        "train": sample_rows(found["train"], train_rows, seed),
        "test": sample_rows(found["test"], test_rows, seed),
    }
    length = source.max_length if source is not None else DEFAULT_MAX_LENGTH
    clients = None if client_column is None else numbered_clients(chosen["train"], client_column)
    return TextData(name, prompt, chosen, names, length, None if source is None else source.target, clients)


def _words_and_labels(
    verbalizer: Sequence[str] | Mapping[Any, str] | None, labels: Sequence[Any] | None
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The answer words, and the label that each stands for where that was said.

    Raises:
      ValueError: something else than words in an order, or than labels.
    """
    if isinstance(verbalizer, Mapping):
        if labels is not None:
            raise ParameterError("labels", "must not be given beside a verbalizer that names them")
        labels, verbalizer = list(verbalizer), list(verbalizer.values())
    if verbalizer is not None and (
        not isinstance(verbalizer, list | tuple) or not all(isinstance(word, str) for word in verbalizer)
    ):
        raise ParameterError("verbalizer", f"must be a list of words, or label → word; got {verbalizer!r}")
    if labels is not None and not isinstance(labels, list | tuple):
        raise ParameterError("labels", f"must be a list, one for each word of the verbalizer; got {labels!r}")
    names = None if labels is None else tuple(str(plain_label(label)) for label in labels)
    return None if verbalizer is None else tuple(verbalizer), names


def text_task(
    data: TextData | str,
    model: Tuned,
    pretrained: Pretrained,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    **given: Any,
) -> TextChoice | TextGeneration:
    """A text task: its data put to a language model.

    Args:
      data: what :func:`text_data` gives, or the name of a task, to read its data here.
      model: the language model and what of it is trained.
      pretrained: where it came from, for its tokenizer.
      max_length: the most tokens of a prompt; by default the task's or the model's, whichever is less.
      max_new_tokens: of generation.
      given: keywords of :func:`text_data`, with a name.

    Raises:
      ValueError: as :func:`text_data`, or what the tokenizer makes of the data does not suit the model.
    """
    if isinstance(data, str):
        data = text_data(data, **given)
    elif given:
        raise ParameterError(next(iter(given)), "must be given to text_data, which has read the data")
    most = model.decoder.config.max_positions - model.decoder.adapters.prefix
    length = min(data.max_length, most) if max_length is None else max_length
    task = _task(data, model, pretrained, length, max_new_tokens)
    return task if data.clients is None else replace(task, train={**task.train, "client": data.clients})


def _task(
    data: TextData, model: Tuned, pretrained: Pretrained, length: int, max_new_tokens: int | None
) -> TextChoice | TextGeneration:
    if data.name in GENERATION:
        return text_generation(
            model,
            pretrained.tokenizer,
            data.prompt,
            data.rows,
            max_length=length,
            max_new_tokens=max_new_tokens or NEW_TOKENS[data.name],
            scoring="summary" if data.name == "xsum" else "span",
            name=data.name,
        )
    return text_choice(
        model,
        pretrained.tokenizer,
        data.prompt,
        data.rows,
        max_length=length,
        name=data.name,
        target=data.target,
        label_words=data.label_words,
    )
