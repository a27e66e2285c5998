"""Lines of a log, written by a thread of their own: nobody who logs ever waits for a disk, or hears that it is full."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path

from exl.errors import ConfigError

_MAX_WAITING = 8 << 20  # bytes of lines that are not written yet; more are dropped
_BATCH_LINES = 1000
_RETRY_SECONDS = 1.0  # after an error, so that a full disk is not tried for each line
_CLOSE_SECONDS = 2.0  # how long ``close`` waits for what is not written yet


class LogWriter:
    """Appends lines to a file, or to standard error. A file that was moved away (logrotate) is made anew.

    Writes to the file descriptor itself: a thread that hangs in Python's own ``sys.stderr`` would keep the process from
    ending."""

    def __init__(self, path: Path | None) -> None:
        """``path`` None: standard error. Raises ``ConfigError`` if the file cannot be opened."""
        self.num_dropped = 0  # lines
        self._path = path
        if path is None:
            # Of a process that was started without it, 2 may be the number of any file or socket.
            self._descriptor = os.open(os.devnull, os.O_WRONLY) if sys.__stderr__ is None else os.dup(2)
        else:
            try:
                self._descriptor = _open(path)
            except OSError as error:
                raise ConfigError(f"log_file: {path}: {error.strerror or error}") from None
        self._lines: deque[bytes] = deque()
        self._waiting = 0  # bytes of them
        self._told = 0  # dropped lines that the log says are missing
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="exl log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """From any thread; never waits, never raises. ``line``: without its end."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._changed:
            if self._closed or self._waiting + len(data) > _MAX_WAITING:
                self.num_dropped += 1
                return
            self._lines.append(data)
            self._waiting += len(data)
            self._changed.notify()

    def close(self) -> None:
        """Waits a little until all is written; what cannot be is lost."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._closed:
                    self._changed.wait()
                batch = [self._lines.popleft() for _ in range(min(_BATCH_LINES, len(self._lines)))]
                if not batch:
                    break
            self._write_batch(batch)
            with self._changed:
                self._waiting -= sum(map(len, batch))
        os.close(self._descriptor)

    def _write_batch(self, batch: list[bytes]) -> None:
        missing = self.num_dropped - self._told
        head = f"exl: {missing} lines of the log are missing here\n".encode() if missing else b""
        try:
            self._reopen()
            _write_all(self._descriptor, head + b"".join(batch))
            self._told += missing
        except OSError:
            with self._changed:
                self.num_dropped += len(batch)
                closed = self._closed
            if not closed:
                time.sleep(_RETRY_SECONDS)

    def _reopen(self) -> None:
        if self._path is None:
            return
        with contextlib.suppress(FileNotFoundError):
            there, ours = os.stat(self._path), os.fstat(self._descriptor)
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                return
        fresh = _open(self._path)
        os.close(self._descriptor)
        self._descriptor = fresh


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
