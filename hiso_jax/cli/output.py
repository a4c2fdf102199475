"""Standard output that may close, fill up or lack characters without ending the command."""

import codecs
import contextlib
import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

# Replacements for characters that a terminal's encoding lacks; see _ascii for all others.
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
    """Writes to a stream until writing fails; later text is dropped, and standard error gives the reason once."""

    def __init__(self, stream: TextIO, program: str) -> None:
        """``stream`` receives the text; ``program`` is the name that begins the line on standard error."""
        self._stream, self._program, self.failed = stream, program, False

    def write(self, text: str) -> int:
        """Write ``text``, or drop it if it cannot be written."""
        if not self.failed:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
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
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return not self.failed and self._stream.isatty()

    def fileno(self) -> int:
        """The file descriptor of the stream."""
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        """Every other attribute is the stream's."""
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving(program: str) -> Iterator[None]:
    """Inside the context, let standard output fail without ending the command, and replace characters that it lacks."""
    for stream in (sys.stdout, sys.stderr):
        # A stream that a program has put in their place may lack this method.
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
            # The interpreter flushes the stream again at exit, and would report the error.
            with contextlib.suppress(OSError, ValueError):
                before.close()
