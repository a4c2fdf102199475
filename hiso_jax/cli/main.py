"""The command ``hiso-jax``: parse the options, run the command, and answer an error with one line and an exit code."""

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from hiso_jax.checks import did_you_mean, first_line
from hiso_jax.cli import errors, short_help
from hiso_jax.cli.arguments import PROGRAM, as_typed, is_positional, parse
from hiso_jax.cli.diagnose import Diagnose, diagnose_run
from hiso_jax.cli.interrupt import exit_code, heeding
from hiso_jax.cli.join import Join, join
from hiso_jax.cli.options import Run
from hiso_jax.cli.output import forgiving
from hiso_jax.cli.plan import Plan, plan_round
from hiso_jax.cli.replay import Replay, replay
from hiso_jax.cli.report import Plot, ReportOptions, plot, report
from hiso_jax.cli.run import run
from hiso_jax.cli.serve import Serve, serve
from hiso_jax.cli.share import Apply, Export, apply, export
from hiso_jax.cli.show import Show, show
from hiso_jax.cli.studies import compare, sweep
from hiso_jax.experiment import every_option, own_options
from hiso_jax.program_cache import keep_compiled
from hiso_jax.reports import plain
from hiso_jax.tune import Compare, Sweep
from hiso_jax.version import VERSION

ABOUT = "Scalar-only federated zeroth-order fine-tuning: simulate it, and measure which method is better."
COMMANDS: dict[str, tuple[type, Callable[[Any, Console], int]]] = {
    "run": (Run, run),
    "sweep": (Sweep, sweep),
    "compare": (Compare, compare),
    "report": (ReportOptions, report),
    "plot": (Plot, plot),
    "plan": (Plan, plan_round),
    "replay": (Replay, replay),
    "export": (Export, export),
    "apply": (Apply, apply),
    "show": (Show, show),
    "diagnose": (Diagnose, diagnose_run),
    "serve": (Serve, serve),
    "join": (Join, join),
}

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# Options that set a library parameter of another name: the first one that the command has is shown.
OPTIONS = {
    "algorithm": ("algorithm", "algorithms"),
    "client_column": ("column",),
    "sizes": ("client_examples",),
    "groups": ("direction_groups",),
    "mesh": ("model_shards",),
    "model": ("model", "base"),
    "params": ("base",),
    "participation": ("availability",),
    "path": ("trace",),
    "schedule": ("schedule", "schedules"),
    "tx": ("algorithm",),
}
MENTIONED = re.compile(r"`(\w+)`")


class _Plain(logging.Formatter):
    """Formats a record as a line that begins with the name of the program."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        return f"{PROGRAM}: {plain(record.getMessage())}"


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print the library's warnings as lines of this program."""
    logger, handler = logging.getLogger("hiso_jax"), logging.StreamHandler()
    handler.setFormatter(_Plain())
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


def _fail(message: str) -> NoReturn:
    print(f"{PROGRAM}: error: {plain(message)}", file=sys.stderr)
    raise SystemExit(errors.USAGE)


def sentence(error: errors.UsageError, options: Collection[str]) -> str:
    """The sentence for the user, with each parameter named as the option that sets it.

    Args:
      error: the error.
      options: the names of the command's options.
    """

    def named(parameter: str) -> str:
        found = next((name for name in OPTIONS.get(parameter, (parameter,)) if name in options), None)
        return parameter if found is None else as_typed(found)

    message = MENTIONED.sub(lambda match: named(match[1]), error.message)
    return message if error.parameter is None else f"{named(error.parameter)} {message}"


def _options_of(kind: Any) -> set[str]:
    """The names of a command's options that are typed with dashes, so without positional arguments."""
    return {name for name, option in own_options(kind).items() if not is_positional(option)}


def overview() -> str:
    """The text of ``hiso-jax --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [options]",
            "",
            ABOUT,
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help explains a command, {PROGRAM} --version prints the release.",
        ]
    )


def command_of(words: Sequence[str]) -> tuple[Any, Callable[[Any, Console], int]]:
    """The options in ``words`` and the command's function; exits with 0 after help, or with 2 and one line of error."""
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        raise SystemExit(errors.DONE)
    if words[0] == "--version":
        print(f"{PROGRAM} {VERSION}")
        raise SystemExit(errors.DONE)
    if words[0] not in COMMANDS:
        _fail(f"{words[0]} is no command; the commands are {', '.join(COMMANDS)}{did_you_mean(words[0], COMMANDS)}")
    kind, carry_out = COMMANDS[words[0]]
    if words[0] in short_help.OPTIONS and {"-h", "--help"} & {*words[1:]}:
        print(short_help.short_help(words[0], kind))
        raise SystemExit(errors.DONE)
    try:
        with errors.refusing():
            return parse(kind, words[0], words[1:]), carry_out
    except errors.UsageError as error:
        _fail(sentence(error, _options_of(kind) | every_option()))


def _is_of_backends(error: BaseException) -> bool:
    """Whether JAX failed to find its devices, judged by where it raised the error: some of these errors say nothing."""
    return any(Path(frame.filename).name == "xla_bridge.py" for frame in traceback.extract_tb(error.__traceback__))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script; ends the process with an exit code, see ``errors``."""
    with forgiving(PROGRAM):
        code = _run(sys.argv[1:] if arguments is None else arguments)
    raise SystemExit(code)


def _run(arguments: Sequence[str]) -> int:
    # Messages of other libraries on standard error are silenced.
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    options, carry_out = command_of(arguments)
    # Printed lines hold names of files, so neither markup nor :emoji: names are interpreted.
    console = Console(file=sys.stdout, markup=False, emoji=False)
    try:
        with heeding(), _warnings_as_lines():
            keep_compiled()
            return carry_out(options, console)
    except errors.UsageError as error:
        _fail(sentence(error, _options_of(type(options))))
    except errors.Stopped as error:
        print(f"{PROGRAM}: {plain(str(error))}", file=sys.stderr)
        return errors.FAILED
    except OSError as error:
        print(f"{PROGRAM}: {plain(errors.described(error))}", file=sys.stderr)
        return errors.FAILED
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
        if not asked or not _is_of_backends(error):
            raise
        _fail(f"JAX_PLATFORMS must name available devices, cpu always is; got {asked} ({first_line(error)})")
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return exit_code()


if __name__ == "__main__":
    main()
