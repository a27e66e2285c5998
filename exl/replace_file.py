"""A finished file takes its name, on Windows, too, where a file that somebody has open can be neither replaced nor
removed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

# A scanner for viruses opens what is new for a moment.
_WAITS = (0.01, 0.05, 0.2, 0.5)


def replace_file(part: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """``os.replace``; tried again for a moment on Windows. Raises ``OSError``, ``PermissionError`` for a name that
    somebody has open there; ``part`` is as it was then."""
    for wait in _WAITS if sys.platform == "win32" else ():
        try:
            os.replace(part, path)
            return
        except PermissionError:
            time.sleep(wait)
    os.replace(part, path)


def holds(path: Path, data: bytes) -> bool:
    """Whether a file has exactly these bytes: another process has written the same."""
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def sync_folder(folder: Path) -> None:
    """A new name must reach the disk, too; Windows has no way to ask for it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
