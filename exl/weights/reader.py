"""A thread that reads layers from the packed file into buffers, ahead of their turn, and owns both."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exl import forks
from exl.errors import CheckpointError, ExlError
from exl.weights.packed import PackedFile

_CLOSE_SECONDS = 10.0  # how long ``close`` waits for a read to return
_FORK_SECONDS = 5.0  # how long a fork of the process waits for that


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
    """The buffers, the packed file, and the thread that fills the first from the second. The only owner of both: the
    thread that writes to a buffer is also the one that gives the memory back, when it ends, so that a read that hangs
    never finds its buffer unmapped or its file closed. Has no reference to the stream that uses it, so as not to keep
    it alive.

    The next layer to read depends only on the order, the position in it and the buffers' contents: the buffers should
    hold the next layers in order. So a new order needs no special case: layers it can use stay, others are overwritten.

    When the process forks, reading pauses: a direct read into memory that is being forked could end in the other
    process's copy (open(2), NOTES). The child starts a thread of its own when it first needs one.
    """

    def __init__(
        self,
        packed: PackedFile,
        blob_indices: Mapping[int, int],
        sizes: Mapping[int, int],
        arrays: Sequence[NDArray[np.uint8]],
        owned: ExitStack,
    ) -> None:
        """``blob_indices``: streamed layer -> its blob in ``packed``; ``sizes``: layer -> its bytes. ``arrays``: the
        buffers, u8, page-aligned, each with room for the largest layer. ``owned`` closes the file and the buffers'
        memory; it is emptied, because from here on the reader closes them. If this raises, the caller still does."""
        if not arrays or any(len(array) < max(sizes.values()) for array in arrays):
            raise ValueError(f"buffers of {[len(array) for array in arrays]} bytes for layers of {dict(sizes)}")
        self.packed, self.sizes, self.stats = packed, sizes, StreamStats()
        self.buffers = [ReadBuffer(array) for array in arrays]
        self._blob_indices = blob_indices
        self._order: tuple[int, ...] = ()
        self._next = 0  # position in the order of the layer to be acquired next
        self._failure: tuple[int, CheckpointError] | None = None
        self._closed = False
        self._reading = False
        self._forking = False
        self._changed = threading.Condition()
        self._owned = ExitStack()
        self._thread: threading.Thread | None = None  # None: a forked process that has not read yet
        self._start_thread()
        self._owned = owned.pop_all()
        forks.register(self)

    def _start_thread(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="exl layer reader", daemon=True)
            self._thread.start()

    # Called by the consumer

    def begin(self, order: tuple[int, ...]) -> None:
        with self._changed:
            for buffer in self.buffers:
                buffer.num_users = 0  # an interrupted pass may have left users
            self._failure = None
            self._order, self._next = order, 0
            self._start_thread()
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
            if self._thread is None or not self._thread.is_alive():
                raise ExlError("the thread that reads layers has ended")
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
        """Ends the thread, which gives back the buffers and the file as it ends. Returns False if it has not ended
        within 10 s: it hangs in a read and may still write to its buffer, so both stay until that read returns. May be
        called again, and from any thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is None:  # forked: nobody else closes what this process has
            self._owned.close()
            return True
        if self._thread is threading.current_thread():  # garbage was collected during a read
            return False
        self._thread.join(_CLOSE_SECONDS)
        return not self._thread.is_alive()

    # Called by the thread that forks the process

    def before_fork(self) -> None:
        """Keeps the lock until ``after_fork``, so that the child finds everything in order."""
        self._changed.acquire()
        self._forking = True
        self._changed.wait_for(lambda: not self._reading, _FORK_SECONDS)

    def after_fork(self, in_child: bool) -> None:
        self._forking = False
        if in_child:  # what a read that hangs has written so far is not counted as a layer
            self._changed, self._thread, self._reading = threading.Condition(), None, False
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
        layer_idx, ahead = self.buffers[buffer_idx].layer_idx, self._upcoming()
        return ahead.index(layer_idx) if layer_idx in ahead else len(ahead)

    # Runs in the reader thread

    def _run(self) -> None:
        try:
            self._fill_buffers()
        finally:
            self._owned.close()

    def _fill_buffers(self) -> None:
        while True:
            with self._changed:
                self._reading = False
                self._changed.notify_all()
                choice = None
                while choice is None:
                    if self._closed:
                        return
                    choice = self._choose() if self._failure is None and not self._forking else None
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
                        bytes_read=self.stats.bytes_read + self.sizes[layer_idx],
                    )

    def _read(self, layer_idx: int, buffer_idx: int) -> bool:
        def is_wanted() -> bool:
            with self._changed:
                if self._closed or self._forking:
                    return False
                return layer_idx in self._upcoming()[: len(self.buffers)]

        out = self.buffers[buffer_idx].array[: self.sizes[layer_idx]]
        return self.packed.read_blob(self._blob_indices[layer_idx], out, is_wanted)
