"""What a run that was killed left behind, and whether it is ours: the folder ``DST/.partial``.

    request.json             what is being made, by digests of everything that it depends on
    layer-0007.safetensors   the quantized tensors of a finished layer
    hidden-0008.f32          inputs of the layer after it, as the quantized layers make them
    dense-0008.f32           the same as the dense layers make them

A file has its name only when it is complete. A layer's file is written before the hidden states that follow from it,
so the highest hidden states tell where to go on.
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

from exl.checkpoint.config import read_json
from exl.errors import CheckpointError, ConfigError
from exl.replace_file import replace_file

WORK_NAME = ".partial"
_REQUEST = "request.json"


class WorkFolder:
    """``streams`` names the hidden states that the method needs: "hidden", "dense", or none."""

    def __init__(self, path: Path, streams: Sequence[str]) -> None:
        self.path = path
        self.streams = tuple(streams)

    @classmethod
    def open(cls, dst: Path, request: Mapping[str, Any], streams: Sequence[str]) -> WorkFolder:
        """Makes ``dst`` and the folder in it, or takes up what an equal request left there.

        Raises ``ConfigError`` where ``dst`` holds anything else, or the beginnings of something different.
        """
        work = cls(dst / WORK_NAME, streams)
        names = sorted(entry.name for entry in dst.iterdir()) if dst.is_dir() else []
        if dst.exists() and not dst.is_dir():
            raise ConfigError(f"{dst}: exists and is not a folder")
        found = work.path / _REQUEST
        if found.is_file():
            _compare(read_json(found), request, work.path)
        elif names and (names != [WORK_NAME] or any(not name.endswith(".part") for name in os.listdir(work.path))):
            raise ConfigError(f"{dst}: exists and holds {names[0]}; nothing is overwritten: expected a new folder")
        else:
            work.path.mkdir(parents=True, exist_ok=True)
            write_text(found, json.dumps(request, indent=1))
        for part in work.path.glob("*.part"):
            part.unlink()
        return work

    def layer_path(self, layer_idx: int) -> Path:
        return self.path / f"layer-{layer_idx:04d}.safetensors"

    def hidden_path(self, stream: str, layer_idx: int) -> Path:
        return self.path / f"{stream}-{layer_idx:04d}.f32"

    def num_finished(self, num_layers: int) -> int:
        """Layers that need not be done again."""
        finished = 0
        for i in range(num_layers):
            if not self.layer_path(i).is_file():
                break
            # Nothing reads the last layer's outputs, and they are not kept.
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
    """The file appears under its name only when it is complete and on the disk."""
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


def read_rows(path: Path, start: int, stop: int, width: int) -> torch.Tensor:
    """Rows ``start:stop`` of hidden states, f32 [stop - start, width]. Read, not mapped: a disk that fails is then an
    error and not a signal."""
    rows = np.fromfile(path, dtype=np.float32, count=(stop - start) * width, offset=start * width * 4)
    if rows.size != (stop - start) * width:
        raise CheckpointError(f"{path}: ended before row {stop}: delete the folder it is in and start anew")
    return torch.from_numpy(rows).view(stop - start, width)
