"""Decoder-only language models (OPT and the Llama family) and their checkpoints; no training code."""

from hiso_jax.models.lm.checkpoint import Pretrained, load
from hiso_jax.models.lm.config import LMConfig, Rope, from_transformers
from hiso_jax.models.lm.decoder import Decoder, greedy
from hiso_jax.models.lm.export import save_pretrained
from hiso_jax.models.lm.modules import Adapters
from hiso_jax.models.lm.trainable import Tuned, tune

__all__ = [
    "Adapters",
    "Decoder",
    "LMConfig",
    "Pretrained",
    "Rope",
    "Tuned",
    "from_transformers",
    "greedy",
    "load",
    "save_pretrained",
    "tune",
]
