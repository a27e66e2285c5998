"""A safetensors checkpoint: one file, or shards with an index. Checks headers on opening, reads bytes on demand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from exl.checkpoint.block_file import BlockFile
from exl.checkpoint.file_names import ModelFileNames, choose_files, files_of_path, is_folder
from exl.checkpoint.header import MAX_HEADER_BYTES, TensorInfo, parse_header, shown
from exl.checkpoint.lfs import MAX_POINTER_BYTES, lfs_pointer, not_safetensors
from exl.checkpoint.source import CheckpointFile, FileSource, Folder, OpenFile
from exl.errors import CheckpointError

# Types without an entry do not exist in NumPy. bf16 is returned as its bits; bool as bytes, which need not be 0 or 1.
_NUMPY_DTYPES: Mapping[str, str] = {
    **{"bool": "u1", "u8": "u1", "i8": "i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4"},
    **{"u64": "<u8", "i64": "<i8", "f16": "<f2", "bf16": "<u2", "f32": "<f4", "f64": "<f8", "c64": "<c8"},
}


class Checkpoint:
    """Tensors of a checkpoint by name. Open with :meth:`open`; a context manager.

    Reading is thread-safe; closing while another thread reads is not. Uses one file handle per shard, and memory for
    headers only.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        files: Mapping[str, CheckpointFile],
        tensors: Mapping[str, TensorInfo],
        *,
        is_remote: bool = False,
    ) -> None:
        self.path = path  # as it was given
        self.folder = folder
        self.is_remote = is_remote  # only headers and little else are to be read
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self._files = files

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Opens a folder that holds ``model.safetensors``, or shards with an index, or one safetensors file of any
        name; or opens a ``.safetensors`` file by its own path. An index, or one shard of several, stands for the whole.

        Raises ``CheckpointError`` if anything is missing, damaged or hostile, or if the operating system refuses
        access. It names the file, the tensor, what was found and what was expected.
        """
        path = Path(path)
        if is_folder(path):
            return cls.open_from(Folder(path))
        folder = Folder(path.parent)
        files = files_of_path(folder, path.name)
        return cls._open(folder, path if files.names == [path.name] else folder.path, files)

    @classmethod
    def open_from(cls, source: FileSource) -> Checkpoint:
        """Like :meth:`open`, from files that may be remote. Raises the same errors."""
        return cls._open(source, source.path, choose_files(source))

    @classmethod
    def _open(cls, source: FileSource, path: Path, chosen: ModelFileNames) -> Checkpoint:
        names = chosen.names
        with ExitStack() as stack:
            files: dict[str, CheckpointFile] = {}
            tensors: dict[str, TensorInfo] = {}

            def open_file(name: str) -> list[TensorInfo]:
                file = files[name] = source.open(name)
                stack.callback(file.close)
                return _read_header(file)

            for name, infos in zip(names, source.map(open_file, names), strict=True):
                for info in infos:
                    other = tensors.setdefault(info.name, info)
                    if other is not info:
                        raise CheckpointError(f"tensor {shown(info.name)} is in two shards: {other.file} and {name}")
            if chosen.weight_map is not None:
                _check_index(chosen.weight_map, tensors, chosen.index)
            stack.pop_all()  # success: the handles now belong to the checkpoint
        return cls(path, source.path, {name: files[name] for name in names}, tensors, is_remote=source.is_remote)

    @property
    def files(self) -> Mapping[str, int]:
        """Sizes in bytes, by name relative to ``folder``."""
        return {name: file.num_bytes for name, file in self._files.items()}

    @property
    def modified_ns(self) -> Mapping[str, int]:
        """Time of last change by name, in ns: of the open files, even if other files have taken their names since."""
        return {name: file.modified_ns() for name, file in self._files.items()}

    def info(self, name: str) -> TensorInfo:
        """Raises ``CheckpointError`` if there is no such tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder}: no tensor {shown(name)} among the {len(self.tensors)} found there")
        return info

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, writable. bf16 is returned as its bits, u16; bool as u8."""
        info = self.info(name)
        return self._read_array(info, info.shape, 0)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start:stop`` along the first axis: one contiguous read of only these bytes."""
        info = self.info(name)
        num_rows = info.shape[0] if info.shape else 0
        if not info.shape or not 0 <= start <= stop <= num_rows:
            raise ValueError(f"rows {start}:{stop} of {name}, which has shape {list(info.shape)}")
        row_bytes = info.num_bytes // num_rows if num_rows else 0
        return self._read_array(info, (stop - start, *info.shape[1:]), start * row_bytes)

    def read_into(self, name: str, buffer: Any, start_byte: int = 0) -> None:
        """Fills a writable buffer with the tensor's bytes from ``start_byte`` on, directly, without a copy."""
        info = self.info(name)
        view = memoryview(buffer)
        if view.readonly or not view.c_contiguous:
            raise ValueError(f"reading {name} needs a writable, contiguous buffer")
        if not 0 <= start_byte <= start_byte + view.nbytes <= info.num_bytes:
            raise ValueError(f"bytes {start_byte}:{start_byte + view.nbytes} of {name}, which has {info.num_bytes}")
        if view.nbytes:
            self._files[info.file].read_into(view.cast("B"), info.start + start_byte, f"tensor {shown(name)}")

    def read_range(self, file: str, view: memoryview, offset: int, what: str) -> None:
        """Fills ``view`` with a file's bytes from ``offset`` on. ``CheckpointError`` names the file and ``what``."""
        self._files[file].read_into(view, offset, what)

    def is_cached(self, file: str, offset: int) -> bool:
        """As ``OpenFile.is_cached``."""
        found = self._files[file]
        return not isinstance(found, OpenFile) or found.is_cached(offset)

    def reopen(self, file: str) -> BlockFile | None:
        """As ``OpenFile.reopen``; None also for a file that is not here."""
        found = self._files[file]
        return found.reopen() if isinstance(found, OpenFile) else None

    def _read_array(self, info: TensorInfo, shape: tuple[int, ...], start_byte: int) -> np.ndarray:
        dtype = _NUMPY_DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{info.file}: tensor {shown(info.name)} is {info.dtype}, expected one of {', '.join(_NUMPY_DTYPES)}"
            )
        num_bytes = prod(shape) * np.dtype(dtype).itemsize
        return self.read_bytes(info.name, start_byte, num_bytes).view(dtype).reshape(shape)

    def read_bytes(self, name: str, start_byte: int, num_bytes: int) -> np.ndarray:
        """Bytes of a tensor from ``start_byte`` on: u8 [num_bytes], writable. All methods that return arrays use it."""
        try:
            raw = np.empty(num_bytes, np.uint8)
        except MemoryError:
            info = self.info(name)
            raise CheckpointError(
                f"{info.file}: tensor {shown(name)}: no memory for its {info.num_bytes} bytes"
            ) from None
        self.read_into(name, raw, start_byte)
        return raw

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_header(file: CheckpointFile) -> list[TensorInfo]:
    if file.num_bytes < 8:
        raise CheckpointError(f"{file.name}: {file.num_bytes} bytes, expected at least the 8 of the header's length")
    length = bytearray(8)
    file.read_into(memoryview(length), 0, "the header's length")
    _refuse_other_files(file, length)
    num_header_bytes = int.from_bytes(length, "little")
    limit = min(MAX_HEADER_BYTES, file.num_bytes - 8)
    if num_header_bytes > limit:
        raise CheckpointError(
            f"{file.name}: the header says it has {num_header_bytes} bytes, expected at most {limit} in a file of "
            f"{file.num_bytes}; the file is cut off, damaged or not safetensors"
        )
    raw = bytearray(num_header_bytes)
    file.read_into(memoryview(raw), 8, "the header")
    return parse_header(raw, file.num_bytes - 8 - num_header_bytes, file.name)[0]


def _refuse_other_files(file: CheckpointFile, start: bytearray) -> None:
    """Raises ``CheckpointError`` if the file's first bytes show that it is something else than safetensors."""
    found = not_safetensors(start)
    if found is None and file.num_bytes <= MAX_POINTER_BYTES:
        raw = bytearray(file.num_bytes)
        file.read_into(memoryview(raw), 0, "the header")
        found = lfs_pointer(raw)
    if found is not None:
        raise CheckpointError(f"{file.name}: {found}")


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], index_name: str) -> None:
    for name, shard in weight_map.items():
        info = tensors.get(name)
        if info is None or info.file != shard:
            found = "in no shard" if info is None else f"in {info.file}"
            raise CheckpointError(f"{index_name}: tensor {shown(name)} is {found}, expected in {shard}")
    for name, info in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{index_name}: does not list tensor {shown(name)}, found in {info.file}")
