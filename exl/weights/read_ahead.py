"""Reads a checkpoint ahead of what is packed: layers whole, large tables piece by piece, in one stream of reads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import shown
from exl.checkpoint.page_reader import PAGE, PageReader
from exl.layout.fields import align_up
from exl.memory.host import HostBuffer
from exl.models.packing_order import PackingOrder, TensorPart
from exl.planning.cpu import read_ahead_bytes
from exl.threads import thread_limit

_STEP_BYTES = 4 << 20  # bytes per read; between two reads, checks whether it was stopped
_THREADS = 4  # reads at once, so that a disk has the next request before it has done one


@dataclass(frozen=True)
class _Piece:
    """Bytes ``start:stop`` of a file, which are a tensor, or some of its rows, ``within`` bytes from its beginning."""

    name: str
    file: str
    start: int
    stop: int
    within: int = 0


@dataclass(frozen=True)
class _Extent:
    """Pieces that lie in the same or in neighbouring pages of a file, and where in a buffer their first page comes."""

    pieces: tuple[_Piece, ...]
    place: int

    @property
    def start(self) -> int:
        return self.pieces[0].start // PAGE * PAGE

    @property
    def stop(self) -> int:
        return max(piece.stop for piece in self.pieces)

    @property
    def end(self) -> int:
        """Where in the buffer the next one may begin."""
        return self.place + align_up(self.stop - self.start, PAGE)


class ReadAhead:
    """The tensors of a checkpoint that are packed, read in that order; a context manager that ends its threads.

    Items are layers, experts, and pieces of tables. They lie one after another in a ring, each until a later one is
    taken. Memory: ``read_ahead_bytes``.
    """

    def __init__(self, checkpoint: Checkpoint, before: str | None, order: PackingOrder, after: str | None) -> None:
        """``before``, ``after``: tables that are copied as they are, before and after the layers; experts come last."""
        self._checkpoint, self._file_bytes = checkpoint, checkpoint.files
        self._items: list[list[_Extent]] = []
        self._tables: dict[str, range] = {}  # which items are pieces of it
        self._add_table(before)
        self._first_layer = len(self._items)
        self._items += [_extents([_piece(checkpoint, part) for part in parts]) for parts in order.layers]
        self._add_table(after)
        self._first_expert = len(self._items)
        self._items += [_extents([_piece(checkpoint, part) for part in parts]) for parts in order.experts]
        layers = self._items[self._first_layer :][: len(order.layers)]
        layer_bytes = max(map(_num_bytes, (*layers, *self._items[self._first_expert :])), default=0)
        table_bytes = max((checkpoint.info(name).num_bytes for name in self._tables), default=0)
        self._buffer = HostBuffer(read_ahead_bytes(layer_bytes, table_bytes), "read buffer of layers")
        self._jobs: dict[int, list[Future[None]]] = {}
        self._places: dict[int, int] = {}  # in the ring, of items that are there
        self._next = 0  # the item to be read next
        self._stopped = threading.Event()
        self._reader = PageReader(checkpoint)
        self._executor = ThreadPoolExecutor(_THREADS, "exl checkpoint reader")
        self._admit()

    def _add_table(self, name: str | None) -> None:
        if name is None or name in self._tables:
            return
        whole, step, first = _whole(self._checkpoint, name), _STEP_BYTES - PAGE, len(self._items)
        for start in range(whole.start, whole.stop, step):
            self._items.append(_extents([_Piece(name, whole.file, start, min(whole.stop, start + step))]))
        self._tables[name] = range(first, len(self._items))

    def layer(self, layer_idx: int) -> Checkpoint:
        """The checkpoint with this layer's tensors in memory, without its experts', until a later one is asked for.
        Raises the error that reading them raised."""
        return self._in_memory(self._first_layer + layer_idx)

    def expert(self, number: int) -> Checkpoint:
        """The same of an expert: of parts of tensors, where a tensor has those of all."""
        return self._in_memory(self._first_expert + number)

    def _in_memory(self, item: int) -> Checkpoint:
        arrays = self._take(item)
        within = {piece.name: piece.within for extent in self._items[item] for piece in extent.pieces}
        return _CheckpointInMemory(self._checkpoint, arrays, within)

    def tables(self) -> Checkpoint:
        """The checkpoint, whose tables ``read_into`` copies as they come: ``before`` ahead of the first layer,
        ``after`` behind the last."""
        return _CheckpointOfTables(self._checkpoint, self._tables, self._take)

    def _take(self, item: int, oldest: int | None = None) -> dict[str, NDArray[np.uint8]]:
        """The bytes of an item, by name; those of items before ``oldest`` (default: this one) are overwritten from now
        on."""
        for earlier in [i for i in self._places if i < (item if oldest is None else oldest)]:
            del self._places[earlier]
            wait(self._jobs.pop(earlier))  # if nobody has asked for it
        self._next = max(self._next, item)
        self._admit()
        for job in self._jobs[item]:
            job.result()
        found = {}
        for extent in self._items[item]:
            for piece in extent.pieces:
                first = self._places[item] + extent.place + piece.start - extent.start
                found[piece.name] = self._buffer.array[first : first + piece.stop - piece.start]
        return found

    def _admit(self) -> None:
        """Queues the reads of the next items, as many as have room."""
        while self._next < len(self._items):
            item, extents = self._next, self._items[self._next]
            place = self._room(_num_bytes(extents))
            if place is None:
                return
            self._places[item], self._next = place, item + 1
            room = memoryview(self._buffer.array)[place:]
            self._jobs[item] = [
                self._executor.submit(self._read, extent, start, room[extent.place + start - extent.start :])
                for extent in extents
                for start in range(extent.start, extent.stop, _STEP_BYTES)
            ]

    def _room(self, num_bytes: int) -> int | None:
        """Where the next item goes, behind the last one or at the ring's start; None: when others have left."""
        if not self._places:
            return 0
        first, last = min(self._places), max(self._places)
        begin, end = self._places[first], self._places[last] + _num_bytes(self._items[last])
        if end <= begin:  # the last one is ahead of the first
            return end if end + num_bytes <= begin else None
        if end + num_bytes <= self._buffer.num_bytes:
            return end
        return 0 if num_bytes <= begin else None

    def _read(self, extent: _Extent, start: int, place: memoryview) -> None:
        if not self._stopped.is_set():
            piece = next(piece for piece in extent.pieces if piece.stop > start)
            pages = min(align_up(extent.stop, PAGE), self._file_bytes[piece.file])  # whole, except at the end
            stop = min(pages, start + _STEP_BYTES)
            self._reader.read_into(piece.file, place[: stop - start], start, f"tensor {shown(piece.name)}")

    def close(self) -> None:
        self._stopped.set()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._reader.close()
        self._buffer.close()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _CheckpointInMemory(Checkpoint):
    """A checkpoint of which some tensors, or parts of them, are in memory. Arrays are views, not copies."""

    def __init__(self, checkpoint: Checkpoint, tensors: dict[str, NDArray[np.uint8]], within: dict[str, int]) -> None:
        """``within``: the byte of its tensor at which each of ``tensors`` begins."""
        super().__init__(checkpoint.path, checkpoint.folder, checkpoint._files, checkpoint.tensors)
        self._in_memory, self._within = tensors, within

    def _find(self, name: str, start_byte: int, num_bytes: int) -> NDArray[np.uint8] | None:
        raw = self._in_memory.get(name)
        if raw is None:
            return None
        first = start_byte - self._within[name]
        return raw[first : first + num_bytes] if first >= 0 and first + num_bytes <= len(raw) else None

    def read_bytes(self, name: str, start_byte: int, num_bytes: int) -> NDArray[np.uint8]:
        raw = self._find(name, start_byte, num_bytes)
        return super().read_bytes(name, start_byte, num_bytes) if raw is None else raw

    def read_into(self, name: str, buffer: Any, start_byte: int = 0) -> None:
        view = np.frombuffer(buffer, np.uint8)
        raw = self._find(name, start_byte, len(view))
        if raw is None:
            super().read_into(name, buffer, start_byte)
        else:
            view[:] = raw


class _CheckpointOfTables(Checkpoint):
    """A checkpoint of which whole tables are read as their pieces come, once; after that from the file."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tables: dict[str, range],
        take: Callable[[int, int], dict[str, NDArray[np.uint8]]],
    ) -> None:
        super().__init__(checkpoint.path, checkpoint.folder, checkpoint._files, checkpoint.tensors)
        self._tables, self._take = tables, take

    def read_into(self, name: str, buffer: Any, start_byte: int = 0) -> None:
        view = np.frombuffer(buffer, np.uint8)
        if name not in self._tables or len(view) != self.info(name).num_bytes:
            super().read_into(name, buffer, start_byte)
            return
        copies: deque[Future[None]] = deque()
        num_threads = thread_limit()  # memory that is touched for the first time costs more than the copy
        with ThreadPoolExecutor(num_threads, "exl copies tables") as executor:
            for item in self._tables.pop(name):
                if len(copies) == num_threads:
                    copies.popleft().result()
                piece = self._take(item, item - len(copies))[name]
                copies.append(executor.submit(np.copyto, view[: len(piece)], piece))
                view = view[len(piece) :]


def _piece(checkpoint: Checkpoint, part: TensorPart) -> _Piece:
    info = checkpoint.info(part.name)
    return _Piece(part.name, info.file, info.start + part.start, info.start + part.stop, part.start)


def _whole(checkpoint: Checkpoint, name: str) -> _Piece:
    info = checkpoint.info(name)
    return _Piece(name, info.file, info.start, info.stop)


def _num_bytes(extents: Sequence[_Extent]) -> int:
    """Of an item in the ring."""
    return extents[-1].end if extents else 0


def _extents(pieces: Sequence[_Piece]) -> list[_Extent]:
    """Pieces in the order in which they lie in the files, those together that are at most a page apart."""
    found: list[_Extent] = []
    for piece in sorted(pieces, key=lambda piece: (piece.file, piece.start)):
        last = found[-1] if found else None
        if last is not None and piece.file == last.pieces[0].file and piece.start <= last.stop + PAGE:
            found[-1] = _Extent((*last.pieces, piece), last.place)
        else:
            found.append(_Extent((piece,), 0 if last is None else last.end))
    return found
