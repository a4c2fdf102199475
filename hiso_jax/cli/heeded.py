"""Options that would have no effect are refused: each belongs to what reads it."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from hiso_jax import channels
from hiso_jax.algorithms import Method
from hiso_jax.checks import ParameterError
from hiso_jax.cli.language import GENERATES
from hiso_jax.cli.methods import given_to
from hiso_jax.cli.options import partition_of
from hiso_jax.cli.privacy import check_private
from hiso_jax.fed.algorithm import Local


class Rule(NamedTuple):
    """When some options are read.

    Attributes:
      names: of the options.
      read: whether they are, with these options.
      by: what reads them.
      now: what there is instead.
    """

    names: tuple[str, ...]
    read: Callable[[Any], bool]
    by: str
    now: Callable[[Any], str]


def _partition(options: Any) -> str:
    return partition_of(options, has_labels=options.task not in GENERATES)


def _availability(options: Any) -> str:
    return f"--availability {options.availability}"


def _rate(options: Any) -> str:
    rate = getattr(options, "learning_rate", None)
    return "the method's own rate" if rate is None else f"--learning-rate {rate}"


RULES = (
    Rule(
        ("probe_rounds",),
        lambda options: options.learning_rate == "auto",
        "--learning-rate auto",
        _rate,
    ),
    Rule(
        ("alpha",),
        lambda options: _partition(options) in ("dirichlet", "dirichlet-balanced"),
        "--partition dirichlet and dirichlet-balanced",
        lambda options: f"--partition {_partition(options)}",
    ),
    Rule(
        ("shards_per_client",),
        lambda options: _partition(options) == "shards",
        "--partition shards",
        lambda options: f"--partition {_partition(options)}",
    ),
    Rule(
        ("clients",),
        lambda options: options.partition != "by-column",
        "every other --partition",
        lambda options: f"--column {options.column}, whose names are the clients",
    ),
    Rule(
        ("data_dir",),
        lambda options: options.task != "digits",
        "every other --task",
        lambda options: f"--task {options.task}, which is embedded",
    ),
    Rule(
        ("availability_rate",),
        lambda options: options.availability in ("bernoulli", "per-client", "diurnal"),
        "--availability bernoulli, per-client and diurnal",
        _availability,
    ),
    Rule(
        ("availability_spread",),
        lambda options: options.availability == "per-client",
        "--availability per-client",
        _availability,
    ),
    Rule(
        ("rounds_per_day",),
        lambda options: options.availability == "diurnal",
        "--availability diurnal",
        _availability,
    ),
)
# What only methods that measure along directions read.
MEASUREMENT = ("perturbations", "mu", "method", "directions", "mus")


def check_heeded(options: Any, methods: Sequence[Method], given: Collection[str]) -> None:
    """Refuse options that nothing reads.

    Args:
      options: all of them.
      methods: that the command is asked for.
      given: the names of those that were typed.

    Raises:
      ValueError: there is one, naming it and what would read it.
    """
    for rule in RULES:
        for name in rule.names:
            if name in given and not rule.read(options):
                raise ParameterError(name, f"is read by {rule.by}; it would have no effect with {rule.now(options)}")
    attacked = any(channels.part_of(channels.FACTORIES[name]) == "attack" for m in methods for name in m.channels)
    if attacked != bool(options.attackers):
        raise ParameterError(
            "attackers",
            "must be given with --attack, a share of the clients above 0, and only then; got "
            f"{options.attackers:g} and {'an attack' if attacked else 'no attack'}",
        )
    if "attackers_of" in given and not attacked:
        raise ParameterError("attackers_of", "is read with --attack; it would have no effect where nobody is hostile")
    check_private(options, methods, given)
    reading: set[str] = set()
    for method in methods:
        measure = method.build(1e-3, given_to(method, options)).measure
        own = {*(MEASUREMENT if measure is None else measure.reads)}
        if measure is not None:
            # It has a difference of its own, or none.
            own -= {"method"}
        reading |= own | ({"mus"} if "mu" in own else set())
        if not isinstance(measure, Local):
            reading.add("snapshot_every")
    if "snapshot_every" in given and "snapshot_every" not in reading:
        raise ParameterError(
            "snapshot_every", f"is read by methods with scalars; {methods[0].name} takes a snapshot at every evaluation"
        )
    for name in MEASUREMENT:
        if name in given and name not in reading:
            names = ", ".join(method.name for method in methods)
            raise ParameterError(
                name, f"is read by methods that measure along directions; it would have no effect on {names}"
            )
