"""What every method that sends scalars can be asked for: whose directions are whose, and in how many bits they go."""

from dataclasses import replace
from typing import Any

from hiso_jax import zo
from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm, FewBits
from hiso_jax.fed.wire import DEFAULT_BYTES_UP, Relay

Groups = int | str | None


def grouped(algorithm: Algorithm, *, direction_groups: Groups = None, direction_blocks: int | None = None) -> Algorithm:
    """The algorithm, its cohort dealt into groups with directions of their own.

    Args:
      algorithm: of a method that sends scalars.
      direction_groups: into how many groups a cohort is dealt, each with directions of its own; own gives every client
        its own, shared is one group.
      direction_blocks: parameters whose signs are flipped together to tell one group's directions from another's, by
        default up to 64; 0 draws every group's directions independently, at as many times the cost.

    Raises:
      ValueError: a number out of range.
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
    """The algorithm, its scalars in few bits.

    Args:
      algorithm: of a method that sends scalars.
      scalar_bits: bits of a scalar in a client's message, 1, 2, 4 or 8, beside one float32 step for all; 32 is floats
        and no step.
      bytes_up: as many bits a scalar as a message of so many bytes has room for.
      aggregate_bits: bits of a number in the aggregate that everyone is told and the server applies, 4, 8 or 32.
      relay: tell everyone the clients' messages, or their aggregate; by default the smaller where clients have
        directions of their own, and the aggregate where they share them. Messages show every client's scalars to all,
        and rule out secure aggregation.

    Raises:
      ValueError: a number out of range, or two that do not go together.
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
    """Both as :class:`~hiso_jax.fed.algorithm.FewBits` takes them: 20 bytes, those of DeComFL, if neither is given."""
    neither = scalar_bits is None and bytes_up is None
    return {"scalar_bits": scalar_bits, "bytes_up": DEFAULT_BYTES_UP if neither else bytes_up}
