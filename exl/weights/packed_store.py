"""The folder of packed files: which file belongs to a model, what is there, what can go."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from exl.checkpoint.block_file import BlockFile
from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant.base import QuantConfig
from exl.errors import ExlError
from exl.layout.layers import ExpertLayout, LayerLayout
from exl.layout.specs import ExpertSpec, Target
from exl.user_cache import user_cache_folder
from exl.weights.packed import SUFFIX, read_header, remove_dead_parts

# Raise it whenever the same tensors come to be packed into other bytes: new kernels' orders, changed fields.
LAYOUT_VERSION = 4
_SAMPLE_BYTES = 64
_SAMPLE_THREADS = 8
_NAME = re.compile(r".*-[0-9a-f]{32}" + re.escape(SUFFIX))


def default_packed_folder() -> Path:
    return user_cache_folder("packed")


def packed_key(
    checkpoint: Checkpoint,
    quant: QuantConfig | None,
    layouts: Sequence[LayerLayout],
    target: Target,
    packer: str,
    experts: Sequence[tuple[ExpertLayout, ExpertSpec]] = (),
) -> bytes:
    """Digest, 32 bytes, of all that the packed bytes depend on. ``packer`` names the library that packs, with its
    version. ``layouts``: one per blob, in the order of the file; then come ``experts``, layer by layer.

    A checkpoint is too large to hash at each load. Headers, sizes, modification times and a sample of each tensor stand
    for it. The samples are needed because unpacked archives and images often give all files the same time.
    """
    parts = [
        ["layout version", LAYOUT_VERSION],
        ["target", repr(target)],
        ["packer", packer],
        ["files", sorted((name, size, checkpoint.modified_ns[name]) for name, size in checkpoint.files.items())],
        ["tensors", _describe_tensors(checkpoint)],
        ["layouts", [_describe_layout(layout, quant) for layout in layouts]],
        ["experts", [_describe_experts(layout, spec, quant) for layout, spec in experts]],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _describe_tensors(checkpoint: Checkpoint) -> list[list]:
    """Sorted by name. Samples are read by several threads, because each waits for the disk."""
    names = sorted(checkpoint.tensors)
    some = [names[i::_SAMPLE_THREADS] for i in range(_SAMPLE_THREADS)]
    with ThreadPoolExecutor(_SAMPLE_THREADS, "exl samples") as executor:
        found = executor.map(lambda some: [_describe_tensor(checkpoint, name) for name in some], some)
        return sorted(tensor for tensors in found for tensor in tensors)


def _describe_tensor(checkpoint: Checkpoint, name: str) -> list:
    info = checkpoint.tensors[name]
    size = min(info.num_bytes, _SAMPLE_BYTES)
    sample = checkpoint.read_bytes(name, (info.num_bytes - size) // 2, size)
    return [name, info.file, info.dtype, info.shape, info.start, info.stop, sample.tobytes().hex()]


def model_digest(checkpoint: Checkpoint) -> str:
    """Of the tensors alone, wherever their files lie and whenever they were written: names, types, shapes, samples."""
    parts = [(name, dtype, shape, sample) for name, _, dtype, shape, _, _, sample in _describe_tensors(checkpoint)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _describe_layout(layout: LayerLayout, quant: QuantConfig | None) -> list:
    fields = [(name, f.offset, f.num_bytes, f.dtype, f.shape) for name, f in layout.fields.items()]
    linears = [(name, linear.kind, repr(linear.spec)) for name, some in layout.linears.items() for linear in some]
    matrices = [part for some in layout.linears.values() for linear in some for part in linear.spec.parts]
    # What their bytes mean besides: whether zeros have an offset is not in the layout.
    configs = [] if quant is None else [repr(quant.for_module(matrix.name) or quant) for matrix in matrices]
    norms = [repr(norm) for norm in layout.norms]  # what is done to their values, too
    return [layout.num_bytes, fields, norms, linears, configs]


def _describe_experts(layout: ExpertLayout, spec: ExpertSpec, quant: QuantConfig | None) -> list:
    """By the first one: the manifest has seen that the others are like it."""
    return [layout.count, sorted(spec.names.items()), _describe_layout(layout.blob, quant)]


def packed_path(folder: Path, model: Path, key: bytes) -> Path:
    """``model`` gives the name that people see, ``key`` the identity."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", model.name)[:80] or "model"
    return folder / f"{stem}-{key.hex()[:32]}{SUFFIX}"


@dataclass(frozen=True)
class PackedInfo:
    """One packed file. ``source`` is the model's path at packing; None: the header is damaged or of another version."""

    path: Path
    source: str | None
    num_bytes: int
    last_used: float  # seconds since 1970


def list_packed(folder: Path | None = None) -> list[PackedInfo]:
    """exl's packed files in ``folder`` (default: the user's cache), last used first. No folder: none."""
    folder = default_packed_folder() if folder is None else folder
    found = []
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ExlError(f"{folder}: cannot be listed: {error.strerror or error}") from None
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            info = entry.stat(follow_symlinks=False)
            if _NAME.fullmatch(entry.name) and stat.S_ISREG(info.st_mode):
                path = Path(entry.path)
                found.append(PackedInfo(path, _source(path), info.st_size, info.st_mtime))
    return sorted(found, key=lambda info: (-info.last_used, info.path))


def clear_packed(folder: Path | None = None, model: Path | None = None) -> list[PackedInfo]:
    """Removes packed files and what killed writers left, nothing else; returns the packed files. With ``model``, only
    those of that model. A file in use is removed when its last user ends, if the system can do that.

    Raises ``ExlError`` that names what cannot be removed, such as a file in use on Windows; the others are gone then.
    """
    folder = default_packed_folder() if folder is None else folder
    removed, failures = [], []
    for info in list_packed(folder):
        if model is not None and info.source != source_name(model):
            continue
        try:
            info.path.unlink(missing_ok=True)
        except OSError as error:
            failures.append(f"{info.path}: cannot be removed: {error.strerror or error}")
            continue
        removed.append(info)
    if folder.is_dir():
        remove_dead_parts(folder)
    if failures:
        raise ExlError("; ".join(failures))
    return removed


def source_name(model: Path) -> str:
    """What a packed file remembers of its model's path."""
    return str(model.absolute())


def _source(path: Path) -> str | None:
    try:
        with BlockFile.open(path) as file:
            return read_header(file).source
    except (OSError, ValueError):
        return None
