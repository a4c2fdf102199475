"""Numbers and tables in readable form."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
NEVER = "—"
# Characters per line of a table as text.
WIDEST = 160


def human_bytes(count: float) -> str:
    """``count`` bytes in decimal units, three significant digits."""
    power = 0
    # The shown number decides: 999,999 bytes are 1 MB, and not 1e+03 kB.
    while _rounded(count, power) >= 1000 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    shown = _rounded(count, power)
    return f"{shown:.0f} {UNITS[power]}" if power == 0 or shown >= 1000 else f"{shown:.3g} {UNITS[power]}"


def _rounded(count: float, power: int) -> float:
    """``count`` to three significant digits; to an integer if the unit is bytes."""
    return float(f"{count:.0f}" if power == 0 else f"{count:.3g}")


def human_count(count: float) -> str:
    """``count`` with a decimal prefix, three significant digits."""
    return human_bytes(count).removesuffix("B").replace(" ", "")


def human_seconds(seconds: float) -> str:
    """``seconds`` as h:mm:ss; below a minute in seconds, from two days on in days."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole >= 172_800:
        days = seconds / 86_400
        return f"{days:.3g} days" if days < 999.5 else f"{days:,.0f} days"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def plain(text: str) -> str:
    """``text`` made safe for a terminal: non-printable characters are escaped, so that they have no effect."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def spread(values: np.ndarray, show: Callable[[float], str]) -> str:
    """The mean, with the standard deviation over seeds if there are several."""
    mean = show(float(np.mean(values)))
    return f"{mean} ± {show(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean


def short_names(methods: Sequence[str]) -> dict[str, str]:
    """Methods → their names without file or module, if these names are distinct."""
    short = {name: name.rpartition(":")[2] for name in methods}
    return {name: own if list(short.values()).count(own) == 1 else name for name, own in short.items()}


def broken(name: str) -> str:
    """A method's name with each of its parts on its own line, for a narrow column."""
    return name.replace("+", "\n+")


def print_rows(console: Console, rows: Mapping[str, str]) -> None:
    """Print names and values in two columns."""
    width = max(len(plain(name)) for name in rows)
    for name, value in rows.items():
        console.print(f"  {plain(name):<{width}}  {plain(value)}", soft_wrap=True, highlight=False, markup=False)


def as_text(table: Any) -> str:
    """A ``rich`` table as plain text."""
    # Not as a notebook's output, which would be shown in place of being returned.
    console = Console(width=WIDEST, file=io.StringIO(), force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip("\n")
