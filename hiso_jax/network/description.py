"""The description of a run, by which server and clients know that they mean the same run."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.ledger import contents, read_json, sample
from hiso_jax.fed.measure import Estimator
from hiso_jax.fed.round import reads_loss, shapes_of
from hiso_jax.fed.run import config_of
from hiso_jax.network.catch_up import BadMessage, Form, form_of
from hiso_jax.network.envelope import RUN_BYTES
from hiso_jax.version import VERSION

# Most bytes of a description, packed and unpacked.
LONGEST = 2**20
# Parameters of the same run may differ as far, relative to their root mean square, on another processor.
NEAR = 1e-3


Word = Annotated[int, Field(ge=0, le=2**32 - 1)]
Size = Annotated[int, Field(ge=0, le=2**31 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=2000)]
Leaf = tuple[Name, Annotated[list[Size], Field(max_length=32)], Name]


class _Said(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    version: Name
    about: dict[str, JsonValue]
    config: dict[str, JsonValue]
    seed: list[Word] = Field(min_length=1, max_length=16)
    prng_impl: Name
    parts: dict[Name, Name]
    params: list[Leaf] = Field(max_length=100_000)
    sample: list[Finite] = Field(max_length=64)
    private: bool
    cohort: Size
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0


class _Described(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    said: _Said
    rounds: Annotated[int, Field(ge=1, le=2**31 - 1)]


class Forms(NamedTuple):
    """The forms of a run's messages.

    Attributes:
      up: of a client's message.
      down: of a round's broadcast.
      groups: G, the number of groups of directions.
    """

    up: Form
    down: Form
    groups: int


def forms_of(
    algorithm: Algorithm, estimator: Estimator, params: PyTree, clients: int, *, buffered: bool = False
) -> Forms:
    """The forms of a run's messages; only shapes are read.

    ``clients`` are those whose answers an update takes; with a buffer each of them has columns of its own.

    Raises:
      ParameterError: the method cannot run over a network.
    """
    if not algorithm.has_scalars:
        raise ParameterError(
            "algorithm", "must send scalars over a network; Flower and others federate methods that send vectors"
        )
    if algorithm.attack is not None:
        raise ParameterError("attack", "is simulated; over a network clients are as hostile as they are")
    if estimator.is_balanced:
        raise ParameterError("backprop_share", "is simulated; over a network all clients measure alike")
    shapes = shapes_of(algorithm, estimator, params, clients, clients if buffered else None)
    if reads_loss(algorithm, shapes, params):
        raise ParameterError("algorithm", "must not read the loss of a round over a network: clients do not receive it")
    try:
        up, down = form_of(shapes.message), form_of(shapes.aggregate)
    except ValueError as error:
        raise ParameterError("algorithm", f"cannot run over a network: {error}") from error
    return Forms(up._replace(clients=0), down._replace(visits=clients if buffered else 0), shapes.groups)


def describe(
    about: Mapping[str, Any],
    algorithm: Algorithm,
    estimator: Estimator,
    config: fed.SimulationConfig,
    params: PyTree,
    held_out: float = 0.0,
) -> bytes:
    """The description of a run as packed JSON.

    Args:
      about: the options of its experiment; empty if a program makes the run's parts on both sides.
      algorithm: the method.
      estimator: how clients measure.
      config: the configuration of the run.
      params: the initial parameters.
      held_out: the share of its examples that a client keeps for evaluation.
    """
    key = jax.random.key(config.seed)
    # What moves no bit of the run is left out, so that a resumed run may change it.
    said = {
        "version": VERSION.rpartition(".")[0],
        "about": {name: value for name, value in about.items() if not _is_movable(name, value)},
        "config": {
            name: value
            for name, value in config_of(config, estimator.num_perturbations).items()
            if name not in _MOVABLE
        },
        "seed": np.asarray(jax.random.key_data(key)).tolist(),
        "prng_impl": str(jax.random.key_impl(key)),
        "parts": algorithm.part_digests,
        "params": contents(params),
        "sample": sample(params),
        "private": algorithm.needs_secret,
        "cohort": config.cohort,
        "held_out": held_out,
    }
    text = json.dumps({"said": said, "rounds": config.rounds}, sort_keys=True, default=str).encode()
    if len(text) > LONGEST:
        raise ParameterError("task", f"has too many parameters by name for a description of {LONGEST} bytes")
    return zlib.compress(text)


# Options that move no bit of what a client does, and places on the server's machine.
_MOVABLE = (
    *("rounds", "out", "resume", "eval_every", "snapshot_every", "log", "target", "data_dir", "from_snapshot"),
    *("rounds_per_dispatch", "client_chunk", "memory_budget", "directions", "devices", "model_shards"),
)


def _is_movable(name: str, value: Any) -> bool:
    """Whether an option may differ between machines: a model is known by its name, but not by its place."""
    return name in _MOVABLE or (name == "model" and isinstance(value, str) and Path(value).is_absolute())


def read_description(packed: bytes) -> dict[str, Any]:
    """The inverse of :func:`describe`: what it says, with the number of rounds among its options.

    Raises:
      BadMessage: it is no description; nothing larger than a megabyte is unpacked.
    """
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(packed, LONGEST)
    except zlib.error:
        raise BadMessage("a description is compressed, and this one is torn") from None
    if reader.unconsumed_tail or reader.unused_data or not reader.eof:
        raise BadMessage(f"a description has at most {LONGEST} bytes, and ends where its message ends")
    try:
        read = read_json(text, _Described)
    except ValueError as error:
        raise BadMessage(f"the description is refused: {error}") from None
    said = read["said"]
    return {**said, "about": said["about"] and {**said["about"], "rounds": read["rounds"]}}


def run_of(packed: bytes) -> bytes:
    """The run's name in every envelope: 8 bytes of the digest of what its description says.

    The number of rounds is not in it, so that a run may be extended.
    """
    said = json.loads(zlib.decompress(packed))["said"]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()[:RUN_BYTES]


def are_near(mine: PyTree, theirs: Any) -> bool:
    """Whether the sample of other parameters is as near as that of another processor's may be."""
    return are_near_samples(sample(mine), theirs)


def are_near_samples(mine: Any, theirs: Any) -> bool:
    """:func:`are_near` for a sample of one's own parameters."""
    own, other = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    if own.shape != other.shape or not np.isfinite(other).all():
        return False
    scale = max(float(np.sqrt(np.square(own).mean())), 1e-12)
    return bool(np.abs(own - other).max() <= NEAR * scale)
