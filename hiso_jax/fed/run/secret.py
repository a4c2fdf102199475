"""The secret of a run: a key that no public value reveals, for noise and cohorts that only the server may know.

The operating system draws it. A file beside the ledger, readable by its owner only, keeps it, because a resumed run
must make the same noise again: a round that is broadcast twice with different noise reveals more than once.
"""

import os
import secrets
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from hiso_jax.fed.devices import agree, in_all_processes
from hiso_jax.fed.ledger import LEDGER, Storage, exists

SECRET = "server.secret"
# A threefry key is two words; every integer type of a device can hold half a word.
HALVES = 4
BITS = 16


def fresh() -> list[int]:
    """The halves of a new secret."""
    return [secrets.randbits(BITS) for _ in range(HALVES)]


def as_key(halves: list[int]) -> Key[Array, ""]:
    """The key that the halves of a secret make."""
    words = np.array(halves, np.uint32).reshape(2, 2) @ np.array([1 << BITS, 1], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl="threefry2x32")


def secret_of(storage: Storage | None, mesh: Mesh | None) -> Key[Array, ""]:
    """The secret of a run, the same in all its processes; a new secret, written to ``storage``, if it has none.

    Raises:
      ValueError: the secret's file holds something else, or is missing beside a ledger.
      OSError: the file cannot be written.
    """
    folder = None if storage is None or jax.process_index() != 0 else storage.folder
    halves = in_all_processes(lambda: fresh() if folder is None else _kept(folder, fresh()))
    return as_key([int(half) for half in agree(mesh, *halves)])


def _kept(folder: Path, new: list[int]) -> list[int]:
    path = folder / SECRET
    if exists(folder / LEDGER) and not exists(path):
        raise ValueError(
            f"{path} is missing: without its secret a private run cannot go on, since a round that is broadcast with "
            "two noises reveals more; show, replay and export need none"
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Readable by its owner only, from the first byte on. ``O_EXCL`` refuses existing files and links.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        text = path.read_text(errors="replace").strip()
        if len(text) != HALVES * BITS // 4 or any(c not in "0123456789abcdef" for c in text):
            raise ValueError(f"{path} is not the secret of a run: it must be 16 hexadecimal digits") from None
        return [int(text[i : i + 4], 16) for i in range(0, len(text), 4)]
    with os.fdopen(handle, "w") as file:
        file.write("".join(f"{half:04x}" for half in new) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return new


def of_setting(secret: Key[Array, ""], seed_key: Key[Array, ""], *numbers: Float[Array, "..."]) -> Key[Array, ""]:
    """The secret of one setting of a sweep. With equal noise, the difference of two broadcasts would have no noise.

    Args:
      secret: the secret of the sweep.
      seed_key: the seed key of the setting.
      numbers: all numbers in which settings differ.
    """
    flat = jnp.concatenate([jnp.ravel(jnp.asarray(number, jnp.float32)) for number in numbers])
    words = jnp.concatenate([jax.random.bits(seed_key, (1,)), jax.lax.bitcast_convert_type(flat, jnp.uint32)])
    return jax.lax.scan(lambda key, word: (jax.random.fold_in(key, word), None), secret, words)[0]
