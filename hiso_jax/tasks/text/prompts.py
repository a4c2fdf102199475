"""Prompts for language models: the exact prompts and answer words of DeComFL/HiSo and of MeZO.

Sources: the code of DeComFL (arXiv 2405.15861) and HiSo (arXiv 2506.02370), and of MeZO (arXiv 2305.17333). A word
or an answer follows its prompt directly. Words are in the order of the labels 0, 1, 2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

from hiso_jax.checks import ParameterError

PromptSet = Literal["decomfl", "mezo"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """How a row of a data set becomes a prompt, and the words or answers that may follow.

    Attributes:
      template: the prompt, with columns of the row in braces.
      words: the answer word of each label; empty for generation.
      answers: row → the right answers, the first being the training target; None for classification.
      answer_template: the text of the training target, with ``{answer}`` for the answer.
      derived: columns made from the row before the template is filled.
    """

    template: str
    words: tuple[str, ...] = ()
    answers: Callable[[Row], list[str]] | None = None
    answer_template: str = "{answer}"
    derived: Mapping[str, Callable[[Row], str]] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names, except derived columns."""
        names = (name for _, name, _, _ in Formatter().parse(self.template) if name is not None)
        return tuple(dict.fromkeys(name for name in names if name not in self.derived))

    def render(self, row: Row) -> str:
        """The prompt of a row."""
        values = {name: row[name] for name in self.columns}
        return self.template.format(**values, **{name: make(row) for name, make in self.derived.items()})


@dataclass(frozen=True)
class Source:
    """The location of a task's data on the hub.

    Attributes:
      name, config: name and configuration of the data set.
      test: the split that is used for testing.
      max_length: the most tokens of a prompt, by default.
      target: the accuracy at which methods are compared, or None.
    """

    name: str
    config: str | None = None
    test: str = "validation"
    max_length: int = 2048
    target: float | None = None


SUPER_GLUE = "aps/super_glue"
GLUE = "nyu-mll/glue"

SOURCES: dict[str, Source] = {
    "sst2": Source(GLUE, "sst2", max_length=32, target=0.85),
    "qqp": Source(GLUE, "qqp"),
    "rte": Source(SUPER_GLUE, "rte"),
    "boolq": Source(SUPER_GLUE, "boolq"),
    "cb": Source(SUPER_GLUE, "cb"),
    "wic": Source(SUPER_GLUE, "wic"),
    "wsc": Source(SUPER_GLUE, "wsc.fixed"),
    "multirc": Source(SUPER_GLUE, "multirc"),
    "ag_news": Source("fancyzhx/ag_news", test="test", max_length=128),
    "squad": Source("rajpurkar/squad"),
    "drop": Source("ucinlp/drop"),
    "xsum": Source("EdinburghNLP/xsum"),
}


def _squad_answers(row: Row) -> list[str]:
    return list(row["answers"]["text"])


def _drop_answers(row: Row) -> list[str]:
    return list(row["answers_spans"]["spans"])


def _summary(row: Row) -> list[str]:
    return [row["summary"]]


NO_YES = ("No", "Yes")
SHARED = {
    "rte": Prompt('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', ("Yes", "No")),
    "multirc": Prompt(
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n', NO_YES
    ),
    "cb": Prompt('Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe")),
    "wic": Prompt(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        NO_YES,
    ),
    "wsc": Prompt(
        '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {span1_text}? Yes or No?\n',
        NO_YES,
        derived={"pronoun": lambda row: row["span2_text"].lower()},
    ),
    "ag_news": Prompt("{text}\nTopic:", (" World", " Sports", " Business", " Science")),
}
PROMPTS: dict[PromptSet, dict[str, Prompt]] = {
    "decomfl": {
        **SHARED,
        "sst2": Prompt("{sentence} It was", (" bad", " good")),
        "qqp": Prompt(
            "Question 1: {question1}\n Question 2: {question2}\n Are they semantically equivalent? Yes or No?\n",
            (" No", " Yes"),
        ),
        "boolq": Prompt("{passage}\nQuestion: {question}\nIs that correct? Yes or No?\n", NO_YES),
        "squad": Prompt(
            "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer concisely in a few words:",
            answers=_squad_answers,
        ),
        "drop": Prompt("Passage: {passage}\nQuestion: {question}\nAnswer:", answers=_drop_answers),
        "xsum": Prompt("Document: {document}\nSummarize this in one sentence:", answers=_summary),
    },
    "mezo": {
        **SHARED,
        "sst2": Prompt("{sentence} It was", (" terrible", " great")),
        "boolq": Prompt("{passage} {question}?\n", NO_YES),
        "squad": Prompt(
            "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
            answers=_squad_answers,
            answer_template=" {answer}\n",
        ),
        "drop": Prompt(
            "Passage: {passage}\nQuestion: {question}\nAnswer:", answers=_drop_answers, answer_template=" {answer}\n"
        ),
    },
}


def prompt_for(task: str, prompts: PromptSet) -> Prompt:
    """The prompt of a task in a prompt set.

    Raises:
      ValueError: the set has no prompt for the task.
    """
    if task not in PROMPTS[prompts]:
        raise ParameterError("prompts", f"must be decomfl for {task}: the {prompts} set has no prompt for it")
    return PROMPTS[prompts][task]


def user_prompt(template: str, words: tuple[str, ...]) -> Prompt:
    """A user's own template and verbalizer.

    Args:
      template: the prompt with columns of the data in braces, ``{text} It was``.
      words: the answer word of each label, in the order of the labels.

    Raises:
      ValueError: the template is malformed or names no column, or the words cannot be a verbalizer.
    """
    try:
        fields = [parts[1:] for parts in Formatter().parse(template) if parts[1] is not None]
    except ValueError as error:
        raise ParameterError(
            "template", f"must be text with columns in braces, like '{{text}} It was': {error}"
        ) from error
    columns = [name or "" for name, _, _ in fields]
    if any(specification or conversion for _, specification, conversion in fields):
        raise ParameterError("template", f"must name columns alone in its braces, without : or !; got {template!r}")
    if not columns or not all(name.isidentifier() for name in columns):
        raise ParameterError("template", f"must name a column in braces, like '{{text}} It was'; got {template!r}")
    return Prompt(template, checked_words(words))


def checked_words(words: Sequence[str]) -> tuple[str, ...]:
    """The words, checked to be a verbalizer.

    Raises:
      ValueError: there are fewer than two words, or a word is empty or repeated.
    """
    if len(words) < 2 or not all(words) or len(set(words)) != len(words):
        raise ParameterError(
            "verbalizer", f"must be at least two different words, one for each label; got {','.join(words)}"
        )
    return tuple(words)
