"""A model's name -> a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from exl.errors import CheckpointError

BUNDLED_MODEL = Path(__file__).parent / "assets" / "stories"

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def find_model(model: str | Path | None, *, revision: str | None = None) -> Path:
    """A local folder (or the model that ships with exl, for None), else a Hugging Face repository's snapshot.

    Repositories come from the local cache where they are complete there, else they are downloaded.
    Raises ``CheckpointError`` when there is neither.
    """
    if model is None:
        return BUNDLED_MODEL
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not isinstance(model, str) or not _REPO_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such folder, and not a Hugging Face repository id (owner/name)")
    # Imported here: it takes longer than all of exl's command line.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{model}: no such folder here, and not to be had from Hugging Face: {reason}") from None
