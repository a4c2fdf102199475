"""Checks of numbers; an error is one sentence that begins with the parameter's name and says which values are valid.

Numbers of Python and of NumPy are checked the same way. Arrays of JAX pass the checks that say so, because they may be
traced. No library does this: libraries accept an integral float as an integer, or refuse NumPy's integers, or do not
support tracing.
"""

import difflib
import inspect
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

# Longest repr of a value in an error.
LONG = 80


class ParameterError(ValueError):
    """A parameter has an invalid value.

    One structured error lets every caller name the parameter in its own way: Python by its name, the command line as
    the option that set it.

    Args:
      parameter: name of the parameter.
      message: rest of the sentence after the name: the valid values, and the given value. The names of other
        parameters are in backticks.

    Attributes:
      parameter: name of the parameter.
      message: rest of the sentence.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(parameter, message)
        self.parameter, self.message = parameter, message

    def __str__(self) -> str:
        """The complete sentence, as users of Python read it."""
        return f"{self.parameter} {self.message}"


SYNONYMS = {
    "batch": "batch_size",
    "cohort_size": "cohort",
    "data": "task",
    "dataset": "task",
    "dirichlet": "alpha",
    "epochs": "local_steps",
    "epsilon_zo": "mu",
    "iterations": "rounds",
    "lr": "learning_rate",
    "method": "algorithm",
    "num_devices": "devices",
    "optimizer": "algorithm",
    "steps": "rounds",
}
"""Words that other software uses for a parameter → the name here."""


def did_you_mean(word: str, known: Iterable[str], *, quote: str = "", cutoff: float = 0.6) -> str:
    """The end of an error about an unknown ``word``: the known name that is meant, or nothing if none is close.

    A name that begins with the word, or with its synonym, goes before the name with the most similar spelling.

    Args:
      word: the unknown word.
      known: the valid names.
      quote: character around the name; parameters have backticks, so that the command line names their options.
      cutoff: least similarity of spelling, 0 to 1, as of ``difflib.get_close_matches``.
    """
    names = list(known)
    meant = SYNONYMS.get(word, word)
    near = [name for name in names if len(meant) > 2 and name.startswith(meant)]
    near = near or difflib.get_close_matches(word, names, 1, cutoff)
    return f"; did you mean {quote}{near[0]}{quote}?" if near else ""


def _is_traceable(value: Any) -> bool:
    """Whether ``value`` is an array of JAX whose number is not known: traced, or of several numbers."""
    return isinstance(value, jax.core.Tracer) or (isinstance(value, jax.Array) and value.ndim > 0)


def kind_of(value: Any) -> str:
    """The type of a value in an error, with its article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def shown(value: Any) -> str:
    """A value in an error: its ``repr`` if that is short, else its type."""
    text = repr(value)
    return text if len(text) < LONG and "\n" not in text else kind_of(value)


def of_kind(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuse a value of another type.

    Args:
      name: the parameter.
      value: its value.
      kinds: the valid types.
      wanted: the valid values, in words.

    Raises:
      ParameterError: ``value`` is of another type, or a class in the place of its instance.
    """
    if isinstance(value, kinds):
        return
    classes = kinds if isinstance(kinds, tuple) else (kinds,)
    if isinstance(value, type):
        hint = f": {value.__name__}(…) with parentheses" if issubclass(value, classes) else ""
        raise ParameterError(name, f"must be {wanted}, got the class {value.__name__}{hint}")
    raise ParameterError(name, f"must be {wanted}, got {kind_of(value)}")


def arrays(name: str, tree: Any) -> None:
    """Refuse a tree with a leaf that is neither an array nor a number: a function among parameters, say.

    Args:
      name: the parameter.
      tree: its value.

    Raises:
      ParameterError: there is such a leaf, or the tree is None; the error names the leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is None and node is tree)
    for path, leaf in leaves:
        if is_real(leaf) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
            continue
        place = f" at {jax.tree_util.keystr(path)}" if path else ""
        hint = "keep functions and settings out of it, by flax.nnx.split or equinox.partition, say"
        hint = "its initial_params?" if hasattr(leaf, "initial_params") else hint
        raise ParameterError(name, f"must be a tree of arrays, got {kind_of(leaf)}{place}: {hint}")


def transformation(name: str, value: Any) -> None:
    """Refuse a value that is no transformation of optax, a factory without its call for example.

    Raises:
      ParameterError: it is none.
    """
    if isinstance(value, type) or not (hasattr(value, "init") and hasattr(value, "update")):
        kind = "a function" if callable(value) else kind_of(value)
        call = getattr(value, "__name__", "")
        hint = f": {call}(0.01), say?" if callable(value) and call.isidentifier() else ""
        raise ParameterError(
            name, f"must be an optax transformation or a fed.Algorithm, like hiso_jax.hiso(0.01); got {kind}{hint}"
        )


def takes(function: Any, count: int) -> bool:
    """Whether a function can be called with ``count`` positional arguments; True if its signature is not known."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def function(name: str, value: Any, arguments: str) -> None:
    """Refuse a value that cannot be called with positional arguments.

    Args:
      name: the parameter.
      value: its value.
      arguments: the names of the arguments, comma-separated.

    Raises:
      ParameterError: it is not a function of these arguments.
    """
    if not callable(value):
        raise ParameterError(name, f"must be a function of ({arguments}), got {kind_of(value)}")
    if not takes(value, len(arguments.split(","))):
        raise ParameterError(name, f"must be a function of ({arguments}), got one of {inspect.signature(value)}")


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a string, bytes or number of a user, and not JAX's substitute for it in a pytree."""
    return isinstance(value, str | bytes | numbers.Number | np.generic)


def is_real(value: Any) -> bool:
    """Whether ``value`` is one real number of Python or NumPy, and not a bool."""
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.ndim == 0:
        value = np.asarray(value)
    value = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is one integer of Python or NumPy, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)


def integer(name: str, value: Any, minimum: int | None = None, below: int | None = None) -> None:
    """Refuse a value that is not an integer in [``minimum``, ``below``).

    Raises:
      ParameterError: ``value`` is not such an integer.
    """
    if not is_integer(value):
        raise ParameterError(name, f"must be an integer, got {shown(value)}")
    if minimum is not None and value < minimum:
        raise ParameterError(name, f"must be at least {minimum}, got {value}")
    if below is not None and value >= below:
        raise ParameterError(name, f"must be below {'2^31' if below == 2**31 else below}, got {value}")


def positive(name: str, value: Any) -> None:
    """Refuse a value that is not a positive finite number; arrays of JAX pass, because they may be traced.

    Raises:
      ParameterError: ``value`` is not such a number.
    """
    if not (_is_traceable(value) or (is_real(value) and np.isfinite(np.asarray(value)) and np.asarray(value) > 0)):
        raise ParameterError(name, f"must be a positive finite number, got {shown(value)}")


def between(name: str, value: Any, low: float, high: float) -> None:
    """Refuse a value that is not a number in [low, high]; arrays of JAX pass, because they may be traced.

    Raises:
      ParameterError: ``value`` is not such a number.
    """
    if not (_is_traceable(value) or (is_real(value) and low <= np.asarray(value) <= high)):
        raise ParameterError(name, f"must be between {low:g} and {high:g}, got {value!r}")


def fraction(name: str, value: Any, below: float = 1.0) -> None:
    """Refuse a value that is not a number in [0, ``below``); arrays of JAX pass, because they may be traced.

    Raises:
      ParameterError: ``value`` is not such a number.
    """
    if not (_is_traceable(value) or (is_real(value) and 0 <= np.asarray(value) < below)):
        raise ParameterError(name, f"must be at least 0 and below {below:g}, got {value!r}")


def finite(name: str, value: Any, low: float = 0.0) -> None:
    """Refuse a value that is not a finite number of at least ``low``; arrays of JAX pass, because they may be traced.

    Raises:
      ParameterError: ``value`` is not such a number.
    """
    if not (_is_traceable(value) or (is_real(value) and np.isfinite(np.asarray(value)) and np.asarray(value) >= low)):
        raise ParameterError(name, f"must be a finite number{f' ≥ {low:g}' if low > -np.inf else ''}, got {value!r}")


def rate(name: str, value: Any) -> None:
    """Refuse a learning rate that is neither a schedule nor a finite number of at least 0; JAX arrays pass.

    Raises:
      ParameterError: ``value`` is neither.
    """
    if callable(value):
        function(name, value, "round")
    elif not (_is_traceable(value) or (is_real(value) and np.isfinite(np.asarray(value)) and np.asarray(value) >= 0)):
        raise ParameterError(name, f"must be a finite number ≥ 0 or a schedule over rounds, got {shown(value)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
