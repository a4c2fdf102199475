"""Conversations: prompts made by a tokenizer's chat template, and the answers of the assistant.

A row has a column ``messages``, a list of {"role": …, "content": …} as the chat templates of ``transformers`` take it.
Every message of the assistant is an answer, and all messages before it are its prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hiso_jax.checks import ParameterError, first_line
from hiso_jax.tasks.text.encode import tokenize
from hiso_jax.tasks.text.prompts import Prompt, Row

ASSISTANT = "assistant"


def _last(row: Row) -> list[str]:
    return [row["messages"][-1]["content"]]


# Its template is the tokenizer's own; the column is named for the check of a table's columns.
CHAT = Prompt("{messages}", answers=_last)


def turns(rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """The rows of every split with one row for each answer, whose messages end with it.

    Raises:
      ValueError: a row's messages are not of roles and texts, or none is of the assistant.
    """
    return {
        split: [
            {"messages": messages[: place + 1]}
            for number, row in enumerate(split_rows, 1)
            for messages in [_messages(row["messages"], f"row {number} of {split}")]
            for place, message in enumerate(messages)
            if message["role"] == ASSISTANT and place
        ]
        for split, split_rows in rows.items()
    }


def _messages(given: Any, row: str) -> list[dict[str, str]]:
    """The messages of a row as dicts of roles and texts.

    Raises:
      ValueError: they have another form, or hold no answer.
    """
    messages = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    for message in messages:
        parts = [message.get(part) for part in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f'{row} has a message that is not {{"role": text, "content": text}}: {message!r:.80}')
    if not any(message["role"] == ASSISTANT for message in messages[1:]):
        raise ValueError(f"{row} has no message of the assistant behind another, so nothing is learned from it")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def encode(tokenizer: Any, rows: Sequence[Row], split: str) -> list[tuple[list[int], list[int]]]:
    """The tokens of each row's prompt and of its answer, with what the template puts behind the answer.

    Raises:
      ParameterError: the tokenizer has no chat template, or one that fails or writes an answer elsewhere than behind
        its prompt.
      ValueError: an answer is empty.
    """
    prompts, answers = [], []
    for number, row in enumerate(rows, 1):
        messages = row["messages"]
        if not messages[-1]["content"].strip():
            raise ValueError(f"answer {number} of {split} is empty")
        before, whole = _rendered(tokenizer, messages[:-1], answers=False), _rendered(tokenizer, messages, answers=True)
        if not whole.startswith(before):
            raise ParameterError(
                "model", "must have a chat template that writes an answer behind its prompt; its tokenizer's does not"
            )
        prompts.append(before)
        answers.append(whole[len(before) :])
    tokens = (tokenize(tokenizer, texts, special=False) for texts in (prompts, answers))
    return list(zip(*tokens, strict=True))


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, answers: bool) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=not answers)
    except Exception as error:
        # A template comes with a model that is not trusted, and may raise any error.
        raise ParameterError(
            "model", f"must come with a chat template that takes these messages: {first_line(error)}"
        ) from error


def ends(tokenizer: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> set[int]:
    """The special tokens that the template puts behind answers, and the end of text: generation stops at them."""
    special = set(tokenizer.all_special_ids)
    return {tokenizer.eos_token_id} | {token for _, answer in pairs for token in answer[-2:] if token in special}
