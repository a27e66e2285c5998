"""A window's batches on their way to a GPU: checked on the host, then copied in one piece.

The device believes what it reads, so every id, slot and page is looked at here, before anything is launched.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import PAGE_SIZE, ForwardBatch
from exl.checkpoint.rope_config import RopeConfig
from exl.errors import KernelError
from exl.kernels.append_kv import check_slots
from exl.kernels.attention_decode import DecodeTables, check_tables, first_parts
from exl.kernels.attention_prefill import PrefillTables, check_pages
from exl.kernels.embed import check_ids
from exl.kernels.launch import Backend
from exl.layout.arena import TABLE_ALIGN, attention_items
from exl.layout.attention import num_items
from exl.layout.fields import align_up
from exl.layout.steps import StepLimits
from exl.memory.device import pinned, record_event
from exl.memory.host import HostBuffer
from exl.ops.rope_tables import fill_rope_tables, num_angles

_Item = TypeVar("_Item")
_MAX_SERIALS = 1024  # remembered; a forgotten one is never used again
_MAX_STEPS = 64  # shapes of steps whose tables' places are remembered
_FIRST_CONTEXT = 4096  # decode attention's grid is made for this many tokens, or four times as many, and so on


@dataclass(frozen=True)
class BatchShape:
    """All that decides where a batch's tables lie, and how its launches look."""

    num_rows: int
    num_decode_rows: int
    num_sequences: int
    num_decode_sequences: int
    max_new: int  # of a decode sequence: 1, 2, 4 or 8, or fewer
    max_chunk: int  # of a prefill sequence
    max_context: int  # upper bound of the lengths of decode sequences
    max_pages: int  # of a sequence: columns of the page table
    per_launch: int  # decode sequences that attention takes at a time
    logit_runs: tuple[tuple[int, int], ...]  # rows start:stop whose logits are wanted

    @property
    def is_decode(self) -> bool:
        return self.num_rows == self.num_decode_rows

    @classmethod
    def of(cls, batch: ForwardBatch, limits: StepLimits, most_items: int) -> BatchShape:
        """``most_items``: that one launch of decode attention has scratch for."""
        starts, lengths = batch.query_start.tolist(), batch.context_len.tolist()
        new = [stop - start for start, stop in itertools.pairwise(starts)]
        decode, room = bisect.bisect_right(starts, batch.num_decode_rows) - 1, limits.max_pages * PAGE_SIZE
        longest = max(lengths[:decode], default=1)
        return cls(
            num_rows=batch.num_rows,
            num_decode_rows=batch.num_decode_rows,
            num_sequences=batch.num_sequences,
            num_decode_sequences=decode,
            max_new=1 << (max((1, *new[:decode])) - 1).bit_length(),
            max_chunk=max(new[decode:], default=0),
            max_context=_context_bound(longest, room),
            max_pages=_context_bound(max(lengths, default=1), room) // PAGE_SIZE,
            per_launch=_per_launch(lengths[:decode], most_items),
            logit_runs=_runs(batch.logit_rows),
        )


@dataclass(frozen=True)
class DeviceBatch:
    """A staged batch: views of the tables on the device."""

    shape: BatchShape
    start: int  # its first row in the window
    serial: int  # equal ones have equal shapes, starts and places of their tables
    ids: torch.Tensor  # i32 [T]
    slots: torch.Tensor  # i32 [T]
    query_start: torch.Tensor  # i32 [B + 1]
    context_len: torch.Tensor  # i32 [B]
    first_part: torch.Tensor  # i32 [B]
    page_table: torch.Tensor  # i32 [B, max_pages]; what lies beyond a sequence's pages is left from earlier batches
    angles: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # of each RoPE: cos and sin, f32 [T, angles]
    window_slots: torch.Tensor | None = None  # as ``slots`` and ``page_table``, see ``ForwardBatch.places``
    window_table: torch.Tensor | None = None

    def places(self, windowed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """``slots`` and ``page_table`` of a layer."""
        return (self.window_slots, self.window_table) if windowed else (self.slots, self.page_table)

    def decode_tables(self, most_items: int, windowed: bool) -> Iterator[DecodeTables]:
        """Of each launch, whose sequences have no more than ``most_items`` items."""
        shape, T, (slots, page_table) = self.shape, self.shape.num_decode_rows, self.places(windowed)
        for start in range(0, shape.num_decode_sequences, shape.per_launch):
            stop = min(start + shape.per_launch, shape.num_decode_sequences)
            mine = (x[start:stop] for x in (self.context_len, page_table))
            yield DecodeTables(
                *(self.query_start[start : stop + 1], *mine, slots[:T], self.first_part[start:stop]),
                most_items=most_items,
                max_context=shape.max_context,
                max_new=shape.max_new,
            )

    def prefill_tables(self, windowed: bool) -> PrefillTables:
        B, (_, page_table) = self.shape.num_decode_sequences, self.places(windowed)
        return PrefillTables(self.query_start[B:], self.context_len[B:], page_table[B:], max_new=self.shape.max_chunk)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


class Upload:
    """Bytes on their way to one place on the device; two buffers on the host, one filled while the other is copied."""

    def __init__(self, backend: Backend, target: torch.Tensor, purpose: str, stack: ExitStack) -> None:
        """``target``: contiguous. Page-locked buffers are given back when ``stack`` closes."""
        self._backend, self._target = backend, target.view(torch.uint8)
        self._buffers = [HostBuffer(self._target.numel(), purpose) for _ in range(2)]
        if target.is_cuda:
            for buffer in self._buffers:
                stack.enter_context(pinned(buffer, target.device))
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0  # of the buffer that was filled last

    def buffer(self) -> NDArray[np.uint8]:
        """The buffer to fill next: no copy reads it any more."""
        self.turn = 1 - self.turn
        event = self._copied[self.turn]
        if event is not None:
            event.synchronize()  # of the pass before the last one: long done
        return self._buffers[self.turn].array

    def send(self, num_bytes: int) -> None:
        """Queues the copy of the buffer's beginning."""
        source = torch.from_numpy(self._buffers[self.turn].array[:num_bytes])
        self._backend.call(_copy, source, self._target[:num_bytes])
        if self._target.is_cuda:
            self._copied[self.turn] = record_event(torch.cuda.current_stream(self._target.device))


@dataclass(frozen=True)
class _HostTables:
    """A batch's tables in a buffer of the host: views, in the order of ``_sizes``."""

    ids: NDArray[np.int32]
    slots: NDArray[np.int32]
    query_start: NDArray[np.int32]
    context_len: NDArray[np.int32]
    first_part: NDArray[np.int32]
    page_table: NDArray[np.int32]
    angles: tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]
    window_slots: NDArray[np.int32] | None = None
    window_table: NDArray[np.int32] | None = None

    def fill(self, batch: ForwardBatch, per_launch: int) -> None:
        """All but the angles."""
        self.ids[:] = batch.token_ids
        self.slots[:] = batch.slots
        self.query_start[:] = batch.query_start
        self.context_len[:] = batch.context_len
        self.first_part[:] = first_parts(batch.context_len, per_launch)
        _fill_table(self.page_table, batch.page_table)
        if self.window_slots is not None and self.window_table is not None:
            slots, table = batch.places(windowed=True)
            self.window_slots[:] = slots
            _fill_table(self.window_table, table)


def _fill_table(table: NDArray[np.int32], pages: NDArray[np.int32]) -> None:
    width = min(table.shape[1], pages.shape[1])
    table[:, :width] = pages[:, :width]


class Staging:
    """Tables of a window's batches."""

    def __init__(
        self,
        backend: Backend,
        tables: torch.Tensor,
        limits: StepLimits,
        ropes: Sequence[RopeConfig],
        num_pages: int,
        stack: ExitStack,
        num_window_pages: int = 0,
    ) -> None:
        """``tables`` i32, a view of the arena. ``ropes``: each has angles of its own. ``num_pages``: of the cache.
        ``num_window_pages``: of its other slab, if layers that have a window have pages of their own."""
        self._tables, self._limits, self._ropes, self._num_pages = tables, limits, tuple(ropes), num_pages
        self._num_window_pages = num_window_pages
        self.most_items = attention_items(limits)  # of a launch of decode attention
        self._upload = Upload(backend, tables, "tables of a window", stack)
        self._steps: dict[tuple[BatchShape, int], tuple[DeviceBatch, _HostTables, int]] = {}
        self._serials: dict[tuple[BatchShape | int, ...], int] = {}
        self._next_serial = itertools.count()

    def check(self, batches: Sequence[ForwardBatch], num_samples: int) -> list[BatchShape]:
        """Raises ``KernelError`` that names what is wrong."""
        shapes = []
        for batch in batches:
            shapes.append(BatchShape.of(batch, self._limits, self.most_items))
            self._check(batch, shapes[-1], num_samples)
        return shapes

    def fill(self, batches: Sequence[ForwardBatch], shapes: Sequence[BatchShape]) -> list[DeviceBatch]:
        """Queues the copy of batches that were checked, with the shapes that ``check`` returned."""
        words, at, start, found = self._upload.buffer().view(np.int32), 0, 0, []
        for batch, shape in zip(batches, shapes, strict=True):
            staged, host, at = self._places(words, shape, start, at)
            host.fill(batch, shape.per_launch)
            found.append(staged)
            for rope, angles in zip(self._ropes, host.angles, strict=True):
                fill_rope_tables(batch, rope, self._limits.head_dim, *map(torch.from_numpy, angles))
            start += shape.num_rows
        self._upload.send(4 * at)
        return found

    def with_logits(self, batch: DeviceBatch, rows: NDArray[np.int32]) -> DeviceBatch:
        """The same tables, for the logits of other rows."""
        shape = replace(batch.shape, logit_runs=_runs(rows))
        # The last two numbers are no place of tables: -1 is none, and the batch's serial stands for its place.
        return replace(batch, shape=shape, serial=self._serial(shape, batch.start, -1, batch.serial))

    def _check(self, batch: ForwardBatch, shape: BatchShape, num_samples: int) -> None:
        limits, B = self._limits, shape.num_decode_sequences
        if batch.num_rows > limits.max_rows or shape.num_decode_sequences > limits.max_sequences:
            raise KernelError(
                f"batch of {batch.num_rows} rows, {B} sequences that decode: expected {limits.max_rows} rows and "
                f"{limits.max_sequences} sequences, or fewer"
            )
        first, last = int(batch.query_start[0]), int(batch.query_start[-1])
        if first != 0 or last > batch.num_rows:
            raise KernelError(f"sequences own rows {first} to {last}: expected 0 to {batch.num_rows} or fewer")
        if batch.num_sequences > B and int(batch.query_start[B]) != batch.num_decode_rows:
            raise KernelError(f"{batch.num_decode_rows} decode rows: expected whole sequences, they end inside of one")
        check_ids(batch.token_ids, limits.vocab_size, num_samples)
        self._check_places(batch, B, False, self._num_pages)
        if self._num_window_pages:
            self._check_places(batch, B, True, self._num_window_pages)

    def _check_places(self, batch: ForwardBatch, B: int, windowed: bool, num_pages: int) -> None:
        """``B``: sequences that decode."""
        slots, table = batch.places(windowed)
        if table.shape[1] > self._limits.max_pages:
            raise KernelError(f"{table.shape[1]} pages of a sequence: expected {self._limits.max_pages} or fewer")
        check_slots(slots[batch.num_decode_rows :], num_pages)  # check_tables knows the others
        first, lengths = batch.query_start, batch.context_len
        check_tables(first[: B + 1], lengths[:B], table[:B], slots, num_pages)
        check_pages(first[B:], lengths[B:], table[B:], num_pages)

    def _places(
        self, words: NDArray[np.int32], shape: BatchShape, start: int, at: int
    ) -> tuple[DeviceBatch, _HostTables, int]:
        """Where a batch's tables lie on the device and in ``words``, the buffer to fill, if they begin at word ``at``;
        and the word after them. Raises ``KernelError`` if there is no room."""
        step = shape, self._upload.turn
        if at == 0 and step in self._steps:
            return self._steps[step]
        serial, ours, theirs = self._serial(shape, start, at), [], []
        for size in self._sizes(shape):
            stop = at + math.prod(size)
            if stop > len(words):
                raise KernelError(f"tables of a window: expected {len(words)} words or fewer")
            ours.append(words[at:stop].reshape(size))
            theirs.append(self._tables[at:stop].view(size))
            at = align_up(stop, TABLE_ALIGN)
        own = -2 * len(self._ropes)
        host = _HostTables(*ours[:6], _pairs([x.view(np.float32) for x in ours[own:]]), *ours[6:own])
        angles = _pairs([x.view(torch.float32) for x in theirs[own:]])
        found = DeviceBatch(shape, start, serial, *theirs[:6], angles, *theirs[6:own]), host, at
        if start == 0 and shape.is_decode:  # a decode step's come again
            if len(self._steps) >= _MAX_STEPS:
                self._steps.clear()
            self._steps[step] = found
        return found

    def _sizes(self, shape: BatchShape) -> list[tuple[int, ...]]:
        T, B = shape.num_rows, shape.num_sequences
        halves = [num_angles(rope, self._limits.head_dim) for rope in self._ropes for _ in ("cos", "sin")]
        windows = [(T,), (B, shape.max_pages)] if self._num_window_pages else []
        tables = [(T,), (T,), (B + 1,), (B,), (B,), (B, shape.max_pages), *windows]
        return [*tables, *((T, half) for half in halves)]

    def _serial(self, *where: BatchShape | int) -> int:
        """Of a batch of a shape, from a row of the window and a word of the tables on."""
        if where not in self._serials:
            if len(self._serials) >= _MAX_SERIALS:
                self._serials.clear()
            self._serials[where] = next(self._next_serial)
        return self._serials[where]


def _pairs(items: list[_Item]) -> tuple[tuple[_Item, _Item], ...]:
    """Neighbours: ``_pairs([1, 2, 3, 4]) == ((1, 2), (3, 4))``."""
    return tuple(zip(items[::2], items[1::2], strict=True))


def _context_bound(length: int, most: int) -> int:
    """One grid, and one graph, for many lengths: ``_context_bound(5000, 20000) == 16384``."""
    bound = _FIRST_CONTEXT
    while bound < length:
        bound *= 4
    return min(bound, most)


def _per_launch(lengths: Sequence[int], most_items: int) -> int:
    """Sequences that decode attention takes at a time: all, or a half, a quarter, ... of them, where those that share
    pages have more items together than there is scratch for."""
    items, size = [num_items(length) for length in lengths], max(1, len(lengths))
    while size > 1 and any(sum(items[i : i + size]) > most_items for i in range(0, len(items), size)):
        size = -(-size // 2)
    return size


def _runs(rows: NDArray[np.int32]) -> tuple[tuple[int, int], ...]:
    """Rows in a row: ``_runs([0, 1, 2, 7]) == ((0, 3), (7, 8))``."""
    if not len(rows):
        return ()
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return tuple((int(rows[a]), int(rows[b - 1]) + 1) for a, b in itertools.pairwise(cuts))
