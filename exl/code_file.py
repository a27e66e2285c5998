"""Compiled code on disk, a GPU's or the CPU's: a file appears whole or not at all, and damage is found by a digest."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

from exl.replace_file import holds, replace_file

logger = logging.getLogger(__name__)


def sealed(magic: bytes, code: bytes) -> bytes:
    """What a file of code holds: ``magic``, the code's sha256, the code."""
    return magic + hashlib.sha256(code).digest() + code


def read_sealed(path: Path, magic: bytes) -> bytes | None:
    """The code in a file, or None if there is none that can be trusted."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code = data[len(magic) + hashlib.sha256().digest_size :]
    if not code or data != sealed(magic, code):
        logger.warning("kernel cache: %s is damaged, compiling again", path)
        return None
    return code


def write_file(path: Path, data: bytes, told: int = logging.WARNING) -> bool:
    """``data`` under ``path``, whole or not at all; False where the folder cannot be written, of which the log is told
    at the level ``told``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            replace_file(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        if isinstance(error, PermissionError) and holds(path, data):
            return True  # Windows: another process has written the same and has it open
        logger.log(told, "kernel cache: cannot write %s: %s", path, error)
        return False
    return True
