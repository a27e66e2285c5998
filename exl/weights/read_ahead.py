"""Reads one layer's bytes from the checkpoint while the layer before it is being packed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.layout.fields import FIELD_ALIGN, align_up
from exl.memory.host import HostBuffer

_STEP_BYTES = 8 << 20  # bytes per read; between two reads, checks whether it was stopped


class LayerReadAhead:
    """The layers of a checkpoint, each requested once, in order; a context manager that ends its thread.

    Memory: two buffers, each as large as the largest layer in the file.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Sequence[Sequence[str]]) -> None:
        """``layers``: the names of each layer's tensors."""
        self._checkpoint = checkpoint
        self._layers = [sorted(names, key=lambda name: _place(checkpoint, name)) for names in layers]
        largest = max((layer_file_bytes(checkpoint, names) for names in layers), default=0)
        self._buffers = [HostBuffer(largest, "read buffer of a layer") for _ in range(2)]
        self._stopped = threading.Event()
        self._executor = ThreadPoolExecutor(1, "exl checkpoint reader")
        self._pending: Future[Checkpoint] = self._executor.submit(self._read, 0)

    def layer(self, layer_idx: int) -> Checkpoint:
        """The checkpoint with this layer's tensors in memory, valid until the next call. Raises the error that reading
        them raised."""
        ready = self._pending.result()
        if layer_idx + 1 < len(self._layers):
            self._pending = self._executor.submit(self._read, layer_idx + 1)
        return ready

    def _read(self, layer_idx: int) -> Checkpoint:
        buffer = self._buffers[layer_idx % 2].array
        tensors: dict[str, NDArray[np.uint8]] = {}
        offset = 0
        for name in self._layers[layer_idx]:
            num_bytes = self._checkpoint.info(name).num_bytes
            tensors[name] = buffer[offset : offset + num_bytes]
            offset += align_up(num_bytes, FIELD_ALIGN)
            for start in range(0, num_bytes, _STEP_BYTES):
                if self._stopped.is_set():
                    break
                self._checkpoint.read_into(name, tensors[name][start : start + _STEP_BYTES], start)
        return _CheckpointInMemory(self._checkpoint, tensors)

    def close(self) -> None:
        self._stopped.set()
        self._executor.shutdown(wait=True, cancel_futures=True)
        for buffer in self._buffers:
            buffer.close()

    def __enter__(self) -> LayerReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _CheckpointInMemory(Checkpoint):
    """A checkpoint of which some tensors are in memory. Arrays are views, not copies."""

    def __init__(self, checkpoint: Checkpoint, tensors: dict[str, NDArray[np.uint8]]) -> None:
        super().__init__(checkpoint.path, checkpoint.folder, checkpoint._files, checkpoint.tensors)
        self._in_memory = tensors

    def read_bytes(self, name: str, start_byte: int, num_bytes: int) -> NDArray[np.uint8]:
        raw = self._in_memory.get(name)
        if raw is None:
            return super().read_bytes(name, start_byte, num_bytes)
        return raw[start_byte : start_byte + num_bytes]

    def read_into(self, name: str, buffer: Any, start_byte: int = 0) -> None:
        raw = self._in_memory.get(name)
        if raw is None:
            super().read_into(name, buffer, start_byte)
            return
        view = np.frombuffer(buffer, np.uint8)
        view[:] = raw[start_byte : start_byte + len(view)]


def layer_file_bytes(checkpoint: Checkpoint, names: Sequence[str]) -> int:
    """The bytes that a layer's tensors take in a read buffer."""
    return sum(align_up(checkpoint.info(name).num_bytes, FIELD_ALIGN) for name in names)


def _place(checkpoint: Checkpoint, name: str) -> tuple[str, int]:
    info = checkpoint.info(name)
    return info.file, info.start
