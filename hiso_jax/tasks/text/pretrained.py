"""What every task of a pretrained language model shares: where it begins, and what of it is not trained."""

from dataclasses import dataclass

from jaxtyping import Array, Key, PyTree

from hiso_jax.models.lm import Tuned


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

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The trained parameters as they were loaded; the key changes nothing."""
        return self.model.trained
