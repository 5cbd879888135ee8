"""A model by directory, or by its id on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError


def resolve(model: str) -> Path:
    """The local directory of a model; an "organisation/name" that is no directory is downloaded (or found in cache).

    Weights come as safetensors only; nothing of the model is executed.

    Raises:
        CheckpointError: neither a directory nor an id that can be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.count("/") != 1 or model.startswith("."):
        raise CheckpointError(f"{model}: no such directory (and no hub id, which looks like organisation/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HFValidationError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{model}: neither a directory here nor a model that can be fetched from the hub ({reason})"
        ) from error
