"""The models of ``--models-dir``: names that clients may use, and the folder of each.

A name is looked up in a listing of the directory, never joined to a path, so no client reaches a folder that is not in
it. Symbolic links are followed: who may write in the directory decides what is served, and hubs' caches are made of
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from exl.errors import ConfigError


def list_models(directory: Path) -> dict[str, Path]:
    """Folders with a ``config.json``, by name: ``"llama"``, or ``"owner/llama"`` one level below. Names in order.
    Hidden folders and names that are no Unicode are left out. Raises ``ConfigError`` if the directory cannot be read.
    """
    try:
        children = sorted(directory.iterdir())
    except OSError as error:
        raise ConfigError(f"models_dir: {directory}: {error.strerror or error}, expected a folder of models") from None
    found: dict[str, Path] = {}
    for folder in filter(_may_be_named, children):
        if _is_model(folder):
            found[folder.name] = folder
        else:
            found |= {f"{folder.name}/{inner.name}": inner for inner in _children(folder) if _is_model(inner)}
    return found


def _children(folder: Path) -> Iterator[Path]:
    try:
        yield from filter(_may_be_named, sorted(folder.iterdir()))
    except OSError:  # a file, or a folder that only others may read
        return


def _is_model(folder: Path) -> bool:
    try:
        return (folder / "config.json").is_file()
    except OSError:
        return False


def _may_be_named(folder: Path) -> bool:
    """JSON has no name for what is not UTF-8."""
    try:
        folder.name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return not folder.name.startswith(".")
