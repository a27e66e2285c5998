"""Gives a pass each layer's weights in time: from memory if the layer is resident, else read ahead from disk."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from exl.errors import CheckpointError, ExlError
from exl.layout.layers import LayerLayout
from exl.memory.host import HostBuffer
from exl.ops.base import LayerWeights
from exl.weights.packed import PackedFile


class WeightSource(Protocol):
    """A pass announces its order of layers, then takes and returns them one by one."""

    def begin(self, order: Sequence[int]) -> None: ...

    def acquire(self, layer_idx: int) -> LayerWeights: ...

    def release(self, layer_idx: int) -> None: ...

    @property
    def capturable(self) -> bool:
        """Whether a pass can be captured in a graph: each layer is always at the same address and nothing waits."""


class ResidentWeights:
    """All layers stay in memory."""

    def __init__(self, layers: Sequence[LayerWeights]) -> None:
        self.layers = tuple(layers)

    def begin(self, order: Sequence[int]) -> None:
        pass

    def acquire(self, layer_idx: int) -> LayerWeights:
        return self.layers[layer_idx]

    def release(self, layer_idx: int) -> None:
        pass

    @property
    def capturable(self) -> bool:
        return True


@dataclass(frozen=True)
class StreamStats:
    """Counted since the stream was made."""

    num_reads: int = 0  # layers read in full
    bytes_read: int = 0
    num_waits: int = 0  # how often a layer was not yet in memory when it was acquired
    wait_seconds: float = 0.0


@dataclass
class ReadBuffer:
    array: NDArray[np.uint8]  # page-aligned
    layer_idx: int | None = None  # the layer it holds, completely read; None: none
    num_users: int = 0  # acquired and not yet released


class BufferReader:
    """Buffers, and the thread that fills them. Has no reference to the ``LayerStream``, so as not to keep it alive.

    The next layer to read depends only on the order, the position in it and the buffers' contents: the buffers should
    hold the next layers in order. So a new order needs no special case: layers it can use stay, others are overwritten.
    """

    def __init__(
        self, packed: PackedFile, blob_indices: Mapping[int, int], sizes: Mapping[int, int], buffers: list[ReadBuffer]
    ):
        self.packed, self.buffers, self.stats = packed, buffers, StreamStats()
        self._blob_indices, self._sizes = blob_indices, sizes
        self._order: tuple[int, ...] = ()
        self._next = 0  # position in the order of the layer to be acquired next
        self._failure: tuple[int, CheckpointError] | None = None
        self._closed = False
        self._reading = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="exl layer reader", daemon=True)
        self._thread.start()

    # Called by the consumer

    def begin(self, order: tuple[int, ...]) -> None:
        with self._changed:
            for buffer in self.buffers:
                buffer.num_users = 0  # an interrupted pass may have left users
            self._failure = None
            self._order, self._next = order, 0
            self._changed.notify_all()

    def acquire(self, layer_idx: int) -> int:
        """Waits for the layer and returns the index of the buffer that holds it."""
        with self._changed:
            self._go_to(layer_idx)
            buffer_idx = self._holder(layer_idx)
            if buffer_idx is None:
                buffer_idx = self._wait_for(layer_idx)
            self.buffers[buffer_idx].num_users += 1
            self._next = (self._next + 1) % len(self._order)
            self._changed.notify_all()
            return buffer_idx

    def _go_to(self, layer_idx: int) -> None:
        ahead = self._upcoming()
        if layer_idx not in ahead:
            raise ValueError(f"layer {layer_idx} is not in the order that was announced")
        skipped = ahead.index(layer_idx)
        if skipped:
            self._next = (self._next + skipped) % len(self._order)
            self._changed.notify_all()

    def _wait_for(self, layer_idx: int) -> int:
        began = time.perf_counter()
        if all(buffer.num_users for buffer in self.buffers):
            raise ValueError(f"layer {layer_idx}: all {len(self.buffers)} buffers are acquired, release one first")
        while True:
            buffer_idx = self._holder(layer_idx)
            if buffer_idx is not None:
                break
            if self._failure is not None:
                failed_idx, error = self._failure
                self._failure = None  # if the layer is acquired again, reading is tried again
                self._changed.notify_all()
                if failed_idx == layer_idx:
                    raise CheckpointError(str(error)) from error
            if self._closed:
                raise ExlError("the weights are closed")
            if not self._thread.is_alive():
                raise ExlError("the thread that reads layers is gone: a process that was forked cannot use the model")
            self._changed.wait(1.0)
        waited = time.perf_counter() - began
        self.stats = replace(
            self.stats, num_waits=self.stats.num_waits + 1, wait_seconds=self.stats.wait_seconds + waited
        )
        return buffer_idx

    def release(self, layer_idx: int) -> None:
        with self._changed:
            buffer_idx = self._holder(layer_idx)
            if buffer_idx is None or not self.buffers[buffer_idx].num_users:
                raise ValueError(f"layer {layer_idx} is not acquired")
            self.buffers[buffer_idx].num_users -= 1
            self._changed.notify_all()

    def holds(self, layer_idx: int) -> bool:
        with self._changed:
            return self._holder(layer_idx) is not None

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout_seconds)

    def close(self) -> bool:
        """Stops the thread. Returns False if it does not end within 10 s: then it hangs in a read and may still write
        to its buffer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)
        return not self._thread.is_alive()

    # State; the caller holds the lock

    def _holder(self, layer_idx: int) -> int | None:
        return next((i for i, buffer in enumerate(self.buffers) if buffer.layer_idx == layer_idx), None)

    def _upcoming(self) -> tuple[int, ...]:
        """The whole order, from the current position on; after the last layer comes the first, for the next pass."""
        return self._order[self._next :] + self._order[: self._next]

    def _is_idle(self) -> bool:
        return not self._reading and (self._closed or self._failure is not None or self._choose() is None)

    def _choose(self) -> tuple[int, int] | None:
        """(layer to read, index of the buffer to overwrite); None if there is nothing to do."""
        needed: set[int] = set()  # buffers with layers that come before the one to read
        for layer_idx in self._upcoming():
            buffer_idx = self._holder(layer_idx)
            if buffer_idx is not None:
                needed.add(buffer_idx)
                continue
            free = [i for i, buffer in enumerate(self.buffers) if not buffer.num_users and i not in needed]
            return (layer_idx, max(free, key=self._distance)) if free else None
        return None

    def _distance(self, buffer_idx: int) -> int:
        """How many layers come before the buffer's layer is used again."""
        held, ahead = self.buffers[buffer_idx].layer_idx, self._upcoming()
        return ahead.index(held) if held in ahead else len(ahead)

    # Runs in the reader thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._reading = False
                self._changed.notify_all()
                choice = None
                while choice is None:
                    if self._closed:
                        return
                    choice = self._choose() if self._failure is None else None
                    if choice is None:
                        self._changed.wait()
                layer_idx, buffer_idx = choice
                self._reading = True
                self.buffers[buffer_idx].layer_idx = None
            try:
                complete = self._read(layer_idx, buffer_idx)
            except CheckpointError as error:
                with self._changed:
                    self._failure = (layer_idx, error)
                continue
            except Exception as error:  # any error must reach the thread that waits in acquire
                with self._changed:
                    self._failure = (layer_idx, CheckpointError(f"{self.packed.path}: layer {layer_idx}: {error!r}"))
                continue
            if complete:
                with self._changed:
                    self.buffers[buffer_idx].layer_idx = layer_idx
                    self.stats = replace(
                        self.stats,
                        num_reads=self.stats.num_reads + 1,
                        bytes_read=self.stats.bytes_read + self._sizes[layer_idx],
                    )

    def _read(self, layer_idx: int, buffer_idx: int) -> bool:
        def is_wanted() -> bool:
            with self._changed:
                return not self._closed and layer_idx in self._upcoming()[: len(self.buffers)]

        out = self.buffers[buffer_idx].array[: self._sizes[layer_idx]]
        return self.packed.read_blob(self._blob_indices[layer_idx], out, is_wanted)


class LayerStream:
    """Some layers stay in memory; the others are read ahead from the packed file, in the order that a pass announces.
    After the end of the order, reading continues at its start, because passes repeat.

    ``acquire`` waits for the layer; its weights are valid until ``release``. Only one pass runs at a time; ``begin``
    ends an interrupted one. ``acquire`` raises errors of the reader as ``CheckpointError`` that names the file. Owns
    and closes ``packed`` and ``buffers``; ``resident`` (views by layer) is memory that the caller owns.
    """

    def __init__(
        self,
        layouts: Sequence[LayerLayout],
        resident: Mapping[int, LayerWeights],
        packed: PackedFile,
        blob_indices: Mapping[int, int],
        buffers: HostBuffer,
        num_buffers: int,
    ) -> None:
        """``blob_indices``: streamed layer -> its blob in ``packed``. ``buffers``: ``num_buffers`` largest layers."""
        self._layouts, self._resident = tuple(layouts), dict(resident)
        self._buffers, self._packed = buffers, packed
        self._num_layers = len(self._layouts)
        sizes = {i: self._layouts[i].num_bytes for i in blob_indices}
        buffer_bytes = max(sizes.values())
        if num_buffers < 1 or buffers.num_bytes != num_buffers * buffer_bytes:
            raise ValueError(f"{buffers.num_bytes} bytes for {num_buffers} buffers of {buffer_bytes}")
        if sizes.keys() & self._resident.keys() or len(sizes) + len(self._resident) != self._num_layers:
            raise ValueError("each layer must be either resident or streamed")
        memory = torch.from_numpy(buffers.array)
        self._tensors = [memory[i * buffer_bytes : (i + 1) * buffer_bytes] for i in range(num_buffers)]
        self._views: dict[tuple[int, int], LayerWeights] = {}
        self._reader = BufferReader(
            packed,
            dict(blob_indices),
            sizes,
            [ReadBuffer(buffers.array[i * buffer_bytes : (i + 1) * buffer_bytes]) for i in range(num_buffers)],
        )
        # Runs even if nobody calls close(), at the latest when the interpreter exits.
        self._finalizer = weakref.finalize(self, _close, self._reader, packed, buffers)
        self.begin(range(self._num_layers))

    @property
    def stats(self) -> StreamStats:
        return self._reader.stats

    def begin(self, order: Sequence[int]) -> None:
        self._check_open()
        streamed = tuple(layer_idx for layer_idx in order if layer_idx not in self._resident)
        unknown = [layer_idx for layer_idx in order if not 0 <= layer_idx < self._num_layers]
        if unknown:
            raise ValueError(f"layer {unknown[0]} of a model of {self._num_layers}")
        self._reader.begin(streamed)

    def acquire(self, layer_idx: int) -> LayerWeights:
        self._check_open()
        if layer_idx in self._resident:
            return self._resident[layer_idx]
        buffer_idx = self._reader.acquire(layer_idx)
        weights = self._views.get((layer_idx, buffer_idx))
        if weights is None:
            layout = self._layouts[layer_idx]
            weights = LayerWeights.view(layout, self._tensors[buffer_idx][: layout.num_bytes])
            self._views[layer_idx, buffer_idx] = weights
        return weights

    def release(self, layer_idx: int) -> None:
        if layer_idx not in self._resident:
            self._reader.release(layer_idx)

    @property
    def capturable(self) -> bool:
        return False

    def wait_until_idle(self, timeout_seconds: float = 60.0) -> bool:
        """Waits until there is nothing left to read ahead, to count what a pass reads. Returns False on timeout."""
        return self._reader.wait_until_idle(timeout_seconds)

    def close(self) -> None:
        """Ends the thread and frees the buffers. Later calls of ``begin`` and ``acquire`` raise ``ExlError``."""
        self._finalizer()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise ExlError("the weights are closed")


def _close(reader: BufferReader, packed: PackedFile, buffers: HostBuffer) -> None:
    if reader.close():  # else the thread still uses both
        packed.close()
        buffers.close()
