"""Decoder-only language models (OPT and the Llama family) and their checkpoints; no training code."""

from hiso_jax.models.lm.architecture import read_architecture
from hiso_jax.models.lm.checkpoint import Pretrained, load
from hiso_jax.models.lm.config import LMConfig, Rope, from_transformers
from hiso_jax.models.lm.decoder import Decoder, greedy, sampled
from hiso_jax.models.lm.export import save_pretrained
from hiso_jax.models.lm.layout import layout_of
from hiso_jax.models.lm.modules import Adapters
from hiso_jax.models.lm.peft import check_adapters, save_adapters
from hiso_jax.models.lm.shapes import SHAPES
from hiso_jax.models.lm.trainable import Tuned, tune, tuned_shapes

__all__ = [
    "SHAPES",
    "Adapters",
    "Decoder",
    "LMConfig",
    "Pretrained",
    "Rope",
    "Tuned",
    "check_adapters",
    "from_transformers",
    "greedy",
    "layout_of",
    "load",
    "read_architecture",
    "sampled",
    "save_adapters",
    "save_pretrained",
    "tune",
    "tuned_shapes",
]
