"""Layers that do not fit on a GPU: copied from pinned memory or the disk to buffers on the GPU, ahead of their turn.

The host queues copies on a CUDA stream of their own; the two CUDA streams wait for each other by events: a copy waits
for the arithmetic that still reads its buffer, arithmetic for the copy of its layer. The host itself waits only
for the disk. The i-th streamed layer always has buffer i mod S, so that its weights have one address: a step can be
captured in a CUDA graph, copies included (``settle`` before, ``join`` at its end, ``captured`` or ``abandon`` after).
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Protocol

import torch

from exl.errors import ExlError
from exl.layout.layers import LayerLayout
from exl.memory.copies import CopyEngine, Event
from exl.ops.base import LayerWeights
from exl.weights.reader import BufferReader, StreamStats


class HostLayers(Protocol):
    """Where layers are before they are copied."""

    def begin(self, order: Sequence[int]) -> None: ...

    def is_ready(self, layer_idx: int) -> bool:
        """Whether ``take`` would not wait."""

    def take(self, layer_idx: int) -> torch.Tensor:
        """u8 in host memory, unchanged until the event passed to ``copied``. Raises ``CheckpointError``."""

    def copied(self, layer_idx: int, event: Event) -> None: ...

    def close(self) -> None:
        """Gives the memory back. All copies have ended. May be called again."""

    @property
    def stats(self) -> StreamStats:
        """What was read from the disk so far. From any thread."""


class PinnedLayers:
    """All of them in memory."""

    def __init__(self, blobs: Mapping[int, torch.Tensor], owned: ExitStack | None = None) -> None:
        """``owned`` closes the memory of ``blobs``; it is emptied, because from here on ``close`` does."""
        self._blobs = dict(blobs)
        self._owned = ExitStack() if owned is None else owned.pop_all()

    def begin(self, order: Sequence[int]) -> None:
        pass

    def is_ready(self, layer_idx: int) -> bool:
        return layer_idx in self._blobs

    def take(self, layer_idx: int) -> torch.Tensor:
        return self._blobs[layer_idx]

    def copied(self, layer_idx: int, event: Event) -> None:
        pass

    def close(self) -> None:
        self._owned.close()

    @property
    def stats(self) -> StreamStats:
        return StreamStats()


class DiskLayers:
    """Read by a thread into buffers in host memory, each of which is free again when its copy to the device is done."""

    def __init__(self, reader: BufferReader) -> None:
        """``reader`` is closed with the layers."""
        self._reader = reader
        self._buffers = [torch.from_numpy(buffer.array) for buffer in reader.buffers]
        self._copies: deque[tuple[int, Event]] = deque()  # in flight, in order

    def begin(self, order: Sequence[int]) -> None:
        self._collect(wait=True)
        self._reader.begin(tuple(order))

    def is_ready(self, layer_idx: int) -> bool:
        self._collect(wait=False)
        return self._reader.holds(layer_idx)

    def take(self, layer_idx: int) -> torch.Tensor:
        self._collect(wait=not self._reader.holds(layer_idx))  # the thread may need their buffers to go on
        return self._buffers[self._reader.acquire(layer_idx)][: self._reader.sizes[layer_idx]]

    def copied(self, layer_idx: int, event: Event) -> None:
        self._copies.append((layer_idx, event))

    def _collect(self, *, wait: bool) -> None:
        while self._copies and (wait or self._copies[0][1].query()):
            layer_idx, event = self._copies.popleft()
            event.synchronize()
            self._reader.release(layer_idx)

    def close(self) -> None:
        self._reader.close()

    @property
    def stats(self) -> StreamStats:
        return self._reader.stats


@dataclass
class _DeviceBuffer:
    memory: torch.Tensor  # u8
    layer_idx: int | None = None  # whose bytes it holds once ``loaded`` has happened
    loaded: Event | None = None
    released: Event | None = None  # the last arithmetic that read it
    in_use: bool = False  # acquired and not released

    def wait(self) -> None:
        """Until its copy has ended and its last reader too, on the host."""
        for event in (self.loaded, self.released):
            if event is not None:
                event.synchronize()


class DeviceStream:
    """A ``WeightSource``: some layers on the device for good, the others copied to ``buffers`` ahead of their turn.
    ``close`` waits for the copies and then closes ``host``."""

    def __init__(
        self,
        layouts: Sequence[LayerLayout],
        resident: Mapping[int, LayerWeights],
        host: Sequence[tuple[Sequence[int], HostLayers]],
        buffers: Sequence[torch.Tensor],
        engine: CopyEngine,
    ) -> None:
        """``host``: layers and where they come from; each layer is there or resident. ``buffers`` u8, as large as the
        largest of those layers."""
        self._resident, self._engine = dict(resident), engine
        self._tiers = {layer_idx: tier for layers, tier in host for layer_idx in layers}
        self._host = tuple((frozenset(layers), tier) for layers, tier in host)
        if self._tiers.keys() & self._resident.keys() or len(self._tiers) + len(self._resident) != len(layouts):
            raise ValueError("each layer must be either resident or streamed")
        self._sizes = {layer_idx: layouts[layer_idx].num_bytes for layer_idx in self._tiers}
        if not buffers or any(len(buffer) < max(self._sizes.values()) for buffer in buffers):
            raise ValueError(f"buffers of {[len(buffer) for buffer in buffers]} bytes for layers of {self._sizes}")
        self._num_layers = len(layouts)
        # What was queued before, such as the memory's zeroing, comes before the first copy.
        self._buffers = [_DeviceBuffer(buffer, released=engine.record()) for buffer in buffers]
        self._buffer_of = {
            layer_idx: self._buffers[i % len(buffers)] for i, layer_idx in enumerate(sorted(self._tiers))
        }
        self._views = {
            i: LayerWeights.view(layouts[i], buffer.memory[: self._sizes[i]]) for i, buffer in self._buffer_of.items()
        }
        self._order: tuple[int, ...] = ()
        self._next = 0  # place in the order of the layer to be acquired next
        # Runs even if nobody calls close(), except when the interpreter exits: then CUDA may be gone already, and the
        # system takes the memory back.
        self._finalizer = weakref.finalize(self, _close, self._buffers, [tier for _, tier in self._host], os.getpid())
        self._finalizer.atexit = False
        self.begin(range(len(layouts)))

    def begin(self, order: Sequence[int]) -> None:
        self._check_open()
        for buffer in self._buffers:
            if buffer.in_use:  # of a pass that was interrupted
                buffer.in_use, buffer.released = False, self._engine.record()
        order = tuple(layer_idx for layer_idx in order if layer_idx not in self._resident)
        if order != self._order or self._next:
            self._order, self._next = order, 0
            for layers, tier in self._host:
                tier.begin([i for i in self._fetch_order() if i in layers])
        self._prefetch()

    def acquire(self, layer_idx: int) -> LayerWeights:
        """Arithmetic that is queued from here on finds the layer in its buffer, until ``release``."""
        self._check_open()
        if layer_idx in self._resident:
            return self._resident[layer_idx]
        ahead = self._upcoming()
        if layer_idx not in ahead:
            raise ValueError(f"layer {layer_idx} is not in the order that was announced")
        buffer = self._buffer_of[layer_idx]
        if buffer.in_use:
            raise ValueError(f"layer {layer_idx}: its buffer is acquired, by layer {buffer.layer_idx}")
        if buffer.layer_idx != layer_idx:
            self._load(layer_idx)
        self._next = (self._next + ahead.index(layer_idx) + 1) % len(self._order)
        if buffer.loaded is not None:
            self._engine.wait(buffer.loaded)
        buffer.in_use = True
        return self._views[layer_idx]

    def release(self, layer_idx: int) -> None:
        if layer_idx in self._resident:
            return
        buffer = self._buffer_of[layer_idx]
        if not buffer.in_use or buffer.layer_idx != layer_idx:
            raise ValueError(f"layer {layer_idx} is not acquired")
        buffer.in_use, buffer.released = False, self._engine.record()
        self._prefetch()

    @property
    def capturable(self) -> bool:
        """Whether no layer is read from the disk: for that the host would have to wait in the middle of a step."""
        return all(isinstance(tier, PinnedLayers) for _, tier in self._host)

    @property
    def stats(self) -> StreamStats:
        found = [tier.stats for _, tier in self._host]
        return StreamStats(*(sum(values) for values in zip(*map(astuple, found), strict=True)))

    def join(self) -> None:
        """Arithmetic that is queued from here on waits for all copies: the end of a captured step."""
        for buffer in self._buffers:
            if buffer.loaded is not None:
                self._engine.wait(buffer.loaded)

    def settle(self) -> None:
        """Waits on the host until no copy or arithmetic uses the buffers, and drops their events: a graph may not wait
        for work queued before its capture."""
        for buffer in self._buffers:
            buffer.wait()
            buffer.loaded = buffer.released = None

    def rest(self) -> None:
        """Before a captured pass, and before each time that it is queued again: buffers hold the first layers, whatever
        an interrupted pass left in them, and arithmetic waits for copies that are still on their way."""
        self.begin(range(self._num_layers))
        self.join()

    def replayed(self) -> None:
        """A captured pass has been replayed: the buffers hold the same layers as before it, and no copy is pending."""
        for buffer in self._buffers:
            buffer.loaded, buffer.released = None, self._engine.record()

    def captured(self) -> None:
        """A pass has been captured and nothing has run: buffers are as ``settle`` left them. Events that were recorded
        inside of a capture are edges of its graph; CUDA refuses to wait for them anywhere else."""
        for buffer in self._buffers:
            buffer.loaded = buffer.released = None

    def abandon(self) -> None:
        """A capture that failed: what it queued will never happen, buffers hold nothing."""
        for buffer in self._buffers:
            buffer.layer_idx = buffer.loaded = buffer.released = None
            buffer.in_use = False
        self._order, self._next = (), 0

    def close(self) -> None:
        """Waits until no copy is on its way, then gives back the host's memory and ends the reader. Later calls of
        ``begin`` and ``acquire`` raise ``ExlError``. May be called again."""
        self._finalizer()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise ExlError("the weights are closed")

    def _upcoming(self) -> tuple[int, ...]:
        return self._order[self._next :] + self._order[: self._next]

    def _fetch_order(self) -> tuple[int, ...]:
        """The order, rotated to start at the first layer that no buffer holds: what is taken from the host next."""
        is_loaded = [self._buffer_of[i].layer_idx == i for i in self._order]
        first = is_loaded.index(False) if False in is_loaded else 0
        return self._order[first:] + self._order[:first]

    def _prefetch(self) -> None:
        """Queues copies of the next layers, as long as their buffers are free and their bytes are ready."""
        awaited: set[int] = set()  # buffers of layers that come earlier
        for layer_idx in self._upcoming():
            buffer = self._buffer_of[layer_idx]
            if buffer.in_use or id(buffer) in awaited:
                return
            awaited.add(id(buffer))
            if buffer.layer_idx != layer_idx:
                if not self._tiers[layer_idx].is_ready(layer_idx):
                    return
                self._load(layer_idx)

    def _load(self, layer_idx: int) -> None:
        buffer, tier = self._buffer_of[layer_idx], self._tiers[layer_idx]
        source = tier.take(layer_idx)
        buffer.layer_idx = None
        buffer.loaded = self._engine.copy(buffer.memory[: self._sizes[layer_idx]], source, buffer.released)
        buffer.released, buffer.layer_idx = None, layer_idx
        tier.copied(layer_idx, buffer.loaded)


def _close(buffers: Sequence[_DeviceBuffer], tiers: Sequence[HostLayers], process: int) -> None:
    if os.getpid() != process:  # forked: neither the device nor the page-locked memory is there
        return
    with ExitStack() as stack:  # all of them, even if the device reports an error
        for tier in tiers:
            stack.callback(tier.close)
        for buffer in buffers:
            buffer.wait()
