"""Large pieces of a checkpoint's files, read by several threads as fast as the disk gives them."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

from exl.checkpoint.block_file import BlockFile
from exl.checkpoint.checkpoint import Checkpoint
from exl.errors import CheckpointError

PAGE = 4096
_TIMED_BYTES = 64 << 20  # so many tell how fast the disk is
_FAST = 300e6  # bytes a second, of each of several reads at once


class PageReader:
    """Reads what is in the system's cache from there. The rest comes past it (O_DIRECT) if the disk is fast: that is
    faster still, and costs the processors nothing, which pack meanwhile. What a slow disk gives goes through the cache,
    so that the next load finds it there. Thread-safe, except for ``close``."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._timed = threading.Lock()
        self._bytes = self._seconds = 0.0  # of all direct reads
        with ExitStack() as stack:
            self._files: dict[str, BlockFile] = {}
            for name in checkpoint.files:
                file = checkpoint.reopen(name)
                if file is not None:
                    stack.callback(file.close)
                    if file.try_direct():
                        self._files[name] = file
            self._owned = stack.pop_all()

    def read_into(self, file_name: str, view: memoryview, offset: int, what: str) -> None:
        """Fills ``view``, page-aligned, with a file's bytes from ``offset``, a multiple of ``PAGE``, on. Raises
        ``CheckpointError`` that names the file and ``what``."""
        direct = 0
        file = self._files.get(file_name)
        if file is not None and file.direct and self._is_fast() and not self._checkpoint.is_cached(file_name, offset):
            direct = len(view) // PAGE * PAGE
            self._read_direct(file_name, file, view[:direct], offset, what)
        if direct < len(view):
            self._checkpoint.read_range(file_name, view[direct:], offset + direct, what)

    def _read_direct(self, file_name: str, file: BlockFile, view: memoryview, offset: int, what: str) -> None:
        began = time.perf_counter()
        try:
            file.read_into(view, offset)
        except EOFError:  # it shrank: the checkpoint's own read says so in full
            self._checkpoint.read_range(file_name, view, offset, what)
        except OSError as error:
            raise CheckpointError(f"{file_name}: cannot read {what}: {error.strerror or error}") from None
        with self._timed:
            self._bytes += len(view)
            self._seconds += time.perf_counter() - began

    def _is_fast(self) -> bool:
        return self._bytes < _TIMED_BYTES or self._bytes > _FAST * self._seconds

    def close(self) -> None:
        self._owned.close()
