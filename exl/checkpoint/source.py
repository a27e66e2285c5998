"""Where a checkpoint's files are: a folder here, or a repository that is read over the network (``remote.py``)."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from exl.checkpoint.block_file import BlockFile
from exl.checkpoint.header import MAX_HEADER_BYTES
from exl.errors import CheckpointError

_HAS_PREADV = hasattr(os, "preadv")  # not on Windows

T, R = TypeVar("T"), TypeVar("R")


class CheckpointFile(Protocol):
    """A safetensors file, local or remote."""

    name: str  # relative to the checkpoint's folder
    num_bytes: int

    def read_into(self, view: memoryview, offset: int, what: str) -> None:
        """Fills ``view`` with the file's bytes from ``offset`` on. ``CheckpointError`` names the file and ``what``."""

    def modified_ns(self) -> int: ...

    def close(self) -> None: ...


class FileSource(Protocol):
    """Where a checkpoint's files are."""

    path: Path  # its name in error messages
    is_remote: bool

    def names(self) -> list[str]:
        """The names of its files, sorted."""

    def names_in(self, subfolder: str) -> list[str]:
        """The names in a subfolder, sorted; empty if there is none, or none that can be listed."""

    def read_small(self, name: str) -> bytearray:
        """The whole content of a file of at most ``MAX_HEADER_BYTES``."""

    def open(self, name: str) -> CheckpointFile: ...

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Like ``map``, results in order; may make several calls at once if each mostly waits."""


@dataclass(frozen=True)
class OpenFile:
    """A safetensors file, kept open, so that later reads go to the same file whose header was checked."""

    name: str  # relative to the checkpoint's folder
    handle: FileIO
    num_bytes: int
    lock: threading.Lock  # used if the system has no positional read

    def read_into(self, view: memoryview, offset: int, what: str) -> None:
        """Fills ``view`` with the file's bytes from ``offset`` on. Thread-safe."""
        done = 0
        try:
            while done < len(view):
                count = self._read_some(view[done:], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{self.name}: ended at byte {offset + done} while reading {what}; "
                        f"it had {self.num_bytes} bytes when it was opened"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.name}: cannot read {what}: {error.strerror or error}") from None

    def is_cached(self, offset: int) -> bool:
        """Whether the byte there comes from the system's cache. True if the system does not tell."""
        if not hasattr(os, "RWF_NOWAIT"):
            return True
        try:
            os.preadv(self.handle.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:  # a file system that cannot tell
            return True
        return True

    def reopen(self) -> BlockFile | None:
        """The same file by a descriptor of its own, whose flags may be changed. None: it has no name any more."""
        try:
            file = BlockFile.open(self.handle.name)
        except OSError:
            return None
        if os.path.samestat(os.fstat(file.descriptor), os.fstat(self.handle.fileno())):
            return file
        file.close()
        return None

    def modified_ns(self) -> int:
        return os.fstat(self.handle.fileno()).st_mtime_ns

    def close(self) -> None:
        self.handle.close()

    def _read_some(self, view: memoryview, offset: int) -> int:
        if _HAS_PREADV:
            return os.preadv(self.handle.fileno(), [view], offset)
        with self.lock:
            self.handle.seek(offset)
            return self.handle.readinto(view) or 0


@dataclass(frozen=True)
class Folder:
    """A local folder."""

    path: Path
    is_remote: ClassVar[bool] = False

    def names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self.path))
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be listed: {error.strerror or error}") from None

    def names_in(self, subfolder: str) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self.path / subfolder))
        except OSError:
            return []

    def read_small(self, name: str) -> bytearray:
        file = self.open(name)
        with file.handle:
            if file.num_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(f"{name}: {file.num_bytes} bytes, expected at most {MAX_HEADER_BYTES}")
            raw = bytearray(file.num_bytes)
            file.read_into(memoryview(raw), 0, "the index")
            return raw

    def open(self, name: str) -> OpenFile:
        path = self.path / name
        try:
            mode = path.stat().st_mode  # checked first: opening a named pipe would block forever
            if not stat.S_ISREG(mode):
                raise CheckpointError(f"{name}: not a regular file, expected a safetensors file")
            handle = FileIO(path, "rb")
            return OpenFile(name, handle, os.fstat(handle.fileno()).st_size, threading.Lock())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{name}: cannot be opened in {self.path}: {reason}") from None

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return map(function, items)
