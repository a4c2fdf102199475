"""What a client does in a round and sends: it measures along shared directions, or trains by itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, Key, PyTree

from hiso_jax.zo import Difference, DifferenceName, as_difference


@dataclass(frozen=True)
class Probes:
    """A client measures finite differences along the directions that the head's state names, and sends the numbers.

    Its message is an array of scalars [K, P], or a tree of such arrays if the difference gives several numbers.

    Attributes:
      difference: which losses, and what is made of them.
    """

    difference: Difference

    reads = ("perturbations", "mu", "method", "directions")
    """Which of a run's options it heeds."""

    def passes(self, local_steps: int, num_perturbations: int) -> int:
        """Evaluations of its loss that a client makes in a round."""
        return local_steps * self.difference.passes(num_perturbations)


class LocalClient(NamedTuple):
    """One client, as :class:`Local` sees it.

    Attributes:
      loss: ``(params, batch) → scalar``.
      params: x_r, the server's parameters.
      batches: [K, B, ...] examples, one batch a local step.
      key: the client's own in this round.
      round_number: r, for schedules.
      num_perturbations: P of the run.
      mu: μ of the run.
    """

    loss: Callable[[PyTree, Any], Float[Array, ""]]
    params: PyTree
    batches: PyTree
    key: Key[Array, ""]
    round_number: Int[Array, ""]
    num_perturbations: int
    mu: Any


@dataclass(frozen=True)
class Local:
    """A client trains by itself and sends a tree like the parameters: first-order methods, or whole vectors.

    Such messages are not kept, so there is no replay from them.

    Attributes:
      train: client → (message, its loss where the round began).
      cost: (K, P) → the evaluations of its loss that a client's round costs; a gradient is counted as three (forward,
        and a backward pass of about two).
      reads: which of the options "perturbations" and "mu" it heeds.
    """

    train: Callable[[LocalClient], tuple[PyTree, Float[Array, ""]]]
    cost: Callable[[int, int], int]
    reads: tuple[str, ...] = ()

    def passes(self, local_steps: int, num_perturbations: int) -> int:
        """Evaluations of its loss that a client makes in a round."""
        return self.cost(local_steps, num_perturbations)


Measure = Probes | Local


def probes(difference: Difference | DifferenceName = "forward") -> Probes:
    """Finite differences along shared directions; ``difference`` itself or by name."""
    return Probes(as_difference(difference))
