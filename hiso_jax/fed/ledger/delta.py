"""A fine-tuned model as a small file: its scalars and the fingerprint of its base (``docs/reference/formats.md``)."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError, of_kind
from hiso_jax.checks import arrays as check_arrays
from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.codes import pack, packed_size, unpack
from hiso_jax.fed.ledger.files import read_regular, write_file
from hiso_jax.fed.ledger.fingerprint import base_fingerprints, fingerprint
from hiso_jax.fed.ledger.ledger import json_bytes
from hiso_jax.fed.ledger.reading import LedgerFile, seed_key_of
from hiso_jax.fed.ledger.records import Codes, Updates, named, unnamed
from hiso_jax.fed.ledger.replay import replay
from hiso_jax.fed.ledger.schema import DeltaHeader, DeltaMetadata, check_key, read_json, shown, width_of
from hiso_jax.paths import as_path

FORMAT = 1
KEY = "hiso_jax"
# The entries that a delta copies from the header of a ledger.
FROM_HEADER = ("seed", "prng_impl", "config", "about", "params", "state", "base", "environment")


@dataclass(frozen=True)
class Delta:
    """The contents of a delta file.

    Attributes:
      header: entries of the ledger's header, the number of rounds, the SHA-256 of the parameters after them, a sample
        of these parameters, and the last evaluation.
      updates: the rounds.
      sha256: the SHA-256 of the file that it was read from, or None.
    """

    header: Mapping[str, Any]
    updates: Updates
    sha256: str | None = None


def delta_of(ledger: LedgerFile, about: Mapping[str, Any] | None = None) -> Delta:
    """The delta of a run.

    Args:
      ledger: the run's ledger.
      about: a description of the run that replaces the ledger's ``about``.
    """
    of_kind("ledger", ledger, LedgerFile, 'a ledger, as fed.load("runs/mine") returns')
    last = ledger.evaluations[-1] if ledger.evaluations else None
    header = {name: ledger.header[name] for name in FROM_HEADER}
    header["about"] = ledger.header["about"] if about is None else dict(about)
    header["rounds"] = len(ledger.rows)
    header["params_sha256"] = ledger.checks.get(len(ledger.rows))
    taken = None if ledger.seal is None else ledger.seal.get("sample")
    if taken is not None and None not in taken:
        header["sample"] = taken
    header["evaluation"] = None if last is None else {"round": last.round, **last.metrics}
    reads_loss = ledger.header.get("algorithm", {}).get("reads_loss", False)
    records = ledger.records
    return Delta(header, records.updates_with_losses if reads_loss else records.updates)


def bytes_a_round(delta: Delta) -> float:
    """The bytes that a round adds to a delta, on average."""
    return sum(tensor.nbytes for tensor in _tensors_of(delta.updates)[0].values()) / len(delta.updates.round)


def _tensors_of(updates: Updates) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """The tensors of a delta's rounds by name, and the bits, K and P of those tensors that are packed codes."""
    tensors: dict[str, np.ndarray] = {}
    coded: dict[str, list[int]] = {}
    for name, column in named("aggregate", updates.aggregate).items():
        if isinstance(column, Codes):
            coded[name] = [column.bits, *column.array.shape[-2:]]
            column = pack(column.array, column.bits)
        elif column.dtype == bool:
            column = np.packbits(column, axis=-1)
        tensors[name] = np.ascontiguousarray(column)
    tensors["applied"] = np.packbits(updates.applied)
    for name in ("loss", "version", "place"):
        if getattr(updates, name) is not None:
            tensors[name] = np.ascontiguousarray(getattr(updates, name))
    return tensors, coded


def save_delta(delta: Delta, path: Path | str) -> int:
    """Write a delta as one safetensors file, and return its size in bytes.

    Raises:
      OSError: the file cannot be written.
    """
    from safetensors.numpy import save

    of_kind("delta", delta, Delta, "a delta, as fed.delta_of(ledger) returns")
    tensors, coded = _tensors_of(delta.updates)
    own = {"format": FORMAT, **delta.header, **({"coded": coded} if coded else {})}
    header = {**own, "sha256": {name: _digest(array) for name, array in tensors.items()}}
    text = json_bytes(header).decode()
    content = save(tensors, metadata={KEY: text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    write_file(as_path("path", path), content)
    return len(content)


def load_delta(path: Path | str, *, expect_sha256: str | None = None) -> Delta:
    """Read a delta, verify every byte of it, and check that a run can have written it.

    The digests in the file detect alterations in transit; they do not prove who wrote the file. For a delta from
    elsewhere, get the SHA-256 of the file from someone you trust and pass it as ``expect_sha256``.

    Args:
      path: the file.
      expect_sha256: the SHA-256 of the entire file, 64 hexadecimal digits.

    Raises:
      ValueError: the SHA-256 is not the expected one, the file is not a delta or was altered (the field is named), or
        its header does not match its tensors.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = as_path("path", path)
    if expect_sha256 is not None:
        of_kind("expect_sha256", expect_sha256, str, "64 hexadecimal digits")
    content = read_regular(path)
    own = hashlib.sha256(content).hexdigest()
    if expect_sha256 is not None and own != expect_sha256.strip().lower():
        raise ParameterError("expect_sha256", f"must be that of {path}, which is {own}; got {shown(expect_sha256)}")
    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        DeltaMetadata.model_validate(metadata)
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is refused: its safetensors header is damaged, or it is no delta") from error
    text = metadata[KEY].encode("utf-8", "surrogatepass")
    if hashlib.sha256(text).hexdigest() != metadata["sha256"]:
        raise ValueError(f"{path} is refused: its metadata were altered, or it is no delta")
    try:
        header = read_json(text, DeltaHeader)
        check_key(header)
        if set(tensors) != set(header["sha256"]):
            raise ValueError(f"its tensors must be {', '.join(header['sha256'])}")
        for name, digest in header["sha256"].items():
            if _digest(tensors[name]) != digest:
                raise ValueError(f"its tensor {name} was altered")
        updates = _updates(header, tensors)
    except ValueError as error:
        raise ValueError(f"{path} is refused: {error}") from error
    kept = {name: value for name, value in header.items() if name not in ("format", "sha256", "coded")}
    return Delta(kept, updates, own)


def _updates(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Updates:
    """The rounds in a delta's tensors.

    Raises:
      ValueError: the tensors do not have the types and shapes that the header states.
    """
    rounds, clients = header["rounds"], width_of(header["config"])
    coded = header.get("coded", {})
    columns: dict[str, Any] = dict(tensors)
    bits = columns.pop("applied", None)
    if bits is None or bits.dtype != np.uint8 or bits.shape != (-(-rounds // 8),):
        raise ValueError(f"its tensor applied must be a bit for each of {rounds} rounds")
    loss = columns.pop("loss", None)
    if loss is not None and (loss.shape != (rounds,) or not np.issubdtype(loss.dtype, np.floating)):
        raise ValueError(f"its tensor loss must be a number for each of {rounds} rounds")
    version, place = (columns.pop(name, None) for name in ("version", "place"))
    for name, column in (("version", version), ("place", place)):
        if (column is None) != (header["config"].get("buffer") is None):
            raise ValueError(f"its tensor {name} must be there if, and only if, the run had a buffer")
        if column is not None and (column.shape != (rounds, clients) or column.dtype != np.int32 or (column < 0).any()):
            raise ValueError(f"its tensor {name} must hold a number for each of {clients} visits in {rounds} rounds")
    if version is not None and (version > np.arange(rounds)[:, None]).any():
        raise ValueError("its tensor version must not name rounds that had not come")
    for name, column in columns.items():
        if column.ndim < 1 or len(column) != rounds:
            raise ValueError(f"its tensor {name} must have {rounds} rounds, and has shape {column.shape}")
        if name.partition(".")[0] != "aggregate":
            raise ValueError(f"its tensor {name} is not a tensor of a delta")
        wanted = np.uint8 if name in coded or name.endswith(".valid") else np.floating
        if not np.issubdtype(column.dtype, wanted):
            raise ValueError(f"its tensor {name} must not be of {column.dtype}")
    for name, (width, *shape) in coded.items():
        packed = columns.get(name)
        if packed is None or packed.shape[-1] != packed_size(math.prod(shape), width):
            raise ValueError(f"its tensor {name} must hold codes of {width} bits, {shape[0]} × {shape[1]} of them")
        columns[name] = Codes(unpack(packed, width, tuple(shape)), width)
        valid, step = (name.removesuffix("codes") + part for part in ("valid", "step"))
        if step not in columns:
            raise ValueError(f"its tensor {step} is missing")
        if valid in tensors:
            if columns[valid].shape != (rounds, -(-clients // 8)):
                raise ValueError(f"its tensor {valid} must be a bit for each of {clients} clients")
            columns[valid] = np.unpackbits(tensors[valid], axis=-1, count=clients).astype(bool)
    aggregate = unnamed("aggregate", columns)
    if aggregate is None:
        raise ValueError("it has no tensor aggregate")
    applied = np.unpackbits(bits, count=rounds).astype(bool)
    numbers = np.arange(rounds, dtype=np.int32)
    return Updates(seed_key_of(header), numbers, aggregate, applied, clients, loss, version, place)


def _digest(array: np.ndarray) -> str:
    label = f"{array.shape} {array.dtype}\n".encode()
    return hashlib.sha256(label + np.ascontiguousarray(array).tobytes()).hexdigest()


def apply_delta(
    delta: Delta,
    params: PyTree,
    tx: Algorithm | optax.GradientTransformation,
    *,
    frozen: PyTree | None = None,
    accept_difference: bool = False,
) -> PyTree:
    """The fine-tuned parameters of a delta.

    Args:
      delta: the delta, from :func:`load_delta`.
      params: the run's initial parameters.
      tx: its optimizer, or its algorithm.
      frozen: the parameters that the run did not train, if its task has any.
      accept_difference: also accept parameters that differ from the run's in their bits, for example on another
        processor.

    Raises:
      ValueError: the base checkpoint is not the run's, or the rebuilt parameters are not.

    Example:
      >>> import tempfile, hiso_jax
      >>> from hiso_jax import fed, tasks
      >>> task, tx = tasks.digits(), hiso_jax.hiso(1e-2)
      >>> population = fed.dirichlet(task.train["label"], 20, alpha=0.5)
      >>> folder = tempfile.mkdtemp()
      >>> config = fed.SimulationConfig(rounds=10, cohort=4, eval_every=5)
      >>> result = fed.Simulation(task, tx, population, config, storage=fed.Storage(f"{folder}/run")).run()
      >>> size = fed.save_delta(fed.delta_of(fed.load(f"{folder}/run")), f"{folder}/delta.safetensors")
      >>> params = fed.apply_delta(fed.load_delta(f"{folder}/delta.safetensors"), result.initial_params, tx)
      >>> fed.fingerprint(params) == fed.fingerprint(result.params)
      True
    """
    of_kind("delta", delta, Delta, "a delta, as fed.load_delta(path) returns")
    check_arrays("params", params)
    if base_fingerprints(params, frozen) != dict(delta.header["base"]):
        raise ParameterError(
            "params", "must be those that the run began with; their fingerprint differs from the delta's"
        )
    rebuilt, _ = jax.block_until_ready(replay(params, tx, delta.updates))
    known = delta.header["params_sha256"]
    if known not in (None, fingerprint(rebuilt)) and not accept_difference:
        raise ParameterError(
            "tx",
            "must be the run's optimizer, on a processor and by a jaxlib like its own: the parameters that come out "
            "are not the run's to the last bit; `accept_difference` accepts them anyway",
        )
    return rebuilt
