"""Options of every method that sends scalars: the groups of directions, and the bits of a scalar."""

from dataclasses import replace
from typing import Any, Literal

from hiso_jax import zo
from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm, FewBits, projections
from hiso_jax.fed.wire import DEFAULT_BYTES_UP, Relay

Groups = int | str | None


def measured(algorithm: Algorithm, *, measure: Literal["probes", "projections"] | None = None) -> Algorithm:
    """The algorithm with another measure of its clients.

    Args:
      algorithm: a method whose message is one scalar a direction.
      measure: how clients get their scalars: finite differences, by forward passes only (probes), or their own
        progress by backpropagation, projected on the directions (projections); by default probes.

    Raises:
      ParameterError: the method has a measure of its own.
    """
    if measure is None:
        return algorithm
    if algorithm.measure is not None:
        raise ParameterError("measure", "must not be given for a method that has a measure of its own")
    return replace(algorithm, measure=projections()) if measure == "projections" else algorithm


def grouped(algorithm: Algorithm, *, direction_groups: Groups = None, direction_blocks: int | None = None) -> Algorithm:
    """The algorithm, with its cohort divided into groups that have their own directions.

    Args:
      algorithm: the algorithm of a method that sends scalars.
      direction_groups: number of groups of a cohort, each with its own directions; own gives every client its own
        directions, shared is one group.
      direction_blocks: number of parameters whose signs are flipped together to distinguish the directions of groups,
        by default up to 64; 0 draws every group's directions independently, at a cost proportional to the groups.

    Raises:
      ValueError: an option is out of range.
    """
    if direction_groups is None and direction_blocks is None:
        return algorithm
    changes: dict[str, Any] = {}
    if isinstance(direction_groups, int):
        if direction_groups < 1:
            raise ParameterError("direction_groups", f"must be own, shared or at least 1, got {direction_groups}")
        changes["groups"] = direction_groups
    elif direction_groups is not None:
        if direction_groups not in ("own", "shared"):
            raise ParameterError("direction_groups", f"must be own, shared or at least 1, got {direction_groups}")
        changes["groups"] = None if direction_groups == "own" else 1
    if direction_blocks is not None:
        if direction_blocks < 0:
            raise ParameterError("direction_blocks", f"must be at least 0, got {direction_blocks}")
        changes["block"] = direction_blocks
    return replace(algorithm, tx=zo.grouped(algorithm.tx, **changes))


def in_few_bits(
    algorithm: Algorithm,
    *,
    scalar_bits: int | None = None,
    bytes_up: int | None = None,
    aggregate_bits: int | None = None,
    relay: Relay | None = None,
) -> Algorithm:
    """The algorithm, with its scalars in few bits.

    Args:
      algorithm: the algorithm of a method that sends scalars.
      scalar_bits: bits of a scalar in a client's message, 1, 2, 4 or 8, with one float32 step for all scalars; 32 means
        floats without a step.
      bytes_up: largest size of a client's message in bytes; a scalar gets as many bits as fit.
      aggregate_bits: bits of an entry in the aggregate that the server broadcasts and applies, 4, 8 or 32.
      relay: content of the server's broadcast, the clients' messages or their aggregate; by default the smaller if
        clients have their own directions, else the aggregate. Messages reveal every client's scalars to all clients
        and rule out secure aggregation.

    Raises:
      ValueError: an option is out of range, or two options do not go together.
    """
    asked = {"scalar_bits": scalar_bits, "bytes_up": bytes_up, "aggregate_bits": aggregate_bits, "relay": relay}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if not given:
        return algorithm
    wire = algorithm.wire if isinstance(algorithm.wire, FewBits) else FewBits(scalar_bits=32)
    if scalar_bits is not None:
        given.setdefault("bytes_up", None)
    elif bytes_up is not None:
        given["scalar_bits"] = None
    return replace(algorithm, wire=replace(wire, **given))


def message_bits(scalar_bits: int | None, bytes_up: int | None) -> dict[str, Any]:
    """The arguments of :class:`~hiso_jax.fed.algorithm.FewBits`; 20 bytes, as DeComFL, if neither is given."""
    neither = scalar_bits is None and bytes_up is None
    return {"scalar_bits": scalar_bits, "bytes_up": DEFAULT_BYTES_UP if neither else bytes_up}
