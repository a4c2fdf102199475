"""Pages that are made from the code: the command line, from the registry of its options."""

from pathlib import Path
from typing import Any

from hiso_jax.cli.arguments import as_typed, is_positional
from hiso_jax.cli.main import COMMANDS
from hiso_jax.cli.options import GROUPS
from hiso_jax.experiment import KINDS, own_options

INTRODUCTION = """# Command line

This page is made from the registry that the commands read. Options of a choice are listed with the choice: `--alpha`
exists for the partition `dirichlet`, for example. In Python the options have the same names, with underscores, and the
same defaults. `--help` of a command shows its most used options, and `--help-all` all of them.

"""


def _default(option: Any) -> str:
    default = option.default
    if default in (None, ()) or default is False or is_positional(option):
        return ""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f" Default: `{shown}`."


def _entry(option: Any) -> str:
    name = option.name.upper() if is_positional(option) else as_typed(option.name)
    text = " ".join(option.text.replace("|", "\\|").split())
    return f"`{name}`\n: {text}{'' if text.endswith('.') else '.'}{_default(option)}\n"


def command_line() -> str:
    """The page of the command line."""
    parts, seen = [INTRODUCTION], set()
    for name, (kind, _) in COMMANDS.items():
        about = " ".join((kind.__doc__ or "").split("Attributes:")[0].split())
        parts.append(f"## `hiso-jax {name}`\n\n{about}\n")
        options = own_options(kind)
        fresh = {key: option for key, option in options.items() if (key, option.text) not in seen}
        shared = [as_typed(key) for key in options if key not in fresh]
        grouped: dict[str, list[str]] = {}
        headings = {key: title for title, names in GROUPS.items() for key in names}
        for key, option in fresh.items():
            grouped.setdefault(headings.get(key, "other"), []).append(_entry(option))
            seen.add((key, option.text))
        for title in (*GROUPS, "other"):
            entries = grouped.get(title, [])
            if not entries:
                continue
            parts += [f"### {title.capitalize()} options of `{name}`\n"] if len(grouped) > 1 else []
            parts += entries
        if shared:
            parts.append(f"As above: {', '.join(f'`{each}`' for each in shared)}.\n")
    parts.append("## Choices and their options\n")
    for kind in KINDS.values():
        parts.append(f"### `{as_typed(kind.name)}`\n")
        for name in kind.factories:
            choice = kind.load(name)
            about = " ".join((choice.factory.__doc__ or "").split("\n\n")[0].split())
            parts.append(f"`{name}`\n: {about}\n")
            parts += [
                f"  {line}" if line else ""
                for option in choice.options.values()
                for line in _entry(option).splitlines()
            ]
            parts.append("")
    return "\n".join(parts)


def setup(app: Any) -> dict[str, bool]:
    """Write the pages before Sphinx reads its sources."""

    def write(app: Any) -> None:
        page = Path(app.srcdir) / "reference" / "command_line.md"
        text = command_line()
        if not page.exists() or page.read_text() != text:
            page.write_text(text)

    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
