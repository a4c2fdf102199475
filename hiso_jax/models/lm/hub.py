"""Checkpoints of the hub, downloaded or from its cache; safetensors only, and of the revision that is asked for."""

import logging
from pathlib import Path
from typing import Any

from hiso_jax.checks import ParameterError

PATTERNS = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "vocab*", "merges*", "special*"]
CONVERTER, CONVERTED = "SFconvertbot", "converted"
# How long the hub may take to answer before its cache has to do.
HUB_SECONDS = 5.0


def from_hub(name: str, revision: str | None) -> Path:
    """The hub's files, downloaded or from its cache.

    Raises:
      ValueError: the hub cannot be reached, or has no safetensors of that name and revision.
    """
    # The client logs each of its retries; the one sentence below says it all.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if revision == CONVERTED:
            return _from_converter(name)
        folder = _snapshot(name, revision)
    except Exception as error:
        # Whatever the hub's client raises (no network, no such name, a damaged cache) means the same here.
        raise ParameterError(
            "model",
            f"must be a hub name, a folder or a .gguf file; {name} is no local folder and cannot be had from "
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
    """A folder with the hub's config.json and nothing else of the model, downloaded or from its cache.

    Raises:
      ValueError: the hub cannot be reached, or has no such model.
    """
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(
            huggingface_hub.hf_hub_download(name, "config.json", revision=revision, etag_timeout=HUB_SECONDS)
        ).parent
    except Exception as error:
        # Whatever the hub's client raises means the same here.
        raise ParameterError(
            "model",
            f"must be an architecture's name, a folder or a hub name; {name} is no local folder and its "
            f"config.json cannot be had from the hub ({type(error).__name__})",
        ) from error


def _snapshot(name: str, revision: str | None) -> Path:
    import huggingface_hub

    # Some repositories keep the weights a second time, in their authors' own format or in folders.
    wanted: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": PATTERNS,
        "ignore_patterns": ["consolidated*", "*/*"],
    }
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
    except Exception:
        # Without a hub its cache must do, and at once: the client would try again for minutes.
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True, **wanted))
    return Path(huggingface_hub.snapshot_download(name, **wanted))


def _from_converter(name: str) -> Path:
    """The files of the converter's pull request, also where only the cache has them."""
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
