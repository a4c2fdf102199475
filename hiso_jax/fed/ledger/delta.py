"""A fine-tuned model as a small file: its scalars, and which checkpoint they belong to (``docs/formats.md``)."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax.fed.codes import pack, unpack
from hiso_jax.fed.ledger.files import write_whole
from hiso_jax.fed.ledger.ledger import LedgerFile, json_bytes, seed_key_of
from hiso_jax.fed.ledger.records import Codes, Updates, named, unnamed

FORMAT = 1
KEY = "hiso_jax"
# What a delta takes from the header of a ledger.
FROM_HEADER = ("seed", "prng_impl", "config", "about", "params", "state", "base", "environment")


@dataclass(frozen=True)
class Delta:
    """What a delta file holds.

    Attributes:
      header: as that of a ledger, and the number of rounds, the SHA-256 of the parameters after them, and the last
        evaluation.
      updates: the rounds.
    """

    header: Mapping[str, Any]
    updates: Updates


def delta_of(ledger: LedgerFile, about: Mapping[str, Any] | None = None) -> Delta:
    """The delta of a run.

    Args:
      ledger: its ledger.
      about: in place of what the ledger says of the run beside its numbers.
    """
    last = ledger.evaluations[-1] if ledger.evaluations else None
    header = {name: ledger.header[name] for name in FROM_HEADER}
    header["about"] = ledger.header["about"] if about is None else dict(about)
    header["rounds"] = len(ledger.rows)
    header["params_sha256"] = ledger.checks.get(len(ledger.rows))
    header["evaluation"] = None if last is None else {"round": last.round, **last.metrics}
    return Delta(header, ledger.records.updates)


def bytes_a_round(delta: Delta) -> float:
    """How much a delta grows with a round."""
    return sum(tensor.nbytes for tensor in _tensors_of(delta.updates)[0].values()) / len(delta.updates.round)


def _tensors_of(updates: Updates) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """What a delta holds of its rounds: arrays, and of packed codes their bits, K and P by name."""
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
    return tensors, coded


def save_delta(delta: Delta, path: Path) -> int:
    """Write a delta as one safetensors file, and return its size in bytes.

    Raises:
      OSError: it cannot be written.
    """
    from safetensors.numpy import save

    tensors, coded = _tensors_of(delta.updates)
    own = {"format": FORMAT, **delta.header, **({"coded": coded} if coded else {})}
    header = {**own, "sha256": {name: _digest(array) for name, array in tensors.items()}}
    text = json_bytes(header).decode()
    content = save(tensors, metadata={KEY: text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    write_whole(path, content)
    return len(content)


def load_delta(path: Path) -> Delta:
    """Read a delta and verify every byte of it.

    Raises:
      ValueError: it is no delta, or it was altered (the field is named).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is refused: its safetensors header is damaged, or it is no delta") from error
    text = metadata.get(KEY)
    if text is None or hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256"):
        raise ValueError(f"{path} is refused: its metadata were altered, or it is no delta")
    header = json.loads(text)
    if header["format"] != FORMAT:
        raise ValueError(f"{path} has delta format {header['format']}; this release reads {FORMAT}")
    if set(tensors) != set(header["sha256"]):
        raise ValueError(f"{path} is refused: its tensors must be {', '.join(header['sha256'])}")
    for name, digest in header["sha256"].items():
        if _digest(tensors[name]) != digest:
            raise ValueError(f"{path} is refused: its tensor {name} was altered")
    rounds = header["rounds"]
    applied = np.unpackbits(tensors["applied"], count=rounds).astype(bool)
    clients = header["config"]["cohort"]
    columns: dict[str, Any] = dict(tensors)
    for name, (bits, *shape) in header.get("coded", {}).items():
        columns[name] = Codes(unpack(tensors[name], bits, tuple(shape)), bits)
        valid = name.removesuffix("codes") + "valid"
        if valid in tensors:
            columns[valid] = np.unpackbits(tensors[valid], axis=-1, count=clients).astype(bool)
    numbers = np.arange(rounds, dtype=np.int32)
    updates = Updates(seed_key_of(header), numbers, unnamed("aggregate", columns), applied, clients)
    kept = {name: value for name, value in header.items() if name not in ("format", "sha256", "coded")}
    return Delta(kept, updates)


def _digest(array: np.ndarray) -> str:
    label = f"{array.shape} {array.dtype}\n".encode()
    return hashlib.sha256(label + np.ascontiguousarray(array).tobytes()).hexdigest()
