"""How fast the clients are: the simulated clock's model of their computers and their networks."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from hiso_jax.checks import finite, is_plain, positive


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogNormal:
    """A positive quantity that differs from client to client: median · exp(spread · normal).

    Attributes:
      median: > 0.
      spread: standard deviation of the logarithm; 0 makes all clients alike.
    """

    median: Any
    spread: Any = 0.0

    def __post_init__(self) -> None:
        """Check what can be checked.

        Raises:
          ValueError: a median that is not positive and finite, or a negative spread.
        """
        if is_plain(self.median):
            positive("median", self.median)
        if is_plain(self.spread):
            finite("spread", self.spread)


class Work(NamedTuple):
    """What clients have to do in a round.

    Attributes:
      bytes_down: what each has to download, [C].
      bytes_up: what a client uploads.
      forward_passes: evaluations of its loss that a client makes.
      directions: that each makes, to measure along and to catch up, [C].
    """

    bytes_down: Float[Array, "C"]
    bytes_up: float
    forward_passes: float
    directions: Float[Array, "C"] | float = 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fleet:
    """The clients' speeds; each client's own are drawn once, from its key.

    Attributes:
      forward_seconds: seconds for one evaluation of a client's loss on one batch.
      downlink: bytes a second from the server.
      uplink: bytes a second to it.
      direction_seconds: seconds to make one direction, on a client as fast as the median; a client that evaluates its
        loss at half the speed takes twice as long. None does not count them.
    """

    forward_seconds: LogNormal
    downlink: LogNormal
    uplink: LogNormal
    direction_seconds: Any = None

    def __post_init__(self) -> None:
        """Check what can be checked.

        Raises:
          ValueError: ``direction_seconds`` negative or not finite.
        """
        if is_plain(self.direction_seconds):
            finite("direction_seconds", self.direction_seconds)

    def seconds(self, traits_key: Key[Array, ""], clients: Int[Array, "C"], work: Work) -> Float[Array, "C"]:
        """How long each client takes to download, to compute and to upload, in seconds."""
        normals = jax.vmap(lambda client: jax.random.normal(jax.random.fold_in(traits_key, client), (3,)))(clients)
        work = jax.tree.map(lambda each: jnp.asarray(each, normals.dtype), work)

        def own(quantity: LogNormal, index: int) -> Float[Array, "C"]:
            return quantity.median * jnp.exp(quantity.spread * normals[:, index])

        slowness = jnp.exp(self.forward_seconds.spread * normals[:, 0])
        compute = work.forward_passes * own(self.forward_seconds, 0)
        if self.direction_seconds is not None:
            compute += work.directions * self.direction_seconds * slowness
        return work.bytes_down / own(self.downlink, 1) + compute + work.bytes_up / own(self.uplink, 2)
