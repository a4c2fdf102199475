"""Numbers and tables as people read them."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
NEVER = "—"
# Characters of a line of a table that is a text.
WIDEST = 160


def human_bytes(count: float) -> str:
    """``count`` bytes in decimal units, three significant digits."""
    power = 0
    # As it is shown: 999,999 bytes are 1 MB, and not 1e+03 kB.
    while _rounded(count, power) >= 1000 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    shown = _rounded(count, power)
    return f"{shown:.0f} {UNITS[power]}" if power == 0 or shown >= 1000 else f"{shown:.3g} {UNITS[power]}"


def _rounded(count: float, power: int) -> float:
    """``count`` to three significant digits, of whole bytes to a whole number."""
    return float(f"{count:.0f}" if power == 0 else f"{count:.3g}")


def human_count(count: float) -> str:
    """``count`` with a unit of thousands, three significant digits."""
    return human_bytes(count).removesuffix("B").replace(" ", "")


def human_seconds(seconds: float) -> str:
    """``seconds`` as h:mm:ss, or as seconds below a minute."""
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
    """``text`` as a terminal may have it: what is not printable is written out, so that nothing in it acts."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def spread(values: np.ndarray, show: Callable[[float], str]) -> str:
    """A mean, and the standard deviation over seeds if there are several."""
    mean = show(float(np.mean(values)))
    return f"{mean} ± {show(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean


def short_names(methods: Sequence[str]) -> dict[str, str]:
    """Methods without the file or module that they are in, where that leaves them apart."""
    short = {name: name.rpartition(":")[2] for name in methods}
    return {name: own if list(short.values()).count(own) == 1 else name for name, own in short.items()}


def broken(name: str) -> str:
    """A method's name on a line for each of its parts, for a narrow column."""
    return name.replace("+", "\n+")


def print_rows(console: Console, rows: Mapping[str, str]) -> None:
    """Names and values in two columns."""
    width = max(len(plain(name)) for name in rows)
    for name, value in rows.items():
        console.print(f"  {plain(name):<{width}}  {plain(value)}", soft_wrap=True, highlight=False, markup=False)


def as_text(table: Any) -> str:
    """A table of ``rich`` as plain text."""
    console = Console(width=WIDEST, file=io.StringIO(), force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip("\n")
