"""Text tasks by name: data, prompts and a language model made into a task."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hiso_jax.models.lm import Pretrained, Tuned
from hiso_jax.tasks.text.choice import TextChoice, text_choice
from hiso_jax.tasks.text.data import load_rows, number_labels, sample_rows
from hiso_jax.tasks.text.generation import TextGeneration, text_generation
from hiso_jax.tasks.text.prompts import SOURCES, PromptSet, checked_words, prompt_for, user_prompt

TEXT_CLASSIFICATION = "text-classification"
CLASSIFICATION = ("sst2", "qqp", "rte", "boolq", "cb", "wic", "wsc", "multirc", "ag_news", TEXT_CLASSIFICATION)
GENERATION = ("squad", "drop", "xsum")
TEXT_TASKS = (*CLASSIFICATION, *GENERATION)
# The authors' numbers of rows for generation.
GENERATION_ROWS = (1000, 100)
NEW_TOKENS = {"squad": 32, "drop": 32, "xsum": 64}
DEFAULT_MAX_LENGTH = 128


def text_task(
    name: str,
    model: Tuned,
    pretrained: Pretrained,
    *,
    data_dir: str | Path | None = None,
    prompts: PromptSet = "decomfl",
    template: str | None = None,
    verbalizer: Sequence[str] | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    train_rows: int | None = None,
    test_rows: int | None = None,
    seed: int = 0,
) -> TextChoice | TextGeneration:
    """A text task.

    Args:
      name: one of ``TEXT_TASKS``.
      model: the language model and what of it is trained.
      pretrained: where it came from, for its tokenizer.
      data_dir: a folder with train and validation files of the task's columns; None asks the hub.
      prompts: whose prompts and answer words.
      template: of text-classification, or in place of the task's prompt.
      verbalizer: the answer words, in place of the task's.
      max_length: the most tokens of a prompt; by default the task's or the model's, whichever is less.
      max_new_tokens: of generation.
      train_rows, test_rows: how many random rows to use; None is all, for generation 1,000 and 100.
      seed: of the choice of rows.

    Raises:
      ValueError: an option, the data or its columns are not of this task.
    """
    if name not in TEXT_TASKS:
        raise ValueError(f"task must be one of {', '.join(TEXT_TASKS)}, got {name}")
    source = SOURCES.get(name)
    if source is None and (template is None or verbalizer is None):
        raise ValueError("template and verbalizer must be given for text-classification, like '{text} It was'")
    if name in GENERATION and (template is not None or verbalizer is not None):
        raise ValueError(f"template and verbalizer are for classification; {name} generates its answers")
    prompt = prompt_for(name, prompts) if source is not None else user_prompt(template or "", tuple(verbalizer or ()))
    if source is not None and template is not None:
        prompt = user_prompt(template, tuple(verbalizer or prompt.words))
    elif source is not None and verbalizer is not None:
        prompt = replace(prompt, words=checked_words(verbalizer))
    answer_columns = {"squad": ("answers",), "drop": ("answers_spans",), "xsum": ("summary",)}.get(name, ("label",))
    derived = {"wsc": ("span2_text",)}.get(name, ()) if template is None else ()
    rows = load_rows(source, data_dir, (*prompt.columns, *derived, *answer_columns))
    if name in CLASSIFICATION:
        rows = number_labels(rows, len(prompt.words))
    else:
        train_rows, test_rows = train_rows or GENERATION_ROWS[0], test_rows or GENERATION_ROWS[1]
    chosen = {
        "train": sample_rows(rows["train"], train_rows, seed),
        "test": sample_rows(rows["test"], test_rows, seed),
    }
    most = model.decoder.config.max_positions - model.decoder.adapters.prefix
    wanted = source.max_length if source is not None else DEFAULT_MAX_LENGTH
    length = min(wanted, most) if max_length is None else max_length
    if name in GENERATION:
        return text_generation(
            model,
            pretrained.tokenizer,
            prompt,
            chosen,
            max_length=length,
            max_new_tokens=max_new_tokens or NEW_TOKENS[name],
            scoring="summary" if name == "xsum" else "span",
            name=name,
        )
    target = None if source is None else source.target
    return text_choice(model, pretrained.tokenizer, prompt, chosen, max_length=length, name=name, target=target)
