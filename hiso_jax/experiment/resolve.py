"""The resolution of names and options to settings: the choices decide which options exist."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hiso_jax import algorithms, channels, fed
from hiso_jax.algorithms import Method
from hiso_jax.checks import SYNONYMS, ParameterError, did_you_mean, of_kind
from hiso_jax.choices import Choice, Option
from hiso_jax.experiment.budget import check_private
from hiso_jax.experiment.composed import (
    KINDS,
    NESTED,
    choice_of,
    chosen_options,
    given_to,
    methods_of,
    nested_choices,
    options_with,
    own_options,
)
from hiso_jax.renamed import PARAMETERS

# Only methods that measure along directions read these options.
MEASUREMENT = (
    "perturbations",
    "mu",
    "difference",
    "directions",
    "local_learning_rate",
    "local_learning_rates",
    "mus",
    "backprop_share",
)


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
    task, partition = choice_of("task", options), choice_of("partition", options)
    if getattr(partition.factory, "by_label", False) and not getattr(task.factory, "labelled", True):
        raise ParameterError("partition", f"must be iid for {task.name}, which has no labels; got {partition.name}")
    if options.cohort > options.clients and "clients" in partition.inputs:
        raise ParameterError(
            "cohort", f"must be at most the number of clients, {options.clients}, got {options.cohort}"
        )
    if "clients" in given and "clients" not in partition.inputs:
        raise ParameterError("clients", f"would have no effect with `partition` {partition.name}, which counts them")
    attacked = any(channels.part_of(name) == "attack" for m in methods for name in m.channels)
    if attacked != bool(options.attackers):
        raise ParameterError(
            "attackers",
            "must be given with `attack`, a share of the clients above 0, and only then; got "
            f"{options.attackers:g} and {'an attack' if attacked else 'no attack'}",
        )
    for name in ("memory_spread", "training_gb"):
        if name in given and options.backprop_share != "memory":
            raise ParameterError(name, "is read with `backprop_share` memory; it would have no effect")
    if "attackers_of" in given and not attacked:
        raise ParameterError("attackers_of", "is read with `attack`; it would have no effect without hostile clients")
    check_private(options, methods, given)
    if not {*MEASUREMENT, "snapshot_every"} & {*given}:
        return  # The other checks build every method.
    reading: set[str] = set()
    for method in methods:
        algorithm = method.build(1e-3, given_to(method, options))
        measure = algorithm.measure
        own = {*(fed.Probes.reads if measure is None else measure.reads)}
        if options.backprop_share is not None and isinstance(measure, fed.Projections):
            own |= {"backprop_share", *(() if options.backprop_share == 1 else ("mu", "difference"))}
        elif measure is not None:
            # The measure has its own difference, or none.
            own -= {"difference"}
        if (options.local_steps or algorithm.local_steps or 1) == 1:
            own -= {"local_learning_rate"}
        reading |= own | ({"mus"} if "mu" in own else set())
        reading |= {"local_learning_rates"} if "local_learning_rate" in own else set()
        if measure is None or measure.has_scalars:
            reading.add("snapshot_every")
    for name in ("local_learning_rate", "local_learning_rates"):
        if name not in given or name in reading:
            continue
        names = ", ".join(method.name for method in methods)
        raise ParameterError(
            name,
            "is read by methods that send scalars, with `local_steps` above 1; it would have no effect on " + names,
        )
    if "snapshot_every" in given and "snapshot_every" not in reading:
        raise ParameterError(
            "snapshot_every",
            f"is read by methods with scalars; {methods[0].name} takes a snapshot at every evaluation",
        )
    if "backprop_share" in given and "backprop_share" not in reading:
        raise ParameterError(
            "backprop_share",
            f"is read by methods whose clients project, with `measure` projections; it would have no effect on "
            f"{', '.join(method.name for method in methods)}",
        )
    for name in MEASUREMENT:
        if name in given and name not in reading:
            names = ", ".join(method.name for method in methods)
            along = "finite differences" if name in ("mu", "mus", "difference", "directions") else "along directions"
            raise ParameterError(name, f"is read by methods that measure {along}; it would have no effect on {names}")


# Options that decide which other options exist.
DECIDING = (*KINDS, *NESTED, "algorithm", "algorithms", "schedules", "combine", "attack")
# Options of sweeps and comparisons alone, for which a task may declare defaults, too.
OF_STUDIES = (
    "algorithms",
    "baseline",
    "budget",
    "local_learning_rates",
    "mus",
    "protocol",
    "schedules",
    "seeds",
    "tries",
    "tuning_seeds",
    "validation",
)
# An error lists at most this many owners of an option.
NAMED = 4


@dataclass(frozen=True)
class Resolved:
    """The choices, and the options that exist with them.

    Attributes:
      kind: the dataclass of the settings, without the options of the choices.
      typed: the names of the methods as they were given.
      added: the channels that are added to these names.
      methods: the methods, with these channels.
      choices: all other choices, the task first.
      options: all options by name, with the defaults that the choices give them.
      whole: the dataclass of the settings with the options of the choices.
    """

    kind: type
    typed: tuple[str, ...]
    added: str
    methods: tuple[Method, ...]
    choices: tuple[Choice, ...]
    options: dict[str, Option]
    whole: type

    def settings(self, given: Mapping[str, Any], where: str = "an experiment") -> Any:
        """The settings with the values given to ``where``.

        Raises:
          ParameterError: an option is unknown, out of range, or would have no effect.
        """
        for name in given:
            self.check_known(name, where)
            if self.options[name].kind is bool:
                of_kind(name, given[name], bool, "True or False")
        values = {name: option.default for name, option in self.options.items()} | dict(given)
        made = self.whole(**(_through(values, self.typed, self.added) if self.added else values))
        check_read(made, self.methods, given)
        return made

    def check_known(self, name: str, where: str, advice: str = "") -> None:
        """Refuse a name that is no option of ``where`` with these choices; the error says where it belongs.

        Args:
          name: the name of the option.
          where: the command or function that it was given to.
          advice: the end of the error for a name that belongs nowhere.

        Raises:
          ParameterError: the name is no option.
        """
        if name in self.options:
            return
        for choice in self.choices:
            kind, owners = choice.kind.name, choice.kind.owners(name)
            if owners:
                raise ParameterError(
                    name,
                    f"is an option of `{kind}` {_listed(owners)}; it would have no effect with `{kind}` {choice.name}",
                )
        for kind, nested in NESTED.items():
            owners, choosing = nested.owners(name), KINDS["task"].owners(kind)
            if owners and choosing:
                raise ParameterError(
                    name, f"is an option of `{kind}` {_listed(owners)}, and that of `task` {_listed(choosing)}"
                )
        asked = [method.name for method in self.methods]
        through = [each for each in channels.NAMES if name in algorithms.load(f"decomfl+{each}").options]
        through = [] if name in algorithms.load("decomfl").options else through
        owners = algorithms.ALGORITHMS.owners(name)
        if through and not owners:
            several = f"the channels {', '.join(through)}" if len(through) > 1 else f"the channel {through[0]}"
            raise ParameterError(name, f"is an option of {several}, which {asked[0]}+{through[0]}, say, goes through")
        if owners:
            raise ParameterError(
                name, f"is an option of {', '.join(owners)}; it would have no effect on {', '.join(asked)}"
            )
        raise unknown(name, where, self.options, advice)


_OF_RUN = "it is an argument of .run()"
# Names that users of ``fed.Simulation`` give an experiment.
ELSEWHERE = {
    **dict.fromkeys(("out", "resume", "mesh", "callbacks"), _OF_RUN),
    "storage": "give the directory to .run()",
    "tx": "it is called `algorithm`",
    "config": "its numbers are options of their own, `rounds` and `cohort` for example",
    "participation": "it is made of `availability`, `dropout`, `deadline` and others",
}


def every_option() -> set[str]:
    """The names of the options of all methods, channels and other choices of this package."""
    methods = [algorithms.load(name) for name in algorithms.NAMES]
    methods += [algorithms.load(f"decomfl+{channel}") for channel in channels.NAMES]
    own = {name for method in methods for name in method.options}
    return own.union(*(kind.every_option() for kind in (*KINDS.values(), *NESTED.values())))


def unknown(name: str, where: str, known: Mapping[str, Any], advice: str = "") -> ParameterError:
    """The error for a name that is no option of ``where``, with the closest known name, or else with ``advice``."""
    hint = did_you_mean(name, known, quote="`")
    if PARAMETERS.get(name) in known:
        return ParameterError(name, f"is called `{PARAMETERS[name]}` now{hint if name in SYNONYMS else ''}")
    if where == "an experiment" and name in ELSEWHERE:
        return ParameterError(name, f"is no option of {where}: {ELSEWHERE[name]}")
    return ParameterError(name, f"is no option of {where}{hint or advice}")


def _listed(names: Sequence[str]) -> str:
    """Names for a sentence; of a long list the first ones, and the number of the others."""
    few = names if len(names) <= NAMED else names[: NAMED - 1]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(few) < len(names) else "")


def _asked_for(own: Mapping[str, Option], names: Mapping[str, Any]) -> list[Any]:
    """The requested methods, as names or values."""
    if "algorithms" in own:
        given = names.get("algorithms")
        several = own["algorithms"].default if given is None else given
        return [name.strip() for name in (several.split(",") if isinstance(several, str) else several)]
    return [names.get("algorithm", own["algorithm"].default)]


def _channels(names: Mapping[str, Any]) -> str:
    """The suffix that ``combine`` and ``attack`` add to a method's name: a name includes its channels.

    Raises:
      ParameterError: a channel is unknown.
    """
    # The guard has its own option.
    shorten = tuple(name for name in channels.names_of("combine", "rescale") if name != "guard")
    allowed = {"combine": shorten, "attack": channels.names_of("attack")}
    added = ""
    for option, valid in allowed.items():
        for name in names[option].split("+") if names.get(option) is not None else ():
            if name not in valid:
                raise ParameterError(option, f"must be one of {', '.join(valid)}, got {name!r}")
            added += f"+{name}"
    return added


def _through(values: Mapping[str, Any], asked: Sequence[str], added: str) -> dict[str, Any]:
    """The values with the channels ``added`` to the methods' names; ``asked`` are the names as given."""

    def renamed(word: str) -> str:
        name, equals, rate = word.partition("=")
        return f"{name.strip()}{added}{equals}{rate}" if name.strip() in asked else word

    named = [f"{name}{added}" for name in asked]
    changed: dict[str, Any] = {"combine": None, "attack": None}
    if "algorithms" not in values:
        return {**values, **changed, "algorithm": named[0]}
    changed["algorithms"] = tuple(named)
    if values["learning_rate"] is not None:
        changed["learning_rate"] = tuple(map(renamed, values["learning_rate"]))
    if values.get("baseline") is not None:
        changed["baseline"] = renamed(values["baseline"])
    return {**values, **changed}


def _choices(own: Mapping[str, Option], names: Mapping[str, Any]) -> list[Choice]:
    """The choices: those in ``names``, or else the defaults of the settings.

    Raises:
      ParameterError: a name is unknown.
    """

    def load(kind: str, name: Any) -> Choice:
        return name if isinstance(name, Choice) else KINDS[kind].load(name)

    found = [load(kind, names.get(kind, own[kind].default)) for kind in KINDS if kind in own]
    if "schedules" in own:
        several = names.get("schedules", own["schedules"].default)
        several = several.split(",") if isinstance(several, str) else several
        found += [load("schedule", name.strip()) for name in dict.fromkeys(several)]
    return found


def _declared(own: Mapping[str, Option], names: Mapping[str, Any]) -> dict[str, Any]:
    """The task's defaults of options that decide which other options exist, see ``hiso_jax.choices.defaults``."""
    given = names.get("task", own["task"].default)
    task = given if isinstance(given, Choice) else KINDS["task"].load(given)
    return {
        name: value for name, value in task.defaults.items() if name in DECIDING and (name in own or name in NESTED)
    }


def _defaults_of(choice: Choice, options: Mapping[str, Option]) -> dict[str, Option]:
    """The options that have other defaults with a choice, see ``hiso_jax.choices.defaults``.

    Raises:
      ParameterError: it declares a default that is no option, or one that decides which options exist, as only a task
        may.
    """
    found = {}
    for name, value in choice.defaults.items():
        hint = did_you_mean(name, options, cutoff=0.8)
        if name in DECIDING and choice.kind.name != "task":
            raise ParameterError(choice.kind.name, f"{choice.name} must not declare a default of {name}: a task may")
        if name in options:
            found[name] = replace(options[name], default=value)
        elif hint and name not in OF_STUDIES:
            raise ParameterError(
                choice.kind.name, f"{choice.name} declares a default of {name}, which is no option{hint}"
            )
    return found


def resolve(kind: type, names: Mapping[str, Any]) -> Resolved:
    """The choices that ``names`` make, and the options that exist with them.

    Args:
      kind: the dataclass of the settings.
      names: the given options of :data:`DECIDING`: names, or a :class:`~hiso_jax.choices.Choice` or
        :class:`~hiso_jax.algorithms.Method` made from a value.

    Raises:
      ParameterError: a name is unknown, or two choices define an option differently.
    """
    own = own_options(kind)
    names = {**_declared(own, names), **names}
    added, typed = _channels(names), _asked_for(own, names)
    if all(isinstance(name, str) for name in typed):
        methods = list(methods_of([f"{name}{added}" for name in typed]).values())
    else:
        methods = typed
    choices = _choices(own, names)
    choices += nested_choices(methods, choices, names)
    whole, flat = options_with(kind, methods, choices), own | chosen_options(methods, choices)
    if any(method.is_private for method in methods) and "direction_groups" in flat:
        # One group, unless several are requested: see ``Method.build``.
        flat["direction_groups"] = replace(flat["direction_groups"], default="shared")
    # The task is the first choice, and its defaults go before those of the others.
    for choice in reversed(choices):
        flat |= _defaults_of(choice, flat)
    return Resolved(kind, tuple(map(str, typed)), added, tuple(methods), tuple(choices), flat, whole)
