"""Standard output may close, fill up or lack characters while a command runs: the work goes on."""

import codecs
import contextlib
import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

# What stands for a character that a terminal's encoding has not; any other is a question mark.
PLAIN = {
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "±": "+-",
    "≥": ">=",
    "≤": "<=",
    "≈": "~",
    "×": "x",
    "·": "*",
    "√": "sqrt",
    "‖": "||",
    "∇": "grad",
    "²": "^2",
    "³": "^3",
    "ᵀ": "^T",
    "’": "'",
    "“": '"',
    "”": '"',
}
ERRORS = "hiso_jax.plain"


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(character: str) -> str:
    """A replacement in ASCII: a Greek letter's name, the digit of a superscript, or a question mark."""
    if character in PLAIN:
        return PLAIN[character]
    letter = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", unicodedata.name(character, ""))
    if letter is not None:
        return letter[2].lower() if letter[1] == "SMALL" else letter[2].capitalize()
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain or "?"


codecs.register_error(ERRORS, _plainly)


class Output:
    """Writes to a stream until that fails; what follows is dropped, and why is said once on standard error."""

    def __init__(self, stream: TextIO, program: str) -> None:
        """``stream`` is what is written to, ``program`` who speaks on standard error."""
        self._stream, self._program, self.failed = stream, program, False

    def write(self, text: str) -> int:
        """Write, or drop what cannot be written."""
        if not self.failed:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        if not self.failed:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed = True
        why = getattr(error, "strerror", None) or str(error)
        with contextlib.suppress(OSError, ValueError):
            print(
                f"{self._program}: standard output cannot be written ({why}); the command goes on without",
                file=sys.stderr,
            )

    @property
    def encoding(self) -> str:
        """Of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return not self.failed and self._stream.isatty()

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's."""
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving(program: str) -> Iterator[None]:
    """While inside, standard output may fail without ending the command, and characters that it lacks are replaced."""
    for stream in (sys.stdout, sys.stderr):
        # Of a stream that a program has put in their place, nothing is known.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS)
    before = sys.stdout
    output = Output(before, program)
    sys.stdout = output
    try:
        yield
    finally:
        output.flush()
        sys.stdout = before
        if output.failed:
            # The interpreter flushes it once more at its end, and would tell of it.
            with contextlib.suppress(OSError, ValueError):
                before.close()
