"""Threads that read layers from the packed file into buffers, ahead of their turn, and own both."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from exl import forks
from exl.errors import CheckpointError, ExlError
from exl.weights.packed import PackedFile

# One thread would leave the disk idle from the end of a read until it runs again and asks for the next, which takes as
# long as a layer's arithmetic where that keeps all processors busy. Of two, the other's read goes on meanwhile. They
# read parts, one layer after the other, so that a layer that is waited for does not share the disk with the next.
_THREADS = 2
_PART_BYTES = 8 << 20
_CLOSE_SECONDS = 10.0  # how long ``close`` waits for a read to return
_FORK_SECONDS = 5.0  # how long a fork of the process waits for that


@dataclass(frozen=True)
class StreamStats:
    """Counted since the stream was made."""

    num_reads: int = 0  # layers read in full
    bytes_read: int = 0
    num_waits: int = 0  # how often a layer was not yet in memory when it was acquired
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class StreamedLayer:
    """Where a layer is in the packed file: its blob, and those of its experts, which lie one after another there. In a
    buffer they come behind it."""

    blob_idx: int
    num_bytes: int
    experts: range = range(0)
    expert_bytes: int = 0  # of each

    @property
    def total_bytes(self) -> int:
        return self.num_bytes + len(self.experts) * self.expert_bytes


@dataclass(frozen=True)
class _Part:
    """Bytes of a blob, from ``start`` on, and where in a buffer they come."""

    blob_idx: int
    start: int
    place: int
    num_bytes: int
    whole: bool  # they are all of it, and its checksum is compared if it has not been


@dataclass
class ReadBuffer:
    array: NDArray[np.uint8]  # page-aligned
    layer_idx: int | None = None  # the layer it holds, completely read; None: none
    coming: int | None = None  # the layer that is being read into it
    parts: deque[_Part] = field(default_factory=deque)  # of that layer's bytes, that no thread reads yet
    num_left: int = 0  # parts that are not there yet
    given_up: bool = False  # a part failed, or the layer is not wanted any more
    num_users: int = 0  # acquired and not yet released


class BufferReader:
    """The buffers, the packed file, and the threads that fill the first from the second. The only owner of both: the
    threads that write to buffers also give the memory back, the last one when it ends, so that a read that hangs never
    finds its buffer unmapped or its file closed. Has no reference to the stream that uses it, so as not to keep it
    alive.

    The next layer to read depends only on the order, the position in it and the buffers' contents: the buffers should
    hold the next layers in order. So a new order needs no special case: layers it can use stay, others are overwritten.

    When the process forks, reading pauses: a direct read into memory that is being forked could end in the other
    process's copy (open(2), NOTES). The child starts a thread of its own when it first needs one.
    """

    def __init__(
        self,
        packed: PackedFile,
        layers: Mapping[int, StreamedLayer],
        arrays: Sequence[NDArray[np.uint8]],
        owned: ExitStack,
    ) -> None:
        """``layers``: those that are streamed. ``arrays``: the buffers, u8, page-aligned, each with room for the
        largest layer. ``owned`` closes the file and the buffers' memory; it is emptied, because from here on the reader
        closes them. If this raises, the caller still does."""
        sizes = {layer_idx: layer.total_bytes for layer_idx, layer in layers.items()}
        if not arrays or any(len(array) < max(sizes.values()) for array in arrays):
            raise ValueError(f"buffers of {[len(array) for array in arrays]} bytes for layers of {sizes}")
        self.packed, self.sizes, self.stats = packed, sizes, StreamStats()
        self.buffers = [ReadBuffer(array) for array in arrays]
        self._layers = layers
        self._order: tuple[int, ...] = ()
        self._next = 0  # position in the order of the layer to be acquired next
        self._failures: dict[int, CheckpointError] = {}  # by layer; nothing is read while there are some
        self._closed = False
        self._forking = False
        self._num_reading = 0  # threads that are in a read
        self._changed = threading.Condition()
        self._owned = ExitStack()
        self._threads: list[threading.Thread] = []  # none: a forked process that has not read yet
        self._start_threads()
        self._owned = owned.pop_all()
        forks.register(self)

    def _start_threads(self) -> None:
        if not self._threads and not self._closed:
            self._num_running = min(_THREADS, len(self.buffers))
            self._threads = [
                threading.Thread(target=self._run, name="exl layer reader", daemon=True)
                for _ in range(self._num_running)
            ]
            for thread in self._threads:
                thread.start()

    # Called by the consumer

    def begin(self, order: tuple[int, ...]) -> None:
        with self._changed:
            for buffer in self.buffers:
                buffer.num_users = 0  # an interrupted pass may have left users
            self._failures.clear()
            self._order, self._next = order, 0
            self._start_threads()
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
            if self._failures and not any(buffer.coming == layer_idx for buffer in self.buffers):
                error = self._failures.get(layer_idx)
                self._failures.clear()  # if a layer is acquired again, reading is tried again
                self._changed.notify_all()
                if error is not None:
                    raise CheckpointError(str(error)) from error
            if self._closed:
                raise ExlError("the weights are closed")
            if not any(thread.is_alive() for thread in self._threads):
                raise ExlError("the threads that read layers have ended")
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
        """Ends the threads; the last one gives back the buffers and the file as it ends. Returns False if one has not
        ended within 10 s: it hangs in a read and may still write to its buffer, so both stay until that read returns.
        May be called again, and from any thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not self._threads:  # forked: nobody else closes what this process has
            self._owned.close()
            return True
        if threading.current_thread() in self._threads:  # garbage was collected during a read
            return False
        until = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # Called by the thread that forks the process

    def before_fork(self) -> None:
        """Keeps the lock until ``after_fork``, so that the child finds everything in order."""
        self._changed.acquire()
        self._forking = True
        self._changed.wait_for(lambda: not self._num_reading, _FORK_SECONDS)

    def after_fork(self, in_child: bool) -> None:
        self._forking = False
        if in_child:  # what a read that hangs has written so far is not counted as a layer
            self._changed, self._threads, self._num_reading = threading.Condition(), [], 0
            for buffer in self.buffers:
                buffer.coming = None
                buffer.parts.clear()
            return
        self._changed.notify_all()
        self._changed.release()

    # State; the caller holds the lock

    def _holder(self, layer_idx: int) -> int | None:
        return next((i for i, buffer in enumerate(self.buffers) if buffer.layer_idx == layer_idx), None)

    def _upcoming(self) -> tuple[int, ...]:
        """The whole order, from the current position on; after the last layer comes the first, for the next pass."""
        return self._order[self._next :] + self._order[: self._next]

    def _is_idle(self) -> bool:
        if self._num_reading:
            return False
        coming = any(buffer.coming is not None for buffer in self.buffers)
        return self._closed or bool(self._failures) or (not coming and self._choose() is None)

    def _choose(self) -> tuple[int, int] | None:
        """(layer to read, index of the buffer to overwrite); None if there is nothing to do."""
        needed = {i for i, buffer in enumerate(self.buffers) if buffer.coming is not None}
        on_their_way = {self.buffers[i].coming for i in needed}
        for layer_idx in self._upcoming():
            buffer_idx = self._holder(layer_idx)
            if buffer_idx is not None:
                needed.add(buffer_idx)  # its layer comes before the one to read
            elif layer_idx not in on_their_way:
                free = [i for i, buffer in enumerate(self.buffers) if not buffer.num_users and i not in needed]
                return (layer_idx, max(free, key=self._distance)) if free else None
        return None

    def _distance(self, buffer_idx: int) -> int:
        """How many layers come before the buffer's layer is used again."""
        layer_idx, ahead = self.buffers[buffer_idx].layer_idx, self._upcoming()
        return ahead.index(layer_idx) if layer_idx in ahead else len(ahead)

    # Runs in the reader threads

    def _run(self) -> None:
        try:
            while (part := self._next_part()) is not None:
                self._fill(*part)
        finally:
            with self._changed:
                self._num_running -= 1
                last = not self._num_running
            if last:
                self._owned.close()

    def _next_part(self) -> tuple[ReadBuffer, _Part] | None:
        """Waits for something to read: bytes of the layer that is coming into a buffer. None: closed."""
        with self._changed:
            while not self._closed:
                if not self._failures and not self._forking:
                    buffer = self._begun() or self._begin_next()
                    if buffer is not None:
                        self._num_reading += 1
                        return buffer, buffer.parts.popleft()
                self._changed.wait()
            return None

    def _begun(self) -> ReadBuffer | None:
        """The one with parts left to read whose layer is needed first."""
        upcoming = self._upcoming()
        some = [buffer for buffer in self.buffers if buffer.parts]
        return min(
            some, key=lambda b: upcoming.index(b.coming) if b.coming in upcoming else len(upcoming), default=None
        )

    def _begin_next(self) -> ReadBuffer | None:
        choice = self._choose()
        if choice is None:
            return None
        layer_idx, buffer_idx = choice
        buffer = self.buffers[buffer_idx]
        buffer.parts.extend(self._parts_of(self._layers[layer_idx]))
        buffer.layer_idx, buffer.coming, buffer.num_left, buffer.given_up = None, layer_idx, len(buffer.parts), False
        return buffer

    def _parts_of(self, layer: StreamedLayer) -> Iterator[_Part]:
        yield from self._parts_of_blobs(layer.blob_idx, 1, layer.num_bytes, 0)
        if all(map(self.packed.is_checked, layer.experts)):  # in large parts, as they lie
            experts = ((layer.experts.start, len(layer.experts)),) if layer.experts else ()
        else:
            experts = tuple((blob_idx, 1) for blob_idx in layer.experts)
        for first, count in experts:
            place = layer.num_bytes + (first - layer.experts.start) * layer.expert_bytes
            yield from self._parts_of_blobs(first, count, layer.expert_bytes, place)

    def _parts_of_blobs(self, blob_idx: int, count: int, blob_bytes: int, place: int) -> Iterator[_Part]:
        """Of blobs that lie one after another, all of which have been compared, or of one."""
        size = count * blob_bytes
        if not self.packed.is_checked(blob_idx) or (count == 1 and size <= _PART_BYTES):
            yield _Part(blob_idx, 0, place, size, True)  # by one thread, because it compares the checksum
            return
        for start in range(0, size, _PART_BYTES):
            yield _Part(blob_idx, start, place + start, min(size - start, _PART_BYTES), False)

    def _fill(self, buffer: ReadBuffer, part: _Part) -> None:
        layer_idx, complete, failure = buffer.coming, False, None
        try:
            complete = self._read(layer_idx, buffer.array, part)
        except CheckpointError as error:
            failure = error
        except Exception as error:  # any error must reach the thread that waits in acquire
            failure = CheckpointError(f"{self.packed.path}: layer {layer_idx}: {error!r}")
        with self._changed:
            self._num_reading -= 1
            buffer.num_left -= 1
            if failure is not None:
                self._failures[layer_idx] = failure
            if not complete:
                buffer.given_up = True
                buffer.num_left -= len(buffer.parts)
                buffer.parts.clear()
            if not buffer.num_left:
                self._end(buffer)
            self._changed.notify_all()

    def _end(self, buffer: ReadBuffer) -> None:
        """No thread writes to it any more."""
        if not buffer.given_up:
            buffer.layer_idx = buffer.coming
            self.stats = replace(
                self.stats,
                num_reads=self.stats.num_reads + 1,
                bytes_read=self.stats.bytes_read + self.sizes[buffer.layer_idx],
            )
        buffer.coming = None

    def _read(self, layer_idx: int, array: NDArray[np.uint8], part: _Part) -> bool:
        def is_wanted() -> bool:
            with self._changed:
                if self._closed or self._forking:
                    return False
                return layer_idx in self._upcoming()[: len(self.buffers)]

        out = array[part.place : part.place + part.num_bytes]
        if part.whole:
            return self.packed.read_blob(part.blob_idx, out, is_wanted)
        if not is_wanted():
            return False
        self.packed.read_part(part.blob_idx, part.start, out)
        return True
