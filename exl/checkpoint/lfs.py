"""Files that stand where a model's file should be: Git LFS pointers, saved web pages, weights of another format.

A Git LFS pointer is a text of a few lines that a clone has instead of each large file if git-lfs was not installed
(https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
"""

from __future__ import annotations

import re
from pathlib import Path

from exl.errors import CheckpointError
from exl.units import format_bytes

_POINTER = b"version https://git-lfs.github.com/spec/"
_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)
MAX_POINTER_BYTES = 1024  # by its specification


def lfs_pointer(raw: bytes | bytearray) -> str | None:
    """From the first ``MAX_POINTER_BYTES`` of a file: what it is and how to get the real one; None: no pointer."""
    if not raw.startswith(_POINTER):
        return None
    size = _SIZE.search(raw)
    missing = f", whose {format_bytes(int(size[1]))} are missing" if size else ""
    return f"a Git LFS pointer instead of the file{missing}: install git-lfs, then run 'git lfs pull' in the folder"


def refuse_lfs_pointer(path: Path) -> None:
    """Raises ``CheckpointError`` that names the file if it is a pointer. A file that cannot be read is none."""
    try:
        with open(path, "rb") as file:
            found = lfs_pointer(file.read(MAX_POINTER_BYTES))
    except OSError:
        return
    if found is not None:
        raise CheckpointError(f"{path}: {found}")


def not_safetensors(raw: bytes | bytearray) -> str | None:
    """From a file's first bytes: what it is instead of safetensors; None: unknown."""
    if raw[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        return "a web page instead of weights: download the file itself, not the page that shows it"
    if raw.startswith(b"GGUF"):
        return "a GGUF file under another name; take the model's GPTQ or original files instead"
    if raw.startswith(b"PK\x03\x04"):
        return "a file of torch.save or another archive under another name; save it with safetensors.torch.save_file"
    return None
