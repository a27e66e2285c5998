"""A model's name -> a local folder. For a plan, remote headers are enough."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from exl.checkpoint.header import shown
from exl.checkpoint.hub_errors import Token, explain_hub_errors, first_line
from exl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from exl.checkpoint.remote import RemoteFolder

BUNDLED_MODEL = Path(__file__).parents[1] / "assets" / "stories"

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_WANTED_FOR_TEXT = [pattern for pattern in _WANTED if not pattern.endswith(".safetensors")]
# The same weights in Mistral's own format, adapters, and what macOS leaves: nothing that is ever opened.
_UNWANTED = ["consolidated*.safetensors", "*/consolidated*.safetensors", "adapter_model*.safetensors", "._*", "*/._*"]
_OF_ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
_NOT_HERE = "no such folder here"


def find_model(
    model: str | Path | None, *, revision: str | None = None, token: Token = None, quiet: bool = False
) -> Path:
    """The local folder ``model`` if it exists, else the snapshot of the Hugging Face repository ``model``. None: the
    model that ships with exl.

    A snapshot is downloaded if it is not in huggingface_hub's cache, or if the hub has a newer one; ``quiet``: without
    progress bars. Offline, it must be in the cache. Raises ``CheckpointError`` if the model is not found.
    """
    path = _local_path(model)
    if path is not None:
        return path
    _check_access(revision, token)
    # Imported here because importing it takes longer than starting exl's command line.
    from huggingface_hub import snapshot_download

    bars = {"tqdm_class": _no_bar()} if quiet or sys.stderr is None else {}  # tqdm fails without standard error
    with explain_hub_errors(f"{model}: {_NOT_HERE}", revision):
        patterns = {"allow_patterns": _WANTED, "ignore_patterns": _UNWANTED}
        return Path(snapshot_download(str(model), revision=revision, token=token, **patterns, **bars))


def find_adapter(adapter: str | Path, *, token: Token = None, quiet: bool = False) -> Path:
    """The local folder ``adapter`` if it exists, else the snapshot of a repository that holds a LoRA adapter, of which
    only its two files are downloaded. Raises ``CheckpointError`` if it is not found."""
    path = _local_path(adapter)
    if path is not None:
        return path
    _check_access(None, token)
    from huggingface_hub import snapshot_download

    bars = {"tqdm_class": _no_bar()} if quiet or sys.stderr is None else {}
    with explain_hub_errors(f"{adapter}: {_NOT_HERE}", None):
        return Path(snapshot_download(str(adapter), token=token, allow_patterns=_OF_ADAPTER, **bars))


def find_headers(model: str | Path | None, *, revision: str | None = None, token: Token = None) -> Path | RemoteFolder:
    """Like :func:`find_model`, but without a download: a repository that is not in the cache is read remotely."""
    path = _local_path(model)
    if path is None:
        _check_access(revision, token)
        path = _cached(str(model), revision)
    if path is not None:
        return path
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    from exl.checkpoint.remote import RemoteFolder

    with explain_hub_errors(f"{model}: {_NOT_HERE}", revision):
        api = HfApi(library_name="exl", token=token)
        found = api.model_info(str(model), revision=revision, timeout=HF_HUB_ETAG_TIMEOUT, files_metadata=True)
    if not isinstance(found.sha, str) or found.siblings is None:
        raise CheckpointError(f"{model}: the hub names no commit or no files")
    sizes = {file.rfilename: file.size for file in found.siblings if "/" not in file.rfilename}
    return RemoteFolder(str(model), found.sha, sizes, token)


def find_small_files(folder: RemoteFolder) -> Path:
    """A repository's configuration and tokenizer, downloaded without its weights. Raises ``CheckpointError``."""
    from huggingface_hub import snapshot_download

    with explain_hub_errors(folder.repo_id, folder.commit):
        return Path(
            snapshot_download(
                folder.repo_id,
                revision=folder.commit,
                token=folder.token,
                allow_patterns=_WANTED_FOR_TEXT,
                tqdm_class=_no_bar(),
            )
        )


def _no_bar() -> type:
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs | {"disable": True})

    return NoBar


def _local_path(model: str | Path | None) -> Path | None:
    """The local folder; None if ``model`` can only be a repository. Raises ``CheckpointError`` if it can be neither."""
    if model is None:
        return BUNDLED_MODEL
    if not isinstance(model, str | Path) or not str(model):
        raise ConfigError(f"model: found {model!r}, expected a folder or a Hugging Face repository id")
    path = Path(model).expanduser()
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:  # the system allows no such name
        raise CheckpointError(f"{shown(str(model))}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(model, str) or not _REPO_ID.fullmatch(model):
        raise CheckpointError(f"{model}: {_NOT_HERE}, and not a Hugging Face repository id (owner/name)")
    return None


def _check_access(revision: str | None, token: Token) -> None:
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise ConfigError(f"revision: found {revision!r}, expected a branch, a tag or a commit")
    # Sent as an HTTP header. Error messages never contain the token.
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and token.strip()):
        raise ConfigError("token: found characters that a token cannot contain, expected one such as hf_...")
    if token is not None and not isinstance(token, str | bool):
        raise ConfigError(f"token: found a {type(token).__name__}, expected a text, True, False or None")


def _cached(repo_id: str, revision: str | None) -> Path | None:
    """A repository's snapshot in huggingface_hub's cache; None unless it has config and weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from exl.checkpoint.checkpoint import Checkpoint

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=_WANTED, local_files_only=True))
        with Checkpoint.open(folder):
            return folder if (folder / "config.json").is_file() else None
    except (LocalEntryNotFoundError, CheckpointError):  # not in the cache, or incomplete
        return None
    except ValueError as error:
        raise CheckpointError(f"{repo_id}: {_NOT_HERE}, and {first_line(error)}") from None
