"""The check that refuses options that no method or choice reads."""

from collections.abc import Collection, Sequence
from typing import Any

from hiso_jax import channels
from hiso_jax.algorithms import Method
from hiso_jax.checks import ParameterError
from hiso_jax.experiment.budget import check_private
from hiso_jax.experiment.composed import choice_of, given_to

# Only methods that measure along directions read these options.
MEASUREMENT = ("perturbations", "mu", "difference", "directions", "local_learning_rate", "mus")


def check_read(options: Any, methods: Sequence[Method], given: Collection[str]) -> None:
    """Refuse options that no method or choice reads.

    Args:
      options: all options.
      methods: the methods that the command runs.
      given: the names of the options that were given.

    Raises:
      ParameterError: there is such an option; the error names it and its readers.
    """
    if "probe_rounds" in given and options.learning_rate != "auto":
        now = "the method's own rate" if options.learning_rate is None else f"`learning_rate` {options.learning_rate}"
        raise ParameterError("probe_rounds", f"is read by `learning_rate` auto; it would have no effect with {now}")
    partition = choice_of("partition", options)
    if "clients" in given and "clients" not in partition.inputs:
        raise ParameterError("clients", f"would have no effect with `partition` {partition.name}, which counts them")
    attacked = any(channels.part_of(name) == "attack" for m in methods for name in m.channels)
    if attacked != bool(options.attackers):
        raise ParameterError(
            "attackers",
            "must be given with `attack`, a share of the clients above 0, and only then; got "
            f"{options.attackers:g} and {'an attack' if attacked else 'no attack'}",
        )
    if "attackers_of" in given and not attacked:
        raise ParameterError("attackers_of", "is read with `attack`; it would have no effect without hostile clients")
    check_private(options, methods, given)
    if not {*MEASUREMENT, "snapshot_every"} & {*given}:
        return  # The other checks build every method.
    reading: set[str] = set()
    for method in methods:
        algorithm = method.build(1e-3, given_to(method, options))
        measure = algorithm.measure
        own = {*(MEASUREMENT if measure is None else measure.reads)}
        if measure is not None:
            # The measure has its own difference, or none.
            own -= {"difference"}
        if (options.local_steps or algorithm.local_steps or 1) == 1:
            own -= {"local_learning_rate"}
        reading |= own | ({"mus"} if "mu" in own else set())
        if measure is None or measure.has_scalars:
            reading.add("snapshot_every")
    if "local_learning_rate" in given and "local_learning_rate" not in reading:
        names = ", ".join(method.name for method in methods)
        raise ParameterError(
            "local_learning_rate",
            "is read by methods that send scalars, with `local_steps` above 1; it would have no effect on " + names,
        )
    if "snapshot_every" in given and "snapshot_every" not in reading:
        raise ParameterError(
            "snapshot_every",
            f"is read by methods with scalars; {methods[0].name} takes a snapshot at every evaluation",
        )
    for name in MEASUREMENT:
        if name in given and name not in reading:
            names = ", ".join(method.name for method in methods)
            along = "finite differences" if name in ("mu", "mus", "difference", "directions") else "along directions"
            raise ParameterError(name, f"is read by methods that measure {along}; it would have no effect on {names}")
