"""The files of a client: where it stands, in one file that is replaced whole, and the secret of its own noise."""

import hashlib
import json
import logging
import os
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from jaxtyping import PyTree

from hiso_jax.fed.devices import from_key_data, is_key, key_data
from hiso_jax.fed.ledger import write_file
from hiso_jax.fed.run import as_key, fresh

logger = logging.getLogger("hiso_jax")
STATE, SECRET = "state.safetensors", "client.secret"
# The state is written at most this share of the time; who stands further back after a restart is caught up.
WRITING_SHARE = 0.1


class Standing(NamedTuple):
    """Where a client stands.

    Attributes:
      round: the client knows all rounds before this one.
      history: the digest of the rounds that it knows, see :mod:`hiso_jax.network.history`.
      params: its parameters.
      state: its optimizer's state.
    """

    round: int
    history: bytes
    params: PyTree
    state: optax.OptState


class ClientFiles:
    """The files in a client's folder.

    Args:
      folder: the folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        """See the class."""
        self._folder, self._written, self._writing = folder, 0.0, 0.0

    @property
    def is_cheap(self) -> bool:
        """Whether writing the state now keeps to its share of the time."""
        return time.monotonic() - self._written >= self._writing / WRITING_SHARE

    def save(self, run: bytes, standing: Standing) -> None:
        """Write where the client stands in a run.

        Raises:
          OSError: the file cannot be written.
        """
        before = time.monotonic()
        leaves = jax.tree.leaves((standing.params, standing.state))
        arrays = {str(place): np.asarray(key_data(leaf)) for place, leaf in enumerate(leaves)}
        about = {"run": run.hex(), "round": standing.round, "history": standing.history.hex()}
        content = safetensors.numpy.save(arrays, {"hiso_jax": json.dumps(about)})
        write_file(self._folder / STATE, content + hashlib.sha256(content).digest())
        self._written = time.monotonic()
        self._writing = self._written - before

    def found(self, run: bytes, like: Standing) -> Standing | None:
        """Where the state in the folder stands; None if there is none, or it is torn or of another run.

        Args:
          run: the run.
          like: a standing with the shapes of parameters and optimizer state.
        """
        try:
            content = (self._folder / STATE).read_bytes()
        except OSError:
            return None
        body, digest = content[:-32], content[-32:]
        if hashlib.sha256(body).digest() != digest:
            logger.warning("%s is torn; the server will send what is missing", self._folder / STATE)
            return None
        length = struct.unpack_from("<Q", body)[0]
        about = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["hiso_jax"])
        if about["run"] != run.hex():
            return None
        arrays = safetensors.numpy.load(body)
        leaves, structure = jax.tree.flatten((like.params, like.state))
        mine = [
            from_key_data(arrays[str(place)], leaf) if is_key(leaf) else jnp.asarray(arrays[str(place)])
            for place, leaf in enumerate(leaves)
        ]
        params, state = jax.tree.unflatten(structure, mine)
        return Standing(about["round"], bytes.fromhex(about["history"]), params, state)

    def secret(self) -> Any:
        """The key of this client's own noise, which it makes once and which never leaves it."""
        path = self._folder / SECRET
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return as_key(json.loads(path.read_text()))
        halves = fresh()
        with os.fdopen(handle, "w") as file:
            json.dump(halves, file)
        return as_key(halves)
