"""The trained part of a language model, by name, as ``--trainable`` chooses it for tasks that fine-tune a model.

A trainable is a factory ``name(*, options)`` that returns a :class:`Trainable`, or a function (pretrained model, seed)
→ :class:`hiso_jax.models.lm.Tuned`. A name without a factory is a regular expression over the parameters' paths.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from hiso_jax.checks import integer, positive
from hiso_jax.choices import Kind, Listed


@dataclass(frozen=True)
class Trainable:
    """The part of a language model to train, by its name and options; see :func:`hiso_jax.models.lm.tune`.

    Attributes:
      name: all, lora, prefix, head, or a regular expression over the parameters' dotted paths.
      options: keywords of ``lm.tune``.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, pretrained: Any, seed: int) -> Any:
        """The pretrained model with its trained part chosen."""
        from hiso_jax.models.lm import tune

        return tune(pretrained, self.name, seed=seed, **self.options)

    def shapes(self, decoder: Any, param_dtype: Any) -> Any:
        """The same with shapes instead of arrays, for a model known only by its architecture."""
        from hiso_jax.models import lm

        adapters = lm.Adapters()
        if self.name == "lora":
            own = self.options
            adapters = lm.Adapters(own["lora_rank"], own["lora_alpha"], tuple(own["lora_targets"]))
        elif self.name == "prefix":
            adapters = lm.Adapters(prefix=self.options["prefix_tokens"])
        return lm.tuned_shapes(decoder, self.name, adapters=adapters, param_dtype=param_dtype)


def everything() -> Trainable:
    """All parameters."""
    return Trainable("all")


def head() -> Trainable:
    """The head, untied from the embedding if it was tied."""
    return Trainable("head")


def lora(
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_targets: Annotated[tuple[str, ...], Listed(str, "A,B,…")] = ("q_proj", "v_proj"),
) -> Trainable:
    """Low-rank adapters (Hu et al., arXiv 2106.09685).

    Args:
      lora_rank: rank r of LoRA.
      lora_alpha: α of LoRA; the low-rank product is scaled by α/r.
      lora_targets: projections that get LoRA, from q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
    """
    integer("lora_rank", lora_rank, 1)
    positive("lora_alpha", lora_alpha)
    return Trainable("lora", {"lora_rank": lora_rank, "lora_alpha": lora_alpha, "lora_targets": tuple(lora_targets)})


def prefix(*, prefix_tokens: int = 5) -> Trainable:
    """Learned keys and values before every prompt (Li and Liang, arXiv 2101.00190).

    Args:
      prefix_tokens: number of learned prefix positions.
    """
    integer("prefix_tokens", prefix_tokens, 1)
    return Trainable("prefix", {"prefix_tokens": prefix_tokens})


def _named(pattern: str) -> Callable[[], Trainable]:
    return lambda: Trainable(pattern)


TRAINABLES = Kind(
    "trainable",
    {"all": everything, "lora": lora, "prefix": prefix, "head": head},
    returns="Trainable",
    is_valid=callable,
    otherwise=_named,
)
