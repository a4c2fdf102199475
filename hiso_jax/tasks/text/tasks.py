"""Text tasks by name: tasks made of data, prompts and a language model."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from hiso_jax.checks import ParameterError, integer, of_kind
from hiso_jax.models.lm import Pretrained, Tuned
from hiso_jax.tasks.text.chat import CHAT, turns
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
from hiso_jax.tasks.text.generation import Scoring, TextGeneration, text_generation
from hiso_jax.tasks.text.prompts import SOURCES, Prompt, PromptSet, Row, checked_words, prompt_for, user_prompt

TEXT_CLASSIFICATION = "text-classification"
CLASSIFICATION = ("sst2", "qqp", "rte", "boolq", "cb", "wic", "wsc", "multirc", "ag_news", TEXT_CLASSIFICATION)
CONVERSATION = "chat"
GENERATION = ("squad", "drop", "xsum", CONVERSATION)
TEXT_TASKS = (*CLASSIFICATION, *GENERATION)
# The authors' numbers of training and test rows for generation.
GENERATION_ROWS = (1000, 100)
NEW_TOKENS = {"squad": 32, "drop": 32, "xsum": 64, CONVERSATION: 64}
DEFAULT_MAX_LENGTH = 128
# The columns of right answers, with an answer that stands in for those of a split that is elsewhere.
ANSWERS: dict[str, dict[str, Any]] = {
    "squad": {"answers": {"text": ["-"]}},
    "drop": {"answers_spans": {"spans": ["-"]}},
    "xsum": {"summary": "-"},
    CONVERSATION: {"messages": [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]},
}
SCORINGS: dict[str, Scoring] = {"xsum": "summary", CONVERSATION: "chat"}
EXAMPLES = {"template": "'{text} It was'", "verbalizer": "' bad, good'"}


@dataclass(frozen=True)
class TextData:
    """The prompt and the rows of a text task, which need no model.

    Attributes:
      name: the name of the task, one of ``TEXT_TASKS``.
      prompt: how a row becomes a prompt, and the words or answers that may follow.
      rows: the rows of the splits ``train`` and ``test``; the labels of a classification are integers.
      labels: the name of each label in the order of the prompt's words; empty for generation.
      max_length: the default for the most tokens of a prompt.
      target: the accuracy at which methods are compared, or None.
      clients: the client id of each training row, an index in the sorted names, or None.
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
        """A sentence that says which word stands for which label; empty for generation."""
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
    splits: Collection[str] = ("train", "test"),
) -> TextData:
    """The data and the prompt of a text task, read and checked before any model is loaded.

    Args:
      name: one of ``TEXT_TASKS``.
      rows: {"train": rows, "test": rows}, each a list of dicts of the task's columns, a DataFrame, a dict of
        columns or a ``datasets.Dataset``.
      data_dir: instead of ``rows``, a folder with train and validation files of these columns; without either, the data
        comes from the datasets hub.
      prompts: the prompt set, which gives prompts and answer words.
      template: the prompt of text-classification, or a prompt that replaces the task's.
      verbalizer: the answer words, instead of the task's; or label → word, which also gives the labels.
      labels: the label of each answer word, in the order of the words; by default the numbers 0, 1, …, text labels that
        the words name, other text labels in alphabetical order, and numbers in quotes in numerical order.
      train_rows, test_rows: the numbers of random rows to use; None means all, for generation 1,000 and 100.
      client_column: the column that names the client of each training row; the task's training data then has
        ``client``, the client ids, for :func:`hiso_jax.fed.by_column`.
      seed: the seed of the choice of rows.
      splits: the splits that are here. The others are not read; a row for each label stands in for them, so that a
        machine that holds no training examples, or no test examples, has a task of the same shapes.

    Raises:
      ValueError: an option, the data or its columns do not fit the task.
    """
    if name not in TEXT_TASKS:
        raise ParameterError("task", f"must be one of {', '.join(TEXT_TASKS)}, got {name}")
    for option, count in (("train_rows", train_rows), ("test_rows", test_rows)):
        if count is not None:
            integer(option, count, 1)
    verbalizer, labels = _words_and_labels(verbalizer, labels)
    source = SOURCES.get(name)
    for option, value in (("template", template), ("verbalizer", verbalizer)):
        if source is None and value is None and name != CONVERSATION:
            raise ParameterError(option, f"must be given for text-classification, like {EXAMPLES[option]}")
        if name in GENERATION and value is not None:
            raise ParameterError(option, f"is for classification; {name} generates its answers")
    if labels is not None and name in GENERATION:
        raise ParameterError("labels", f"are for classification; {name} generates its answers")
    if name == CONVERSATION:
        prompt = CHAT
    else:
        own = template or "", tuple(verbalizer or ())
        prompt = prompt_for(name, prompts) if source is not None else user_prompt(*own)
    if source is not None and template is not None:
        prompt = user_prompt(template, tuple(verbalizer or prompt.words))
    elif source is not None and verbalizer is not None:
        prompt = replace(prompt, words=checked_words(verbalizer))
    answer_columns = (*ANSWERS.get(name, ("label",)),)
    derived = {"wsc": ("span2_text",)}.get(name, ()) if template is None else ()
    columns = (*prompt.columns, *derived, *answer_columns)
    found = load_rows(source, data_dir, columns, splits) if rows is None else given_rows(rows, columns)
    if name == CONVERSATION:
        found = turns(found)
    else:
        found = with_text(found, (*prompt.columns, *derived, *(("summary",) if name == "xsum" else ())))
    names: tuple[str, ...] = ()
    if name in CLASSIFICATION:
        found = with_labels(found)
        names = label_names(found, prompt.words, labels)
        found = number_labels(found, names)
    else:
        train_rows, test_rows = train_rows or GENERATION_ROWS[0], test_rows or GENERATION_ROWS[1]
    stand_in = {**dict.fromkeys(columns, "-"), **ANSWERS.get(name, {})}
    absent = [{**stand_in, "label": label} for label in range(max(len(names), 1))]
    limits = {"train": train_rows, "test": test_rows}
    chosen = {
        split: sample_rows(found[split], limit, seed) if split in found else absent for split, limit in limits.items()
    }
    length = source.max_length if source is not None else DEFAULT_MAX_LENGTH
    clients = (
        None if client_column is None or "train" not in found else numbered_clients(chosen["train"], client_column)
    )
    return TextData(name, prompt, chosen, names, length, None if source is None else source.target, clients)


def _words_and_labels(
    verbalizer: Sequence[str] | Mapping[Any, str] | None, labels: Sequence[Any] | None
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The answer words, and the label of each word if labels were given.

    Raises:
      ValueError: the words or the labels are not a list, or labels are given twice.
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
    temperature: float = 0.0,
    samples: int = 0,
    **given: Any,
) -> TextChoice | TextGeneration:
    """A text task, made of its data and a language model.

    Args:
      data: the result of :func:`text_data`, or the name of a task, whose data is read here.
      model: the language model, with its trained part chosen.
      pretrained: the pretrained model, for its tokenizer.
      max_length: the most tokens of a prompt; by default the task's or the model's, whichever is less.
      max_new_tokens: the most tokens to generate.
      temperature: the temperature at which an objective of generated answers samples them in training; 0 is greedy.
      samples: how many test prompts each evaluation shows with the model's answers, for tasks that generate.
      given: keywords of :func:`text_data`, if ``data`` is a name.

    Raises:
      ValueError: as in :func:`text_data`, or the tokens of the data do not fit the model.
    """
    of_kind("model", model, Tuned, "the result of models.lm.tune")
    of_kind("pretrained", pretrained, Pretrained, "the result of models.lm.load")
    if isinstance(data, str):
        data = text_data(data, **given)
    elif given:
        raise ParameterError(next(iter(given)), "must be given to text_data, which has read the data")
    most = model.decoder.config.max_positions - model.decoder.adapters.prefix
    length = min(data.max_length, most) if max_length is None else max_length
    task = _task(data, model, pretrained, length, max_new_tokens, temperature=temperature, samples=samples)
    return task if data.clients is None else replace(task, train={**task.train, "client": data.clients})


def _task(
    data: TextData, model: Tuned, pretrained: Pretrained, length: int, max_new_tokens: int | None, **generating: Any
) -> TextChoice | TextGeneration:
    if data.name in GENERATION:
        return text_generation(
            model,
            pretrained.tokenizer,
            data.prompt,
            data.rows,
            max_length=length,
            max_new_tokens=max_new_tokens or NEW_TOKENS[data.name],
            scoring=SCORINGS.get(data.name, "span"),
            name=data.name,
            **generating,
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
