"""Known prefixes and their pages in a file, for another run of the same model.

A file is::

    b"exlpages" | u32 bytes of the header | u32 crc32 of header and table
    header      JSON: format, version, key, page_bytes, num_pages
    table       num_pages entries of ENTRY, each after the page before it
    pages       num_pages * page_bytes: as ``KVCache.read_page`` gives them

little-endian, nothing between and nothing behind. ``key`` is the caller's: whatever decides what the bytes mean and
which bits a cold run would make. A file is read as untrusted input: sizes are checked against the file's before
anything is allocated for them, the table as a tree, and each page's checksum before its bytes reach the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import PAGE_SIZE
from exl.cache.kv import KVCache
from exl.cache.page_pool import PagePool
from exl.cache.prefix_tree import KnownPage
from exl.checkpoint.header import shown
from exl.errors import CheckpointError, ConfigError
from exl.memory.host import host_tensor
from exl.replace_file import replace_file, sync_folder

Key = Mapping[str, str | int]

MAGIC, FORMAT, VERSION = b"exlpages", "exl kv pages", 1
MAX_HEADER_BYTES = 1 << 16
ENTRY = np.dtype(
    [
        ("parent", "<i4"),  # place of the page before it; -1: it begins a text
        ("num_tokens", "<u2"),  # 1 to PAGE_SIZE; only full pages have others behind them
        ("num_exact", "<u2"),  # tokens with the bits of a cold run; above 0 only if all before them have those
        ("crc", "<u4"),  # crc32 of the page's bytes
        ("tokens", "<i4", PAGE_SIZE),  # zeros behind num_tokens
    ]
)
_PREFIX_BYTES = len(MAGIC) + 8


def save_prefixes(path: str | os.PathLike[str], pool: PagePool, kv: KVCache, key: Key) -> int:
    """Writes all prefixes that ``pool`` knows, in the RAM tier too, with their pages. Returns their number of tokens.

    The file has its name only when it is whole. Nothing may change the pages meanwhile (on a CPU, after ``Ops.fence``).
    Raises ``ConfigError`` if it cannot be written.
    """
    path = Path(path).expanduser()
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    file = _open(part, "wb", path, "written")
    try:
        with file:
            num_tokens = _write(file, pool, kv, key)
            file.flush()
            os.fsync(file.fileno())
        replace_file(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise _failed(path, "written", error) from None
        raise
    return num_tokens


def _open(path: Path, mode: str, name: Path, what: str) -> BinaryIO:
    try:
        return cast(BinaryIO, open(path, mode))
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise _failed(name, what, error) from None


def _failed(path: Path, what: str, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: cannot be {what}: {getattr(error, 'strerror', None) or error}")


def _write(file: BinaryIO, pool: PagePool, kv: KVCache, key: Key) -> int:
    known = pool.known_pages()
    fields = {"format": FORMAT, "version": VERSION, "key": dict(key)}
    header = json.dumps({**fields, "page_bytes": kv.page_bytes, "num_pages": len(known)}).encode()
    table: NDArray[np.void] = np.zeros(len(known), ENTRY)
    data = host_tensor([kv.page_bytes], torch.uint8, "a page of the KV cache")
    file.seek(_PREFIX_BYTES + len(header) + table.nbytes)
    for entry, page in zip(table, known, strict=True):
        if pool.tier is not None and page.slot >= 0:
            pool.tier.read(page.slot, data)
        else:
            kv.read_page(page.page, data)
        raw = memoryview(data.numpy())
        file.write(raw)
        entry["parent"], entry["num_tokens"], entry["num_exact"] = page.parent, len(page.tokens), page.num_exact
        entry["crc"], entry["tokens"][: len(page.tokens)] = zlib.crc32(raw), page.tokens
    file.seek(0)
    head = header + table.tobytes()
    file.write(MAGIC + len(header).to_bytes(4, "little") + zlib.crc32(head).to_bytes(4, "little") + head)
    return sum(len(page.tokens) for page in known)


def load_prefixes(path: str | os.PathLike[str], pool: PagePool, kv: KVCache, key: Key) -> int:
    """Enters a file's prefixes into ``pool``. Returns how many of its tokens can be found now.

    What is used last comes first: if the pool has too few pages that nobody holds, it takes as many as fit, and
    forgets for them what it knew before. Nothing may run on the pages meanwhile.

    Raises ``ConfigError`` if the file cannot be read or has another key, ``CheckpointError`` if it is damaged or of
    another kind. In both cases nothing has been entered.
    """
    path = Path(path).expanduser()
    file = cast(BufferedReader, _open(path, "rb", path, "read"))
    data = host_tensor([kv.page_bytes], torch.uint8, "a page of the KV cache")
    with file:
        try:
            known, crcs, start = _read_head(file, str(path), kv.page_bytes, key)

            def fill(i: int, page: int) -> None:
                file.seek(start + i * kv.page_bytes)
                raw = memoryview(data.numpy())
                if file.readinto(raw) != len(raw) or zlib.crc32(raw) != crcs[i]:
                    raise CheckpointError(f"{path}: page {i} has another checksum; the file is damaged")
                kv.write_page(page, data)

            return pool.adopt(known, fill)
        except OSError as error:
            raise _failed(path, "read", error) from None


def _read_head(file: BinaryIO, name: str, page_bytes: int, key: Key) -> tuple[list[KnownPage], NDArray[np.uint32], int]:
    """Pages, their checksums, and where their bytes begin."""
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(_PREFIX_BYTES)
    if len(prefix) < _PREFIX_BYTES or not prefix.startswith(MAGIC):
        raise CheckpointError(f"{name}: begins with {prefix[:8]!r}, expected {MAGIC!r}: not a file of kept pages")
    header_bytes, crc = (int.from_bytes(prefix[i : i + 4], "little") for i in (8, 12))
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - _PREFIX_BYTES):
        raise CheckpointError(
            f"{name}: a header of {header_bytes} bytes in a file of {file_bytes}, expected at most {MAX_HEADER_BYTES}; "
            "the file is cut off or damaged"
        )
    header = file.read(header_bytes)
    fields = _parse(header, name)
    num_pages, found_bytes = fields["num_pages"], fields["page_bytes"]
    start = _PREFIX_BYTES + header_bytes + num_pages * ENTRY.itemsize
    if start + num_pages * found_bytes != file_bytes:
        raise CheckpointError(
            f"{name}: {num_pages} pages of {found_bytes} bytes make {start + num_pages * found_bytes} bytes, found "
            f"{file_bytes}; the file is cut off or damaged"
        )
    raw = file.read(num_pages * ENTRY.itemsize)
    if zlib.crc32(raw, zlib.crc32(header)) != crc:
        raise CheckpointError(f"{name}: header and table have another checksum; the file is damaged")
    _check_key(fields["key"], key, name)
    if found_bytes != page_bytes:
        raise ConfigError(f"{name}: found pages of {found_bytes} bytes, expected {page_bytes}")
    table = np.frombuffer(raw, ENTRY)
    return _known_pages(table, name), table["crc"], start


def _parse(header: bytes, name: str) -> dict[str, Any]:
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{name}: header: expected JSON; the file is damaged") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        found = fields.get("format") if isinstance(fields, dict) else fields
        raise CheckpointError(f"{name}: header: found format {shown(found)}, expected {FORMAT!r}")
    if fields.get("version") != VERSION:
        raise CheckpointError(f"{name}: found version {shown(fields.get('version'))}, this exl reads {VERSION}")
    wanted: tuple[tuple[str, type], ...] = (("key", dict), ("page_bytes", int), ("num_pages", int))
    for field, expected in wanted:
        value = fields.get(field)
        if type(value) is not expected or (isinstance(value, int) and value < 0):
            what = "an object" if expected is dict else "a whole number"
            raise CheckpointError(f"{name}: header: {field}: found {shown(value)}, expected {what}")
    return fields


def _check_key(found: Mapping[str, Any], expected: Key, name: str) -> None:
    differing = sorted(field for field in found.keys() | expected.keys() if found.get(field) != expected.get(field))
    if differing:
        each = "; ".join(
            f"{shown(field)}: found {shown(found.get(field))}, expected {shown(expected.get(field))}"
            for field in differing[:5]
        )
        raise ConfigError(f"{name}: was saved for something else: {each}")


def _known_pages(table: NDArray[np.void], name: str) -> list[KnownPage]:
    """The table as a tree."""
    parent, num_tokens, num_exact = (table[field].astype(np.int64) for field in ("parent", "num_tokens", "num_exact"))
    unused = np.arange(PAGE_SIZE) >= num_tokens[:, None]
    has_parent = parent >= 0
    in_order = (parent >= -1) & (parent < np.arange(len(table)))
    before = np.where(in_order & has_parent, parent, 0)
    after_exact = ~has_parent | (num_exact[before] == PAGE_SIZE) if len(table) else has_parent
    for is_right, expected in (
        (in_order, "after the page before it"),
        ((num_tokens >= 1) & (num_tokens <= PAGE_SIZE), f"of 1 to {PAGE_SIZE} tokens"),
        (num_exact <= num_tokens, "with at most as many exact tokens as tokens"),
        (~has_parent | (num_tokens[before] == PAGE_SIZE) if len(table) else has_parent, "behind a full page"),
        ((num_exact == 0) | after_exact, "exact only behind an exact page"),
        (((table["tokens"] >= 0) & ~(unused & (table["tokens"] != 0))).all(1), "of token ids"),
    ):
        if not is_right.all():
            raise CheckpointError(f"{name}: table: page {int(np.argmin(is_right))}: expected one {expected}")
    known = [
        KnownPage(int(entry["parent"]), tuple(entry["tokens"][:count].tolist()), int(entry["num_exact"]))
        for entry, count in zip(table, num_tokens, strict=True)
    ]
    if len({(page.parent, page.tokens) for page in known}) != len(known):
        raise CheckpointError(f"{name}: table: two pages have the same text")
    return known
