"""A safetensors checkpoint: one file, or shards with an index. Checks headers on opening, reads bytes on demand."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from exl.checkpoint.header import MAX_HEADER_BYTES, TensorInfo, parse_header, parse_index, shown
from exl.errors import CheckpointError

# Types without an entry do not exist in NumPy. bf16 is returned as its bits; bool as bytes, which need not be 0 or 1.
_NUMPY_DTYPES: Mapping[str, str] = {
    **{"bool": "u1", "u8": "u1", "i8": "i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4"},
    **{"u64": "<u8", "i64": "<i8", "f16": "<f2", "bf16": "<u2", "f32": "<f4", "f64": "<f8", "c64": "<c8"},
}
_OTHER_FORMATS: Mapping[str, str] = {
    ".bin": "load it with transformers and save it again: model.save_pretrained(folder, safe_serialization=True)",
    ".pt": "load it with torch.load(..., weights_only=True) and save it with safetensors.torch.save_file",
    ".pth": "load it with torch.load(..., weights_only=True) and save it with safetensors.torch.save_file",
    ".ckpt": "load it with torch.load(..., weights_only=True) and save it with safetensors.torch.save_file",
    ".gguf": "GGUF is llama.cpp's format; take the model's GPTQ or original files instead",
    ".h5": "load it with transformers and save it again: model.save_pretrained(folder, safe_serialization=True)",
    ".msgpack": "load it with transformers and save it again: model.save_pretrained(folder, safe_serialization=True)",
}
_INDEX_SUFFIX = ".safetensors.index.json"
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
    """Where a checkpoint's files are: a folder, or a repository that is read over the network."""

    path: Path  # its name in error messages
    is_remote: bool

    def names(self) -> list[str]:
        """The names of its files, sorted."""

    def read_small(self, name: str) -> bytearray:
        """The whole content of a file of at most ``MAX_HEADER_BYTES``."""

    def open(self, name: str) -> CheckpointFile: ...

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Like ``map``, results in order; may make several calls at once if each mostly waits."""


@dataclass(frozen=True)
class _OpenFile:
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
class _Folder:
    """A local folder."""

    path: Path
    is_remote: ClassVar[bool] = False

    def names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self.path))
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be listed: {error.strerror or error}") from None

    def read_small(self, name: str) -> bytearray:
        file = self.open(name)
        with file.handle:
            if file.num_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(f"{name}: {file.num_bytes} bytes, expected at most {MAX_HEADER_BYTES}")
            raw = bytearray(file.num_bytes)
            file.read_into(memoryview(raw), 0, "the index")
            return raw

    def open(self, name: str) -> _OpenFile:
        path = self.path / name
        try:
            mode = path.stat().st_mode  # checked first: opening a named pipe would block forever
            if not stat.S_ISREG(mode):
                raise CheckpointError(f"{name}: not a regular file, expected a safetensors file")
            handle = FileIO(path, "rb")
            return _OpenFile(name, handle, os.fstat(handle.fileno()).st_size, threading.Lock())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{name}: cannot be opened in {self.path}: {reason}") from None

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return map(function, items)


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
        name; or opens a ``.safetensors`` file by its own path.

        Raises ``CheckpointError`` if anything is missing, damaged or hostile, or if the operating system refuses
        access. It names the file, the tensor, what was found and what was expected.
        """
        path = Path(path)
        if _is_folder(path):
            return cls.open_from(_Folder(path))
        return cls._open(_Folder(path.parent), path, [path.name], None, "")

    @classmethod
    def open_from(cls, source: FileSource) -> Checkpoint:
        """Like :meth:`open`, from files that may be remote. Raises the same errors."""
        return cls._open(source, source.path, *_choose_files(source))

    @classmethod
    def _open(
        cls, source: FileSource, path: Path, names: list[str], weight_map: dict[str, str] | None, index_name: str
    ) -> Checkpoint:
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
            if weight_map is not None:
                _check_index(weight_map, tensors, index_name)
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


def _is_folder(path: Path) -> bool:
    """False for a ``.safetensors`` file. Raises ``CheckpointError`` for anything else that is not a folder."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISREG(mode):
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: expected a folder or a .safetensors file{_conversion(path.suffix)}")
        return False
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{path}: neither a file nor a folder, expected a model folder or a .safetensors file")
    return True


def _choose_files(source: FileSource) -> tuple[list[str], dict[str, str] | None, str]:
    """-> (safetensors files, {tensor: shard} or None if there is no index, the index's name or "")."""
    names = source.names()
    indices = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    if "model.safetensors" in names:  # if both exist, transformers also takes the single file
        return ["model.safetensors"], None, ""
    index_name = f"model{_INDEX_SUFFIX}" if f"model{_INDEX_SUFFIX}" in indices else None
    if index_name is None and len(indices) == 1:
        index_name = indices[0]
    if index_name is not None:
        weight_map = parse_index(source.read_small(index_name), index_name)
        return sorted(set(weight_map.values())), weight_map, index_name
    return [_only_safetensors_file(source.path, names)], None, ""


def _only_safetensors_file(folder: Path, names: list[str]) -> str:
    """The only safetensors file, whatever its name: quantizers write ``gptq_model-4bit-128g.safetensors``."""
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder}: {len(found)} safetensors files ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}) "
            f"but no model{_INDEX_SUFFIX}; give the path of the file that is meant"
        )
    suffix = next((Path(name).suffix for name in names if Path(name).suffix in _OTHER_FORMATS), "")
    what = f"only {suffix} weights" if suffix else f"no weights among {len(names)} files" if names else "nothing"
    raise CheckpointError(
        f"{folder}: found {what}, expected model.safetensors or model{_INDEX_SUFFIX} with its shards"
        f"{_conversion(suffix)}"
    )


def _conversion(suffix: str) -> str:
    hint = _OTHER_FORMATS.get(suffix)
    return f". exl reads safetensors: {hint}" if hint else ""


def _read_header(file: CheckpointFile) -> list[TensorInfo]:
    if file.num_bytes < 8:
        raise CheckpointError(f"{file.name}: {file.num_bytes} bytes, expected at least the 8 of the header's length")
    length = bytearray(8)
    file.read_into(memoryview(length), 0, "the header's length")
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


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], index_name: str) -> None:
    for name, shard in weight_map.items():
        info = tensors.get(name)
        if info is None or info.file != shard:
            found = "in no shard" if info is None else f"in {info.file}"
            raise CheckpointError(f"{index_name}: tensor {shown(name)} is {found}, expected in {shard}")
    for name, info in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{index_name}: does not list tensor {shown(name)}, found in {info.file}")
