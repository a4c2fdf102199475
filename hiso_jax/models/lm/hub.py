"""Checkpoints of the hub, downloaded or from the cache: only safetensors, and only of the given revision."""

import logging
from pathlib import Path
from typing import Any

from hiso_jax.checks import ParameterError

PATTERNS = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "special*",
    "chat_template*",
]
CONVERTER, CONVERTED = "SFconvertbot", "converted"
# The longest wait for the hub's answer before the cache is used.
HUB_SECONDS = 5.0


def from_hub(name: str, revision: str | None) -> Path:
    """The folder of a hub model's files, downloaded or from the cache.

    Raises:
      ValueError: the hub cannot be reached, or has no safetensors of that name and revision.
    """
    # The client logs each retry; the error below is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if revision == CONVERTED:
            return _from_converter(name)
        folder = _snapshot(name, revision)
    except Exception as error:
        # Every error of the hub's client (no network, no such name, a damaged cache) means the same here.
        raise ParameterError(
            "model",
            f"must be a hub name, a folder or a .gguf file; {name} is not a local folder and cannot be loaded from "
            f"the hub ({type(error).__name__})",
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ParameterError(
            "revision",
            f"must be one with safetensors; {name} has none at {revision or 'main'}: --revision {CONVERTED} "
            "takes those in the pull request of the hub's converter",
        )
    return folder


def config_from_hub(name: str, revision: str | None) -> Path:
    """The folder of a hub model's config.json, which is downloaded alone or comes from the cache.

    Raises:
      ValueError: the hub cannot be reached, or does not have the model.
    """
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(
            huggingface_hub.hf_hub_download(name, "config.json", revision=revision, etag_timeout=HUB_SECONDS)
        ).parent
    except Exception as error:
        # Every error of the hub's client means the same here.
        raise ParameterError(
            "model",
            f"must be an architecture's name, a folder or a hub name; {name} is not a local folder and its "
            f"config.json cannot be loaded from the hub ({type(error).__name__})",
        ) from error


def _snapshot(name: str, revision: str | None) -> Path:
    import huggingface_hub

    # Some repositories have a second copy of the weights, in their authors' own format or in folders.
    wanted: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": PATTERNS,
        "ignore_patterns": ["consolidated*", "*/*"],
    }
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
    except Exception:
        # Without the hub, use the cache at once: the client would retry for minutes.
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True, **wanted))
    return Path(huggingface_hub.snapshot_download(name, **wanted))


def _from_converter(name: str) -> Path:
    """The folder of the files in the converter's pull request, downloaded or from the cache."""
    try:
        return _snapshot(name, _converted(name))
    except Exception:
        snapshots = _snapshot(name, None).parent
        kept = (folder for folder in sorted(snapshots.iterdir()) if any(folder.glob("*.safetensors")))
        found = next(kept, None)
        if found is None:
            raise
        return found


def _converted(name: str) -> str:
    import huggingface_hub

    for discussion in huggingface_hub.HfApi().get_repo_discussions(name, author=CONVERTER):
        if discussion.is_pull_request and discussion.git_reference:
            return discussion.git_reference
    raise FileNotFoundError(f"{name} has no safetensors")
