"""The packed file: a model's blobs on disk as they are in memory, so that loading or streaming one is a plain read.

    header, padded to 4096 bytes:  magic, format version, bytes of the header, number of blobs, bytes of the file,
                                   key, offset, size and checksum of each blob, the model's path, crc32 of all before
    blobs, each at a multiple of 4096: embedding, layers, head, then experts layer by layer,
            by their numbers; ``exl.layout.layers`` says what is where in them

Little-endian. The key (``packed_store.packed_key``) is a digest of all that the blobs depend on: a file with another
key is for something else. It is written under a temporary name and appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.block_file import BlockFile, fcntl
from exl.errors import CheckpointError, ExlError
from exl.layout.fields import BLOB_ALIGN, align_up
from exl.memory.host import HostBuffer
from exl.replace_file import replace_file, sync_folder

logger = logging.getLogger(__name__)

MAGIC = b"exlpack\n"
FORMAT_VERSION = 3
SUFFIX = ".exlpacked"
PART_SUFFIX = ".exlpart"  # being written
_HEAD = struct.Struct("<8sIIIQ32sI")  # ..., key, bytes of the path
_BLOB = struct.Struct("<QQI")
_CRC = struct.Struct("<I")
_MAX_HEADER_BYTES = 1 << 24
_YOUNG_SECONDS = 60.0
CHECKED_BYTES = 4 << 20  # of a blob, which count as one in its checksum: few enough to stay in a cache meanwhile


@dataclass(frozen=True)
class PackedHeader:
    key: bytes  # 32 bytes
    source: str  # the model's path when it was packed, for people
    sizes: tuple[int, ...]  # bytes of each blob, multiples of 4096
    checksums: tuple[int, ...]  # ``checksum`` of each blob

    @property
    def num_bytes(self) -> int:
        """Of the header itself: known before the checksums are."""
        return _header_bytes(len(self.sizes), self.source)

    @property
    def offsets(self) -> tuple[int, ...]:
        ends = np.cumsum([self.num_bytes, *self.sizes], dtype=np.int64)
        return tuple(int(end) for end in ends[:-1])

    @property
    def file_bytes(self) -> int:
        return self.num_bytes + sum(self.sizes)

    def to_bytes(self) -> bytes:
        source = os.fsencode(self.source)
        head = _HEAD.pack(
            MAGIC, FORMAT_VERSION, self.num_bytes, len(self.sizes), self.file_bytes, self.key, len(source)
        )
        blobs = [_BLOB.pack(*blob) for blob in zip(self.offsets, self.sizes, self.checksums, strict=True)]
        body = b"".join([head, *blobs, source]).ljust(self.num_bytes - _CRC.size, b"\0")
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, raw: bytes, file_bytes: int) -> PackedHeader:
        """``ValueError`` says what is wrong."""
        if len(raw) < _HEAD.size:
            raise ValueError(f"{len(raw)} bytes, too short for a header")
        magic, version, num_bytes, num_blobs, stated_bytes, key, source_bytes = _HEAD.unpack_from(raw)
        if magic != MAGIC:
            raise ValueError("not a packed file")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, expected {FORMAT_VERSION}")
        table_stop = _HEAD.size + num_blobs * _BLOB.size
        if not table_stop + source_bytes + _CRC.size <= num_bytes <= min(len(raw), _MAX_HEADER_BYTES):
            raise ValueError("the header is damaged")
        raw = raw[:num_bytes]
        if _CRC.unpack_from(raw, num_bytes - _CRC.size)[0] != zlib.crc32(raw[: -_CRC.size]):
            raise ValueError("the header is damaged: it does not have its checksum")
        blobs = [_BLOB.unpack_from(raw, _HEAD.size + i * _BLOB.size) for i in range(num_blobs)]
        source = os.fsdecode(raw[table_stop : table_stop + source_bytes])
        header = cls(key, source, tuple(blob[1] for blob in blobs), tuple(blob[2] for blob in blobs))
        if header.to_bytes() != raw:
            raise ValueError("the header contradicts itself")
        if not file_bytes == stated_bytes == header.file_bytes:
            raise ValueError(f"the file has {file_bytes} bytes, expected {stated_bytes}")
        return header


def checksum(blob: NDArray[np.uint8] | memoryview, before: int = 0) -> int:
    """Of a blob, or of its next bytes after those whose checksum is ``before``; a multiple of ``CHECKED_BYTES``, or the
    last.

    The crc32 of sums modulo 2**64: those of each page and, for every ``CHECKED_BYTES``, those of the words at each
    place of their pages. So one, two or three words that have changed never go unnoticed, nor do pages in another
    order; and it takes a fraction of the time of a crc32 of all bytes, which would hold up a fast disk.
    """
    pages = np.frombuffer(blob, "<u8").reshape(-1, BLOB_ALIGN // 8)
    step = CHECKED_BYTES // BLOB_ALIGN
    for start in range(0, len(pages), step):
        some = pages[start : start + step]
        before = zlib.crc32(some.sum(axis=1).tobytes(), before)
        before = zlib.crc32(some.sum(axis=0).tobytes(), before)
    return before


def _header_bytes(num_blobs: int, source: str) -> int:
    return align_up(_HEAD.size + num_blobs * _BLOB.size + len(os.fsencode(source)) + _CRC.size, BLOB_ALIGN)


def read_header(file: BlockFile) -> PackedHeader:
    """``ValueError`` says what is wrong with the contents, ``OSError`` what the system refuses."""
    file_bytes = os.fstat(file.descriptor).st_size
    raw = bytearray(min(BLOB_ALIGN, file_bytes))
    try:
        file.read_into(memoryview(raw), 0)
        if len(raw) >= _HEAD.size:
            num_bytes = _HEAD.unpack_from(raw)[2]
            if BLOB_ALIGN < num_bytes <= min(file_bytes, _MAX_HEADER_BYTES):
                raw = bytearray(num_bytes)
                file.read_into(memoryview(raw), 0)
    except EOFError:
        raise ValueError("it shrank while it was read") from None
    return PackedHeader.from_bytes(bytes(raw), file_bytes)


class PackedFile:
    """A packed file, open for reading. What is opened is what is read, even if the name is given to another file."""

    def __init__(self, path: Path, file: BlockFile, header: PackedHeader) -> None:
        self.path, self.header = path, header
        self._file = file
        self._offsets = header.offsets
        self._checked: set[int] = set()

    @classmethod
    def open(cls, path: Path, key: bytes, sizes: Sequence[int]) -> PackedFile | None:
        """None if there is no such file, or if it cannot be trusted: it has another key or other sizes, a damaged
        header, or was cut off. A log message says why. Marks the file as used now."""
        try:
            file = BlockFile.open(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s: cannot be opened (%s), packing again", path, error.strerror or error)
            return None
        try:
            header = read_header(file)
            if header.key != key or header.sizes != tuple(sizes):
                raise ValueError("it is for another model or another machine")
        except (OSError, ValueError) as error:
            file.close()
            logger.warning("%s: %s, packing again", path, error)
            return None
        file.try_direct()
        with contextlib.suppress(OSError):  # a folder that cannot be written
            os.utime(path)
        return cls(path, file, header)

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self._file.direct

    def read_blob(self, blob_idx: int, out: NDArray[np.uint8], go_on: Callable[[], bool] = lambda: True) -> bool:
        """Reads a blob into ``out``, u8 of its size, page-aligned. Returns False if ``go_on()`` returned False; polled
        once per block.

        The first time a blob is read, its checksum is compared. Raises ``CheckpointError`` that names the file if the
        blob cannot be read, was cut off or does not have its checksum; in that last case the file is removed, so that
        the next load packs again.
        """
        size = self.header.sizes[blob_idx]
        if len(out) != size:
            raise ValueError(f"a buffer of {len(out)} bytes for blob {blob_idx}, which has {size}")
        check = blob_idx not in self._checked
        found = 0

        def on_block(block: memoryview) -> bool:
            nonlocal found
            if check:
                found = checksum(block, found)
            return go_on()

        block_bytes = CHECKED_BYTES if check else None
        if not self._read(memoryview(out), self._offsets[blob_idx], on_block, block_bytes):
            return False
        if check and found != self.header.checksums[blob_idx]:
            raise self._damaged(blob_idx)
        self._checked.add(blob_idx)
        return True

    def is_checked(self, blob_idx: int) -> bool:
        """Whether its checksum has been compared: only then may parts of it be read."""
        return blob_idx in self._checked

    def read_part(self, blob_idx: int, start: int, out: NDArray[np.uint8]) -> None:
        """Reads a blob's bytes from ``start``, a multiple of 4096, on; where ``out`` has room for more, those of the
        blobs behind it, too. Raises ``CheckpointError`` as ``read_blob``."""
        self._read(memoryview(out), self._offsets[blob_idx] + start)

    def _read(
        self,
        view: memoryview,
        offset: int,
        on_block: Callable[[memoryview], bool] | None = None,
        block_bytes: int | None = None,
    ) -> bool:
        try:
            return self._file.read_into(view, offset, on_block, block_bytes)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{self.path}: packed weights cannot be read: {reason}") from error

    def _damaged(self, blob_idx: int) -> CheckpointError:
        try:
            mine, now = os.fstat(self._file.descriptor), os.stat(self.path)
            if (mine.st_dev, mine.st_ino) == (now.st_dev, now.st_ino):
                os.unlink(self.path)
            remedy = "that file is gone now: load the model again, which packs it anew"
        except OSError:
            remedy = "remove it with `exl packed clear` and load the model again, which packs it anew"
        return CheckpointError(
            f"{self.path}: packed weights are damaged: blob {blob_idx} does not have its checksum; {remedy}"
        )

    def rows(self, blob_idx: int, offset: int, row_bytes: int, num_rows: int) -> PackedRows:
        """The rows of a table that begins at ``offset`` in a blob, by a descriptor of their own, which the caller
        closes. Raises ``CheckpointError`` if the file's name has been given to another file."""
        start = self._offsets[blob_idx] + offset
        if start + row_bytes * num_rows > self._offsets[blob_idx] + self.header.sizes[blob_idx]:
            raise ValueError(f"{num_rows} rows of {row_bytes} bytes from {offset} on are not in blob {blob_idx}")
        try:
            file = BlockFile.open(self.path, keeps_cached=True)
            if not os.path.samestat(os.fstat(file.descriptor), os.fstat(self._file.descriptor)):
                file.close()
                raise OSError(errno.ESTALE, "another file has its name now, load the model again")
        except OSError as error:
            raise CheckpointError(f"{self.path}: packed weights cannot be read: {error.strerror or error}") from error
        return PackedRows(self.path, file, start, row_bytes, num_rows)

    def close(self) -> None:
        """Not while another thread reads."""
        self._file.close()


class PackedRows:
    """A table in a packed file of which single rows are read. Unlike layers, which are all read again and again, rows
    go through the page cache: the common ones stay there as long as the system has room."""

    def __init__(self, path: Path, file: BlockFile, start: int, row_bytes: int, num_rows: int) -> None:
        """Takes over ``file``; the table begins at byte ``start``."""
        self.path, self.row_bytes, self.num_rows = path, row_bytes, num_rows
        self._file, self._start = file, start

    def read(self, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        """Rows, one after another, into ``out``, u8 [len(rows) * row_bytes]. Raises ``CheckpointError`` that names the
        file if they cannot be read."""
        if len(out) != len(rows) * self.row_bytes:
            raise ValueError(f"a buffer of {len(out)} bytes for {len(rows)} rows of {self.row_bytes}")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.num_rows:
            raise ValueError(f"rows {int(rows.min())} to {int(rows.max())} of a table of {self.num_rows}")
        view = memoryview(out)
        try:
            for i, row in enumerate(rows.tolist()):
                at = i * self.row_bytes
                self._file.read_into(view[at : at + self.row_bytes], self._start + row * self.row_bytes)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{self.path}: rows of the embedding cannot be read: {reason}") from error

    def close(self) -> None:
        self._file.close()


class PackedWriter:
    """Writes blobs one after another; a context manager that leaves nothing behind unless ``commit`` was reached."""

    def __init__(self, path: Path, key: bytes, source: str, sizes: Sequence[int]) -> None:
        """Raises ``ExlError`` that names the folder, the bytes needed and the bytes free if they do not suffice."""
        self.path = path
        self._header = PackedHeader(key, source, tuple(sizes), (0,) * len(sizes))
        self._offsets = self._header.offsets
        self._checksums: list[int] = []
        self._part: Path | None = None
        self._file: BlockFile | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_dead_parts(path.parent)
            if shutil.disk_usage(path.parent).free < self._header.file_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._part, self._file = _create_part(path)
            self._file.try_direct()
        except OSError as error:
            raise self._failed(error) from error

    def write(self, blob: NDArray[np.uint8]) -> None:
        """The next blob, page-aligned."""
        blob_idx = len(self._checksums)
        if len(blob) != self._header.sizes[blob_idx]:
            raise ValueError(f"{len(blob)} bytes for blob {blob_idx}, expected {self._header.sizes[blob_idx]}")
        try:
            self._file.write(memoryview(blob), self._offsets[blob_idx])
        except OSError as error:
            raise self._failed(error) from error
        self._checksums.append(checksum(blob))

    def commit(self) -> None:
        """After the last blob: gives the file its name. The header is written last: nothing valid exists before."""
        if len(self._checksums) != len(self._header.sizes):
            raise ValueError(f"{len(self._checksums)} blobs written, expected {len(self._header.sizes)}")
        header = PackedHeader(self._header.key, self._header.source, self._header.sizes, tuple(self._checksums))
        raw = HostBuffer(header.num_bytes, "header of the packed file")
        try:
            raw.array[:] = np.frombuffer(header.to_bytes(), np.uint8)
            self._file.write(memoryview(raw.array), 0)
            os.fsync(self._file.descriptor)
            self._take_name(header)
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            raw.close()

    def _take_name(self, header: PackedHeader) -> None:
        """If another program has a file of this name open (Windows) and its contents differ, takes another name, so
        that the packed weights are not lost. ``path`` is the name that was taken."""
        if fcntl is None:  # Windows: an open file cannot be renamed. Elsewhere it stays locked until it has its name.
            self._file.close()
        try:
            replace_file(self._part, self.path)
        except PermissionError:
            if _is_equal(self.path, header):
                self._part.unlink()
            else:
                spare = self.path.with_name(f"{os.getpid()}-{self.path.name}")
                replace_file(self._part, spare)
                logger.warning("%s: another program has it open, packed weights are in %s", self.path, spare.name)
                self.path = spare
        self._part = None

    def close(self) -> None:
        if fcntl is None and self._file is not None:  # Windows: an open file cannot be removed
            self._file.close()
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _failed(self, error: OSError) -> ExlError:
        self.close()
        folder = self.path.parent
        if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG):
            return ExlError(f"{folder}: packed weights cannot be written there: {error.strerror or error}")
        try:
            free = f"{shutil.disk_usage(folder).free} bytes are free"
        except OSError:
            free = "an unknown number is free"
        return ExlError(
            f"{folder}: packing this model needs {self._header.file_bytes} bytes of disk, {free} "
            f"({error.strerror}); give another folder for packed weights, or make room, as with `exl packed clear`"
        )


def _is_equal(path: Path, header: PackedHeader) -> bool:
    """Whether the file at ``path`` has the same key and contents."""
    try:
        with BlockFile.open(path) as file:
            return read_header(file) == header
    except (OSError, ValueError):
        return False


def _create_part(path: Path) -> tuple[Path, BlockFile]:
    """A new temporary file beside ``path``, locked as long as it is open: unlocked ones have lost their writer."""
    while True:
        descriptor, name = tempfile.mkstemp(PART_SUFFIX, f".{path.stem}-", path.parent)
        if not _lock(descriptor) or os.fstat(descriptor).st_nlink == 0:  # another process took it for a dead one
            os.close(descriptor)
            continue
        return Path(name), BlockFile(descriptor)


def _lock(descriptor: int) -> bool:
    """False: another process has it. True also if the system has no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def remove_dead_parts(folder: Path) -> list[Path]:
    """Removes temporary files whose writers were killed. Those of living writers, in any process, stay."""
    removed = []
    for path in folder.glob(f".*{PART_SUFFIX}"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or not path.is_file():
                continue
            if fcntl is None:
                if time.time() - path.stat().st_mtime < _YOUNG_SECONDS:
                    continue  # closed a moment ago, and about to get its name
                path.unlink()  # refused while it is open
            else:
                with open(path, "rb+") as file:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            removed.append(path)
    return removed
