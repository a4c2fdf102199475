"""Options that take one of a few words, or a number: what is neither is refused with what would be valid."""

import difflib
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hiso_jax.cli.methods import Option

NUMBERS = {float: "a number", int: "a whole number"}


def _kinds(kind: Any) -> list[Any]:
    """The types that a union is made of."""
    if get_origin(kind) is Annotated:
        return _kinds(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [each for member in get_args(kind) for each in _kinds(member)]
    return [kind]


def _is(kind: type, word: str) -> bool:
    try:
        kind(word)
    except ValueError:
        return False
    return True


def check_choices(flat: Mapping[str, Option], words: Mapping[str, str | None]) -> None:
    """Refuse a word that an option of a few words, or of numbers, does not take.

    Args:
      flat: the options of a command.
      words: those that were given, each with the word behind it.

    Raises:
      ValueError: there is one, naming what would be valid.
    """
    for name, word in words.items():
        if name not in flat or word is None or (word == "None" and flat[name].default is None):
            continue
        kinds = [kind for kind in _kinds(flat[name].kind) if kind is not type(None)]
        if not all(kind in NUMBERS or get_origin(kind) is Literal for kind in kinds):
            continue
        choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        numbers = [kind for kind in kinds if kind in NUMBERS]
        if word in choices or any(_is(kind, word) for kind in numbers):
            continue
        several = f"one of {', '.join(choices)}" if len(choices) > 1 else "".join(choices)
        valid = " or ".join(filter(None, [*(NUMBERS[kind] for kind in numbers), several]))
        near = difflib.get_close_matches(word, choices, 1)
        raise ValueError(f"{name} must be {valid}, got {word!r}" + (f"; did you mean {near[0]}?" if near else ""))
