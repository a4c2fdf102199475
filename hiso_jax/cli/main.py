"""The command ``hiso-jax``: parse, run, and answer trouble with one line and an exit code."""

import contextlib
import io
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from itertools import dropwhile, takewhile
from typing import Annotated, Any, NoReturn

import tyro
from rich.console import Console

from hiso_jax.cli import exit_codes
from hiso_jax.cli.compare import compare
from hiso_jax.cli.options import Compare, Run, Sweep
from hiso_jax.cli.replay import Replay, replay
from hiso_jax.cli.run import run
from hiso_jax.cli.share import Apply, Export, apply, export
from hiso_jax.cli.show import Show, show
from hiso_jax.cli.sweep import sweep

PROGRAM = "hiso-jax"
ABOUT = "Scalar-only federated zeroth-order fine-tuning: simulate it, and measure which method is better."
Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Apply, tyro.conf.subcommand("apply")]
    | Annotated[Show, tyro.conf.subcommand("show")]
)

COMMANDS: dict[type, Callable[[Any, Console], int]] = {
    Run: run,
    Sweep: sweep,
    Compare: compare,
    Replay: replay,
    Export: export,
    Apply: apply,
    Show: show,
}

# What stands in its place needs no name.
OPTION_NAMES = {field.name for command in COMMANDS for field in fields(command)} - {"run", "delta", "path"}


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What the library warns of, as lines of this program."""
    logger, handler = logging.getLogger("hiso_jax"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


def _fail(message: str) -> NoReturn:
    print(f"{PROGRAM}: error: {name_option(message)}", file=sys.stderr)
    raise SystemExit(exit_codes.USAGE)


def name_option(message: str) -> str:
    """A sentence that begins with the name of an option, with the option as it is typed."""
    first, _, rest = message.partition(" ")
    return f"--{first.replace('_', '-')} {rest}" if first in OPTION_NAMES else message


def one_line(report: str) -> str:
    """The message in tyro's boxed error report: what stands between its title and the next rule."""
    # The box is drawn in Unicode or, where the terminal cannot show that, with blanks and ASCII rules.
    lines = [line.strip("╭╮╰╯│─ ") for line in report.splitlines()]
    texts = ["" if set(line) <= {"-"} else line for line in lines]
    after_title = texts[1:] if texts and texts[0] else texts[2:]
    body = takewhile(bool, dropwhile(lambda text: not text, after_title))
    message = re.sub(r"^Error parsing (\w+: )?", "", " ".join(body))
    return f"{message} (see --help for what is valid)" if message.startswith("Unrecognized") else message


def parse(arguments: Sequence[str]) -> Any:
    """The command in ``arguments``; exits with code 2 and one line if there is none, and with 0 after --help."""
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            return tyro.cli(Command, prog=PROGRAM, description=ABOUT, args=arguments)
    except SystemExit as ending:
        if ending.code:
            _fail(one_line(report.getvalue()))
        raise


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script; ends the process with an exit code of ``exit_codes``."""
    command = parse(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    try:
        with _warnings_as_lines():
            code = COMMANDS[type(command)](command, console)
    except exit_codes.UsageError as error:
        _fail(str(error))
    except exit_codes.Stopped as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        code = exit_codes.INTERRUPTED
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted before the rounds in flight were done", file=sys.stderr)
        code = exit_codes.INTERRUPTED
    raise SystemExit(code)


if __name__ == "__main__":
    main()
