"""The speeds of the clients: the simulated clock's model of their computers and networks."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from hiso_jax.checks import finite, is_plain, positive
from hiso_jax.zo import fold_in


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogNormal:
    """A positive quantity that varies between clients: median · exp(spread · normal).

    Attributes:
      median: median over the clients, > 0.
      spread: standard deviation of the logarithm; 0 makes all clients alike.
    """

    median: Any
    spread: Any = 0.0

    def __post_init__(self) -> None:
        """Check the values that are plain numbers.

        Raises:
          ValueError: ``median`` is not positive and finite, or ``spread`` is negative.
        """
        if is_plain(self.median):
            positive("median", self.median)
        if is_plain(self.spread):
            finite("spread", self.spread)


class Work(NamedTuple):
    """The work of the clients in a round.

    Attributes:
      bytes_down: bytes that each client downloads, [C].
      bytes_up: bytes that a client uploads.
      forward_passes: loss evaluations of each client, [C], or of all alike.
      directions: directions that each client makes, to measure along and to catch up, [C].
    """

    bytes_down: Float[Array, "C"]
    bytes_up: float
    forward_passes: Float[Array, "C"] | float
    directions: Float[Array, "C"] | float = 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fleet:
    """The clients' speeds; each client's speeds are drawn once, from its key.

    Attributes:
      forward_seconds: seconds for one forward pass of a client on one batch.
      downlink: bytes per second from the server to a client.
      uplink: bytes per second from a client to the server.
      direction_seconds: seconds to make one direction, on a client of median speed; a client whose forward pass takes
        twice as long takes twice as long here, too. None does not count this time.
      memory: bytes of memory of a client, drawn from a key of its own; None is enough for everything.
      training_bytes: bytes that a client needs to backpropagate; with less it can only run the model forward.
    """

    forward_seconds: LogNormal
    downlink: LogNormal
    uplink: LogNormal
    direction_seconds: Any = None
    memory: LogNormal | None = None
    training_bytes: Any = None

    def __post_init__(self) -> None:
        """Check the values that are plain numbers.

        Raises:
          ValueError: ``direction_seconds`` or ``training_bytes`` is negative or not finite.
        """
        if is_plain(self.direction_seconds):
            finite("direction_seconds", self.direction_seconds)
        if is_plain(self.training_bytes):
            finite("training_bytes", self.training_bytes)

    def can_train(self, traits_key: Key[Array, ""], clients: Int[Array, "C"]) -> Bool[Array, "C"]:
        """Whether each client has the memory to backpropagate, [C]."""
        if self.memory is None or self.training_bytes is None:
            return jnp.ones(clients.shape, bool)
        normals = jax.vmap(lambda client: jax.random.normal(fold_in(traits_key, client)))(clients)
        return self.memory.median * jnp.exp(self.memory.spread * normals) >= self.training_bytes

    def seconds(self, traits_key: Key[Array, ""], clients: Int[Array, "C"], work: Work) -> Float[Array, "C"]:
        """The seconds that each client takes to download, compute and upload, [C]."""
        normals = jax.vmap(lambda client: jax.random.normal(fold_in(traits_key, client), (3,)))(clients)
        work = jax.tree.map(lambda each: jnp.asarray(each, normals.dtype), work)

        def own(quantity: LogNormal, index: int) -> Float[Array, "C"]:
            return quantity.median * jnp.exp(quantity.spread * normals[:, index])

        slowness = jnp.exp(self.forward_seconds.spread * normals[:, 0])
        compute = work.forward_passes * own(self.forward_seconds, 0)
        if self.direction_seconds is not None:
            compute += work.directions * self.direction_seconds * slowness
        return work.bytes_down / own(self.downlink, 1) + compute + work.bytes_up / own(self.uplink, 2)
