"""The folder ``DST/.partial``: the state of an unfinished run, and whether this run can resume it.

    bits.json                with target_bits: the widths that were chosen; measured before any layer is quantized
    request.json             the options, and digests of everything else that the result depends on
    routed-0007.json         of a mixture: how many rows each expert of layer 7 has seen
    layer-0007.safetensors   the quantized tensors of layer 7, finished
    hidden-0008.f32          inputs of layer 8, as computed by the quantized layers
    dense-0008.f32           the same, as computed by the dense layers
    inputs.f32.part          and others ending so: what is of use only until the layer is finished

A file gets its name only when it is complete. A layer's file is written before the hidden states after it, so the
hidden states with the highest number tell where to resume.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exl.checkpoint.config_reader import read_json
from exl.errors import CheckpointError, ConfigError
from exl.replace_file import replace_file

WORK_NAME = ".partial"
_REQUEST = "request.json"


class WorkFolder:
    """``streams``: the kinds of hidden states that the method needs: "hidden", "hidden" and "dense", or none."""

    def __init__(self, path: Path, streams: Sequence[str]) -> None:
        self.path = path
        self.streams = tuple(streams)

    @classmethod
    def open(cls, dst: Path, request: Mapping[str, Any], streams: Sequence[str]) -> WorkFolder:
        """Makes ``dst`` and the folder in it, or opens what an unfinished run with an equal request left there.

        Raises ``ConfigError`` if ``dst`` holds anything else, or an unfinished run with a different request.
        """
        work = cls(dst / WORK_NAME, streams)
        names = sorted(entry.name for entry in dst.iterdir()) if dst.is_dir() else []
        if dst.exists() and not dst.is_dir():
            raise ConfigError(f"{dst}: exists and is not a folder")
        found = work.path / _REQUEST
        if found.is_file():
            _compare(read_json(found), request, work.path)
        elif names and (names != [WORK_NAME] or any(not name.endswith(".part") for name in os.listdir(work.path))):
            raise ConfigError(
                f"{dst}: exists and holds {names[0]}, expected a new or empty folder: exl overwrites nothing"
            )
        else:
            work.path.mkdir(parents=True, exist_ok=True)
            write_text(found, json.dumps(request, indent=1))
        for part in work.path.glob("*.part"):
            part.unlink()
        return work

    def layer_path(self, layer_idx: int) -> Path:
        return self.path / f"layer-{layer_idx:04d}.safetensors"

    def routed_path(self, layer_idx: int) -> Path:
        return self.path / f"routed-{layer_idx:04d}.json"

    @property
    def bits_path(self) -> Path:
        return self.path / "bits.json"

    def hidden_path(self, stream: str, layer_idx: int) -> Path:
        return self.path / f"{stream}-{layer_idx:04d}.f32"

    def scratch_path(self, kind: str) -> Path:
        """Of rows that a run which is resumed makes anew."""
        return self.path / f"{kind}.f32.part"

    def num_finished(self, num_layers: int) -> int:
        """The number of layers, from the first on, that need not be quantized again."""
        finished = 0
        for i in range(num_layers):
            if not self.layer_path(i).is_file():
                break
            # Nothing reads the last layer's outputs, so they are not written.
            if i + 1 == num_layers or all(self.hidden_path(stream, i + 1).is_file() for stream in self.streams):
                finished = i + 1
        return finished

    def has_hidden(self, layer_idx: int) -> bool:
        return all(self.hidden_path(stream, layer_idx).is_file() for stream in self.streams)

    def drop_hidden(self, layer_idx: int) -> None:
        for stream in self.streams:
            self.hidden_path(stream, layer_idx).unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.path)


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{path}: holds an unfinished run that differs in {', '.join(differing)} "
            f"({key}: found {found.get(key)!r}, expected {wanted.get(key)!r}); delete it or choose another destination"
        )


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears under its name only when it is complete and on disk."""
    with write_atomically(path) as write:
        write(text.encode("utf-8"))


@contextmanager
def write_atomically(path: Path) -> Iterator[Callable[[Any], object]]:
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        yield file.write
        file.flush()
        os.fsync(file.fileno())
    replace_file(part, path)


@contextmanager
def write_scratch(path: Path) -> Iterator[Callable[[Any], object]]:
    """Writes a file that need not outlive this process."""
    with open(path, "wb") as file:
        yield file.write


def as_bytes(rows: torch.Tensor) -> memoryview:
    return memoryview(rows.contiguous().numpy()).cast("B")


def read_rows(path: Path, start: int, stop: int, width: int) -> torch.Tensor:
    """Rows ``start:stop`` of hidden states, f32 [stop - start, width]. Read, not memory-mapped, so that a disk failure
    raises an error instead of a signal."""
    rows = np.fromfile(path, dtype=np.float32, count=(stop - start) * width, offset=start * width * 4)
    if rows.size != (stop - start) * width:
        raise CheckpointError(f"{path}: ended before row {stop}: delete its folder and run again")
    return torch.from_numpy(rows).view(stop - start, width)


def keep_scratch(part: Path, path: Path) -> None:
    """A file for this process alone takes the name under which a resumed run finds it."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    replace_file(part, path)


class RowFile:
    """Rows f32 [width] of a file, read and written in any ascending order. A context manager."""

    def __init__(self, path: Path, width: int) -> None:
        self._path, self._width = path, width
        self._file = open(path, "rb+", buffering=0)  # noqa: SIM115, closed by __exit__

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """f32 [len(rows), width]. Raises ``CheckpointError`` if the file is shorter."""
        found = np.empty((len(rows), self._width), np.float32)
        for first, start, stop in _runs(rows):
            self._file.seek(first * self._width * 4)
            view = memoryview(found[start:stop]).cast("B")
            while len(view):
                count = self._file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self._path}: ended before row {first}: delete its folder and run again")
                view = view[count:]
        return torch.from_numpy(found)

    def write(self, rows: NDArray[np.int64], values: torch.Tensor) -> None:
        for first, start, stop in _runs(rows):
            self._file.seek(first * self._width * 4)
            view = as_bytes(values[start:stop])
            while len(view):
                view = view[self._file.write(view) :]


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Neighbours in the file: (the first row, where it is in ``rows``, where the next run begins there)."""
    ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    start = 0
    for stop in ends if len(rows) else ():
        yield int(rows[start]), start, stop
        start = stop
