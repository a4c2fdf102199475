"""``--help`` of the commands with many options: the most used ones, on one screen; ``--help-all`` lists all."""

import textwrap

from hiso_jax.cli.arguments import PROGRAM, as_typed
from hiso_jax.experiment import KINDS, own_options

WIDTH = 80
# A line for each option, shorter than the full text.
LINES = {
    "task": "digits (embedded), mnist, sst2, … or your own, FILE:NAME",
    "data_dir": "folder of the task's data",
    "model": "the model; for text a hub name, a folder or a GGUF file",
    "algorithm": "hiso, decomfl, mosaic, fed_avg, … or your own, FILE:NAME",
    "algorithms": "methods, comma-separated: hiso,decomfl,mosaic",
    "learning_rate": "learning rate η: a number, or auto; by default tuned",
    "learning_rates": "rates η, comma-separated; by default around the tuned one",
    "schedule": "rate over the rounds: constant, cosine, linear, inverse-sqrt",
    "schedules": "schedules that are tried with every method",
    "rounds": "number of rounds",
    "target": "value of the metric at which costs are compared, 0.9 say",
    "tries": "learning rates that are tried for each method",
    "budget": "what methods spend alike: passes, rounds, bytes or seconds",
    "clients": "number of clients",
    "cohort": "clients a round",
    "alpha": "similarity of the clients, Dirichlet's α",
    "perturbations": "directions of a round, P; by default the method's own",
    "local_steps": "local steps of a round, K; by default the method's own",
    "eval_every": "rounds between evaluations",
    "seed": "seed of everything random",
    "seeds": "number of seeds",
    "out": "directory to write; by default a new one under runs/",
    "resume": "continue what this directory holds",
}
OPTIONS = {
    "run": (
        "task", "data_dir", "model", "algorithm", "learning_rate", "rounds", "clients", "cohort", "alpha",
        "perturbations", "local_steps", "eval_every", "seed", "out", "resume",
    ),
    "sweep": (
        "task", "data_dir", "model", "algorithms", "learning_rate", "schedule", "rounds", "clients", "cohort", "alpha",
        "perturbations", "seeds", "target", "out", "resume",
    ),
    "compare": (
        "task", "data_dir", "model", "algorithms", "rounds", "budget", "tries", "target", "clients", "cohort", "alpha",
        "seeds", "schedules", "out", "resume",
    ),
}  # fmt: skip
EXAMPLES = {
    "run": (
        ("", "HiSo on the digits"),
        ("--algorithm mosaic --alpha 0.1", "clients that differ more"),
        ("--task mnist --data-dir FOLDER", "MNIST's files as distributed"),
        ("--resume runs/RUN --rounds 2000", "more rounds"),
    ),
    "sweep": (
        ("", "rates around the tuned one"),
        ("--algorithms hiso,decomfl --seeds 4", "two methods"),
        ("--learning-rate 0.01,0.03,0.1", "these rates"),
        ("--resume DIRECTORY", "continue after a kill"),
    ),
    "compare": (
        ("--algorithms hiso,decomfl,mosaic", "tune, then compare"),
        ("--algorithms hiso,decomfl --seeds 10", "narrower intervals"),
        ("--budget bytes", "by bytes sent"),
        ("--resume DIRECTORY", "continue after a kill"),
    ),
}
ALL = "--help-all"


def _defaults(kind: type, name: str) -> str:
    """The default of an option, and that of text tasks if it differs, in parentheses; empty if it is no number."""
    task = KINDS["task"].load("text-classification")
    choices = (KINDS[each].load(own_options(kind)[each].default) for each in ("task", "partition"))
    own = next(
        (found[name].default for found in (own_options(kind), *(c.options for c in choices)) if name in found), None
    )
    if not isinstance(own, int | float) or isinstance(own, bool):
        return ""
    other = task.defaults.get(name, own)
    return f" ({own:g})" if other == own else f" ({own:g}; for text {other:g})"


def short_help(command: str, kind: type) -> str:
    """The text of ``hiso-jax COMMAND --help``.

    Args:
      command: one of ``OPTIONS``.
      kind: the dataclass of the command's options.
    """
    about = (kind.__doc__ or "").split("\n\n")[0]
    names = {name: as_typed(name) for name in OPTIONS[command]}
    several = {"learning_rate": "learning_rates"} if command != "run" else {}
    width = max(map(len, names.values()))
    examples = [(f"{PROGRAM} {command} {words}".rstrip(), why) for words, why in EXAMPLES[command]]
    wide = max(len(example) for example, _ in examples)
    return "\n".join(
        [
            f"usage: {PROGRAM} {command} [OPTIONS]",
            "",
            *textwrap.wrap(about, WIDTH),
            "",
            *(
                f"  {typed:<{width}}  {LINES[several.get(name, name)]}{_defaults(kind, name)}"
                for name, typed in names.items()
            ),
            "",
            *(f"  {example:<{wide}}  {why}" for example, why in examples),
            "",
            f"{PROGRAM} {command} {ALL} lists all, with those of the task and the method.",
        ]
    )
