"""The folder for files that exl can make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache_folder(name: str) -> Path:
    """The path of exl's folder ``name`` in the user's cache, by the platform's convention (XDG on Linux).

    Does not create it.
    """
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "exl" / name
