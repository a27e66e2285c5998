"""Machine code on disk, found by a digest of all that it depends on."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from llvmlite import binding as llvm

from exl.code_file import read_sealed, sealed, write_file
from exl.cpu_kernels.kernel import KernelSpec
from exl.user_cache import user_cache_folder

logger = logging.getLogger(__name__)

_MAGIC = b"exlobj01"
# What kernels take constants from.
OUTSIDE = (
    *("batch.py", "formats/matrix.py", "layout/columns.py", "layout/cpu_steps.py", "layout/fields.py"),
    "layout/kv.py",
)


def default_object_folder() -> Path:
    return user_cache_folder("cpu-kernels")


@functools.cache
def _sources() -> bytes:
    """Digest of the code that writes kernels. Hashing their IR instead would mean building it at each start."""
    own = Path(__file__).parent
    together = hashlib.sha256()
    for path in (*sorted(own.glob("*.py")), *(own.parent / name for name in OUTSIDE)):
        together.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return together.digest()


def object_name(specs: Sequence[KernelSpec], isa: str) -> str:
    parts = (isa, llvm.llvm_version_info, sorted(map(repr, specs)))
    return hashlib.sha256(_sources() + repr(parts).encode()).hexdigest() + ".o"


def cached_object(name: str, compile_: Callable[[], bytes], folder: Path | None = None) -> bytes:
    """The code in ``folder`` (default: the user's cache), or compiled and put there. A folder that cannot be written,
    or that others could write to, costs time at each start and no more."""
    folder = default_object_folder() if folder is None else folder
    trusted = _is_ours(folder)
    if trusted:
        data = _read(folder / name)
        if data is not None:
            return data
    data = compile_()
    if trusted:
        _write(folder / name, data)
    return data


def read_note(name: str, folder: Path | None = None) -> str | None:
    """What ``write_note`` left in the folder; None: nothing that can be trusted."""
    folder = default_object_folder() if folder is None else folder
    data = _read(folder / name) if _is_ours(folder) else None
    return None if data is None else data.decode(errors="replace")


def write_note(name: str, text: str, folder: Path | None = None) -> None:
    folder = default_object_folder() if folder is None else folder
    if _is_ours(folder):
        _write(folder / name, text.encode())


def _is_ours(folder: Path) -> bool:
    """Makes the folder if need be. Code is run from it, so it must be a folder that only this user can write to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        logger.info("CPU kernels: %s cannot be made (%s): compiling at each start", folder, error)
        return False
    if not hasattr(os, "getuid"):  # Windows: the user's own folder by its access list
        return stat.S_ISDIR(found.st_mode)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        logger.warning(
            "CPU kernels: %s: expected a folder of this user's that nobody else can write to: not used", folder
        )
        return False
    return True


def _read(path: Path) -> bytes | None:
    try:
        if hasattr(os, "getuid") and path.lstat().st_uid != os.getuid():
            return None
    except OSError:
        return None
    return read_sealed(path, _MAGIC)


def _write(path: Path, code: bytes) -> None:
    write_file(path, sealed(_MAGIC, code), logging.INFO)  # then code is compiled at each start, and no more
