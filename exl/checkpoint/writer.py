"""Writes a safetensors file of any size, with one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from exl.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, shown
from exl.errors import CheckpointError
from exl.replace_file import replace_file, sync_folder

_HEADER_ALIGN = 8  # the reference library pads the header with spaces so that the data section is aligned


def write_safetensors(
    path: str | os.PathLike[str],
    entries: Sequence[tuple[str, str, tuple[int, ...]]],
    data: Iterable[Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors ``(name, dtype, shape)``; ``data`` has their bytes: one contiguous buffer per tensor, in order.

    ``dtype`` is as in ``TensorInfo``: "f16", "i32", ... ``data`` may be a generator: each buffer is written before the
    next one is requested. The file appears under its name only when it is complete and on disk. Any error before that,
    also in ``data``, leaves the old file as it was.

    Raises ``ValueError`` if entries and data do not agree, ``CheckpointError`` if the system cannot write.
    """
    path = Path(path)
    header, sizes = safetensors_header(entries, metadata or {})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with open(part, "xb") as file:
                file.write(header)
                _write_data(file, entries, sizes, data)
                file.flush()
                os.fsync(file.fileno())
            replace_file(part, path)
            sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def safetensors_header(
    entries: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[int]]:
    """The bytes before the data, and each tensor's size in bytes. Raises ``ValueError`` for invalid entries."""
    values: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise ValueError(f"metadata {shown(dict(metadata))}, expected strings for strings")
        values["__metadata__"] = dict(metadata)
    sizes, offset = [], 0
    for name, dtype, shape in entries:
        num_bits = DTYPE_BITS.get(dtype.upper())
        if num_bits is None or num_bits % 8 or dtype != dtype.lower():
            raise ValueError(f"tensor {shown(name)}: found dtype {dtype!r}, expected one such as 'f16'")
        if name in values or name == "__metadata__":
            raise ValueError(f"tensor {shown(name)}: duplicate or reserved name")
        num_bytes = prod(shape) * num_bits // 8
        values[name] = {"dtype": dtype.upper(), "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        sizes.append(num_bytes)
        offset += num_bytes
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGN)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes, expected at most {MAX_HEADER_BYTES}")
    return len(text).to_bytes(8, "little") + text, sizes


def _write_data(
    file: Any, entries: Sequence[tuple[str, str, tuple[int, ...]]], sizes: Sequence[int], data: Iterable[Any]
) -> None:
    pieces = iter(data)
    for (name, _, _), num_bytes in zip(entries, sizes, strict=True):
        piece = next(pieces, None)
        if piece is None:
            raise ValueError(f"tensor {shown(name)}: no data left for it")
        view = memoryview(piece)
        if not view.c_contiguous:
            raise ValueError(f"tensor {shown(name)}: its buffer is not contiguous")
        if view.nbytes != num_bytes:
            raise ValueError(f"tensor {shown(name)}: found {view.nbytes} bytes, expected {num_bytes} contiguous")
        if num_bytes:
            file.write(view.cast("B"))
    if next(pieces, None) is not None:
        raise ValueError(f"data for more than the {len(entries)} tensors announced")
