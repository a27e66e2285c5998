"""Large files in aligned blocks past the page cache: a model that does not fit in memory gains nothing from a cache
that forgets each block before its next turn, and copying into it costs more time than the disk.

Where the file system or the system has no O_DIRECT, blocks go through the cache and are dropped from it again, where
that can be asked for.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from io import FileIO
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Between two blocks the disk waits for this thread to be woken, which takes longest while others compute: a layer is
# one block or two.
BLOCK_BYTES = 32 << 20
_O_DIRECT = getattr(os, "O_DIRECT", 0) if fcntl is not None else 0
_O_BINARY = getattr(os, "O_BINARY", 0)  # Windows
_POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwritev")


class BlockFile:
    """An open file. Buffers are page-aligned, offsets and sizes multiples of 4096; only then is it direct.

    Thread-safe: where there are no positional reads (Windows) threads take turns. All errors are ``OSError``.
    """

    def __init__(self, descriptor: int, *, keeps_cached: bool = False) -> None:
        """Takes over ``descriptor``. ``keeps_cached``: what is read may stay in the cache of the system. Then neither
        buffers, offsets nor sizes need any alignment."""
        self.descriptor = descriptor
        self.direct = False
        self._keeps_cached = keeps_cached
        self._position = threading.Lock()  # of the file, where it is one for all

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, keeps_cached: bool = False) -> BlockFile:
        """For reading."""
        flags = os.O_RDONLY | _O_BINARY | getattr(os, "O_CLOEXEC", 0)
        return cls(os.open(path, flags), keeps_cached=keeps_cached)

    def try_direct(self) -> bool:
        """From here on past the cache, if the system can."""
        self.direct = self._set_direct(True)
        return self.direct

    def _set_direct(self, wanted: bool) -> bool:
        if not _O_DIRECT:
            return False
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        flags = flags | _O_DIRECT if wanted else flags & ~_O_DIRECT
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return wanted

    def read_into(
        self,
        view: memoryview,
        offset: int,
        on_block: Callable[[memoryview], bool] | None = None,
        block_bytes: int | None = None,
    ) -> bool:
        """Fills ``view`` with the bytes from ``offset`` on. ``on_block`` sees each block, of ``block_bytes`` (default:
        ``BLOCK_BYTES``), when it has come; where it says False the rest is not read, and False is returned.
        ``EOFError`` where the file ends before."""
        block_bytes = BLOCK_BYTES if block_bytes is None else block_bytes
        for start in range(0, len(view), block_bytes):
            block = view[start : start + block_bytes]
            self._transfer(self._read_some, block, offset + start)
            if on_block is not None and not on_block(block):
                return False
        return True

    def write(self, view: memoryview, offset: int) -> None:
        """Writes ``view`` at ``offset``."""
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            self._transfer(self._write_some, block, offset + start)

    def _transfer(self, some: Callable[[memoryview, int], int], view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = some(view[done:], offset + done)
            except OSError as error:
                # What a disk with larger sectors says, a file system without O_DIRECT, or one after a partial block.
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self._set_direct(False)
                self.direct = False
                continue
            if count == 0:
                raise EOFError(f"ended at byte {offset + done}")
            done += count
        if not self.direct and not self._keeps_cached:
            self._drop_cached(offset, done)

    def _read_some(self, view: memoryview, offset: int) -> int:
        if _POSITIONAL:
            return os.preadv(self.descriptor, [view], offset)
        with self._position, FileIO(self.descriptor, "rb", closefd=False) as file:
            file.seek(offset)
            return file.readinto(view)

    def _write_some(self, view: memoryview, offset: int) -> int:
        if _POSITIONAL:
            return os.pwritev(self.descriptor, [view], offset)
        with self._position:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            return os.write(self.descriptor, view)

    def _drop_cached(self, offset: int, num_bytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
