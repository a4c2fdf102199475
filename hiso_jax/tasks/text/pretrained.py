"""What every task of a pretrained language model shares: where it begins, and what of it is not trained."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Key, PyTree

from hiso_jax.factored import PerturbedAs
from hiso_jax.models.lm import Tuned, layout_of


@dataclass(frozen=True, kw_only=True)
class PretrainedTask:
    """The part of ``hiso_jax.fed.Task`` that is the language model's own.

    Attributes:
      model: the language model and what of it is trained.
    """

    model: Tuned

    @property
    def frozen(self) -> PyTree | None:
        """The parameters that are not trained."""
        return self.model.frozen

    @property
    def layout(self) -> Callable[[str, tuple[int, ...], int], int | None]:
        """How the parameters are split over devices."""
        return layout_of(self.model.decoder.config)

    @property
    def perturbed_as(self) -> PerturbedAs:
        """How the model reads parameters moved along a direction of low rank."""
        return self.model.decoder.perturbed_as

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The trained parameters as they were loaded; the key changes nothing."""
        return self.model.trained
