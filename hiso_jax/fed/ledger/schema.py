"""The schemas of the JSON in a ledger or a delta: digests detect an altered file, schemas detect a forged one.

A forger recomputes the digests of a file, so every entry is untrusted. An entry must have the right type, be in range
and agree with the arrays beside it; otherwise the file is refused with a message of one sentence.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from hiso_jax.fed.ledger.fingerprint import SAMPLED
from hiso_jax.fed.ledger.frames import VERSION

MOST = 2**31 - 1
# The number of characters of a value that an error message shows.
SHOWN = 60

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Number = Annotated[int, Field(ge=0, le=MOST)]
Size = Annotated[int, Field(ge=1, le=MOST)]
Word = Annotated[int, Field(ge=0, le=2**32 - 1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(max_length=2000)]
Shape = Annotated[list[Number], Field(max_length=32)]
Kind = Annotated[str, Field(pattern=r"^([<|=]?[fiub][1248]|int[1248])$")]
Column = tuple[Name, Kind, Shape]
Leaf = tuple[Name, Shape, Name]


class _Part(BaseModel):
    # Strict: "6" and 6.0 are not valid numbers of rounds. Entries that a later release adds are ignored.
    model_config = ConfigDict(strict=True, extra="ignore")


class _Base(_Part):
    trained: Sha256
    frozen: Sha256 | None


class _Environment(_Part):
    versions: dict[Name, Name]
    backend: Name
    device: Name
    flags: dict[Name, JsonValue]
    xla_flags: Name


class _Config(_Part):
    rounds: Size
    cohort: Size
    buffer: Size | None = None
    local_steps: Size
    perturbations: Size


class _Common(_Part):
    seed: Annotated[list[Word], Field(min_length=1, max_length=16)]
    prng_impl: Name
    config: _Config
    about: dict[str, JsonValue]
    params: list[Leaf]
    state: list[Leaf]
    base: _Base
    environment: _Environment


class Header(_Common):
    """The header of a ledger."""

    format: Literal[1]
    columns: Annotated[list[Column], Field(min_length=1)]
    data: Name
    algorithm: dict[str, JsonValue] = {}
    made_of: dict[Name, Name] = {}


class DeltaMetadata(_Part):
    """The metadata of a delta's safetensors file."""

    hiso_jax: str
    sha256: Sha256


class DeltaHeader(_Common):
    """The header of a delta."""

    format: Literal[1]
    rounds: Number
    params_sha256: Sha256 | None
    sample: Annotated[list[Finite], Field(max_length=SAMPLED)] | None = None
    evaluation: dict[Name, Finite | None] | None
    sha256: dict[Name, Sha256]
    coded: dict[Name, tuple[Literal[1, 2, 4, 8], Size, Size]] = {}


class EvaluationFrame(_Part):
    """The frame of an evaluation."""

    round: Number
    train_loss: Finite | None
    metrics: dict[Name, Finite | None]
    bytes_up: Count
    bytes_down: Count
    forward_passes: Count
    seconds: Seconds
    simulated_seconds: Seconds | None = None
    params_sha256: Sha256 | None


class EnvironmentFrame(_Environment):
    """The frame of an environment in which a run is continued."""

    round: Number


class ExtensionFrame(_Part):
    """The frame that extends a run beyond its planned rounds."""

    round: Number
    rounds: Size


class SealFrame(_Part):
    """The seal: how a run ended."""

    rounds: Number
    head: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    params_sha256: Sha256 | None
    diverged_at: Number | None
    seconds: Seconds
    sample: Annotated[list[Finite | None], Field(max_length=SAMPLED)] | None = None


def read_json(payload: bytes, kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON in ``payload``, validated against ``kind``.

    Raises:
      ValueError: the JSON does not fit ``kind``; the message names the first wrong entry.
    """
    try:
        content = json.loads(payload, parse_constant=_refuse)
        # Validated as JSON text, in which an array may stand for a tuple.
        kind.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        if where == "format":
            raise ValueError(f"it has another format than {VERSION}, which this release reads") from None
        raise ValueError(f"its entry {where} is wrong: {first['msg']}, got {shown(first['input'])}") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"its JSON contains {constant}, which is not valid JSON")


def shown(value: Any) -> str:
    """A value as an error message shows it: at most ``SHOWN`` characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def check_key(header: Mapping[str, Any]) -> None:
    """Refuse a seed that is not a key of its random number generator.

    Raises:
      ValueError: the generator is unknown, or its keys have another number of words.
    """
    name, seed = header["prng_impl"], header["seed"]
    try:
        length = jax.random.key_data(jax.random.key(0, impl=name)).shape
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"its random number generator is {shown(name)}, which is unknown here") from None
    if length != (len(seed),):
        raise ValueError(f"its seed must be {length[0]} words for {name}, and has {len(seed)}")


def width_of(config: Mapping[str, Any]) -> int:
    """The number of clients in a round's row: the cohort, or the answers that an asynchronous round takes."""
    return config.get("buffer") or config["cohort"]


def check_columns(columns: Sequence[Sequence[Any]], config: Mapping[str, Any]) -> None:
    """Refuse a ledger whose columns are not the columns of rounds.

    Args:
      columns: the name, type and shape of each column.
      config: the run's configuration.

    Raises:
      ValueError: a column is missing, unknown or named twice, or has another type or shape.
    """
    found = {name: (kind, list(shape)) for name, kind, shape in columns}
    if len(found) != len(columns):
        raise ValueError("its entry columns names a column twice")
    cohort = [width_of(config)]
    wanted: dict[str, tuple[str, list[int]]] = {
        "round": ("<i4", []),
        "cohort": ("<i4", cohort),
        "attendance": ("|i1", cohort),
        "valid": ("|b1", cohort),
        "seconds": ("<f4", []),
        "bytes_up": ("<u8", []),
        "bytes_down": ("<u8", []),
    }
    for name, expected in wanted.items():
        if found.get(name) != expected:
            raise ValueError(f"its column {name} must be {expected[0]} of shape {expected[1]}, got {found.get(name)}")
    for name, kind in (("clipped", "<i4"), ("applied", "|b1")):
        if name in found and found[name] != (kind, []):
            raise ValueError(f"its column {name} must be one {kind}, got {found[name]}")
    kind, shape = found.get("loss", ("", []))
    if kind not in ("<f4", "<f8") or shape:
        raise ValueError(f"its column loss must be one float, got {kind} of shape {shape}")
    visits = {name: found[name] for name in ("version", "place") if name in found}
    if visits != (dict.fromkeys(("version", "place"), ("<i4", cohort)) if config.get("buffer") else {}):
        raise ValueError(f"its columns of visits must be version and place of a run with a buffer, got {visits}")
    for name, (kind, shape) in found.items():
        first = name.partition(".")[0]
        if (
            name not in wanted
            and name not in visits
            and first not in ("scalars", "aggregate", "loss", "clipped", "applied")
        ):
            raise ValueError(f"its column {shown(name)} is not a column of a round")
        if kind.startswith("int") and len(shape) < 2:
            raise ValueError(f"its column {name} of codes must have two axes or more, got {shape}")
        if name == "scalars" and shape[:1] != cohort:
            raise ValueError(f"its column scalars must be of {cohort[0]} clients, got shape {shape}")
