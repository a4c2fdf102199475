"""The common part of all tasks for a pretrained language model: its initial and its frozen parameters."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Key, PyTree

from hiso_jax.factored import PerturbedAs
from hiso_jax.models.lm import Tuned


@dataclass(frozen=True, kw_only=True)
class PretrainedTask:
    """The part of ``hiso_jax.fed.Task`` that depends only on the language model.

    Attributes:
      model: the language model, with its trained part chosen.
    """

    model: Tuned

    @property
    def frozen(self) -> PyTree | None:
        """The parameters that are not trained."""
        return self.model.frozen

    @property
    def kind(self) -> str:
        """The kind of model by which default rates are chosen: adapters, or full."""
        return "adapters" if self.model.has_adapters else "full"

    @property
    def layout(self) -> Callable[[str, tuple[int, ...], int], int | None]:
        """How the parameters are split over devices."""
        return self.model.decoder.layout

    @property
    def perturbed_as(self) -> PerturbedAs:
        """How the model reads parameters that are perturbed along a low-rank direction."""
        return self.model.decoder.perturbed_as

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The trained parameters as loaded; the key is ignored."""
        return self.model.trained
