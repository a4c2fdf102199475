"""The architecture of a model, read without its weights."""

from pathlib import Path

from hiso_jax.models.lm.checkpoint import needing, read_config
from hiso_jax.models.lm.config import LMConfig
from hiso_jax.models.lm.hub import config_from_hub


def read_architecture(model: str | Path, *, revision: str | None = None) -> LMConfig:
    """The architecture of a model, read without its weights.

    Args:
      model: as in :func:`load`.
      revision: as in :func:`load`.

    Raises:
      ValueError: the model does not exist, or its architecture is not supported.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        from hiso_jax.models.lm.gguf import open_gguf

        with needing("gguf", "transformers", "tokenizers"):
            return open_gguf(path)[0]
    with needing("transformers", "huggingface_hub"):
        return read_config(path if path.is_dir() else config_from_hub(str(model), revision))
