"""A window's batches on their way to a GPU: checked on the host, then copied in one piece.

The device believes what it reads, so every id, slot and page is looked at here, before anything is launched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import PAGE_SIZE, ForwardBatch
from exl.checkpoint.config import RopeConfig
from exl.errors import KernelError
from exl.kernels.append_kv import check_slots
from exl.kernels.attention_decode import DecodeTables, check_tables
from exl.kernels.attention_prefill import PrefillTables, check_pages
from exl.kernels.embed import check_ids
from exl.kernels.launch import Backend
from exl.layout.arena import TABLE_ALIGN
from exl.layout.fields import align_up
from exl.layout.steps import StepLimits
from exl.memory.device import pinned, record_event
from exl.memory.host import HostBuffer
from exl.ops.rope_tables import num_angles, rope_tables

_MAX_SERIALS = 1024  # remembered; a forgotten one is never used again
_FIRST_CONTEXT = 4096  # decode attention's grid is made for this many tokens, or four times as many, and so on


@dataclass(frozen=True)
class BatchShape:
    """All that decides where a batch's tables lie, and how its launches look."""

    num_rows: int
    num_decode_rows: int
    num_sequences: int
    num_decode_sequences: int
    max_new: int  # of a decode sequence
    max_chunk: int  # of a prefill sequence
    max_context: int  # upper bound of the lengths of decode sequences
    logit_runs: tuple[tuple[int, int], ...]  # rows start:stop whose logits are wanted

    @property
    def is_decode(self) -> bool:
        return self.num_rows == self.num_decode_rows

    @classmethod
    def of(cls, batch: ForwardBatch, limits: StepLimits) -> BatchShape:
        new = np.diff(batch.query_start)
        decode = int(np.searchsorted(batch.query_start[1:], batch.num_decode_rows, side="right"))
        longest = int(batch.context_len[:decode].max(initial=1))
        return cls(
            num_rows=batch.num_rows,
            num_decode_rows=batch.num_decode_rows,
            num_sequences=batch.num_sequences,
            num_decode_sequences=decode,
            max_new=int(new[:decode].max(initial=1)),
            max_chunk=int(new[decode:].max(initial=0)),
            max_context=_context_bound(longest, limits.max_pages * PAGE_SIZE),
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
    page_table: torch.Tensor  # i32 [B, pages of the longest context]
    cosine: torch.Tensor  # f32 [T, angles]
    sine: torch.Tensor

    @property
    def decode_tables(self) -> DecodeTables:
        shape, B, T = self.shape, self.shape.num_decode_sequences, self.shape.num_decode_rows
        return DecodeTables(
            *(self.query_start[: B + 1], self.context_len[:B], self.page_table[:B], self.slots[:T]),
            max_context=shape.max_context,
            max_new=shape.max_new,
        )

    @property
    def prefill_tables(self) -> PrefillTables:
        B = self.shape.num_decode_sequences
        return PrefillTables(
            self.query_start[B:], self.context_len[B:], self.page_table[B:], max_new=self.shape.max_chunk
        )


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
        self._turn = 0

    def buffer(self) -> NDArray[np.uint8]:
        """The buffer to fill next: no copy reads it any more."""
        self._turn = 1 - self._turn
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()  # of the pass before the last one: long done
        return self._buffers[self._turn].array

    def send(self, num_bytes: int) -> None:
        """Queues the copy of the buffer's beginning."""
        source = torch.from_numpy(self._buffers[self._turn].array[:num_bytes])
        self._backend.call(_copy, source, self._target[:num_bytes])
        if self._target.is_cuda:
            self._copied[self._turn] = record_event(torch.cuda.current_stream(self._target.device))


class Staging:
    """Tables of a window's batches."""

    def __init__(
        self,
        backend: Backend,
        tables: torch.Tensor,
        limits: StepLimits,
        rope: RopeConfig,
        num_pages: int,
        stack: ExitStack,
    ) -> None:
        """``tables`` i32, a view of the arena. ``num_pages``: of the cache."""
        self._tables, self._limits, self._rope, self._num_pages = tables, limits, rope, num_pages
        self._upload = Upload(backend, tables, "tables of a window", stack)
        self._views: dict[BatchShape, DeviceBatch] = {}
        self._serials: dict[tuple[BatchShape, int, int], int] = {}
        self._next_serial = itertools.count()

    def check(self, batches: Sequence[ForwardBatch], num_samples: int) -> list[BatchShape]:
        """Raises ``KernelError`` that names what is wrong."""
        shapes = [BatchShape.of(batch, self._limits) for batch in batches]
        for batch, shape in zip(batches, shapes, strict=True):
            self._check(batch, shape, num_samples)
        return shapes

    def fill(self, batches: Sequence[ForwardBatch], shapes: Sequence[BatchShape]) -> list[DeviceBatch]:
        """Queues the copy of batches that were checked, with the shapes that ``check`` returned."""
        words, at = self._upload.buffer().view(np.int32), 0
        for batch in batches:
            for array in self._arrays(batch):
                flat = np.ascontiguousarray(array).reshape(-1).view(np.int32)
                if at + flat.size > words.size:
                    raise KernelError(f"tables of {len(batches)} batches: expected {words.size} words or fewer")
                words[at : at + flat.size] = flat
                at = align_up(at + flat.size, TABLE_ALIGN)
        self._upload.send(4 * at)
        return self._views_of(shapes)

    def _check(self, batch: ForwardBatch, shape: BatchShape, num_samples: int) -> None:
        limits, B = self._limits, shape.num_decode_sequences
        if batch.num_rows > limits.max_rows or shape.num_decode_sequences > limits.max_sequences:
            raise KernelError(
                f"batch of {batch.num_rows} rows, {B} sequences that decode: expected {limits.max_rows} rows and "
                f"{limits.max_sequences} sequences, or fewer"
            )
        if batch.num_sequences > B and int(batch.query_start[B]) != batch.num_decode_rows:
            raise KernelError(f"{batch.num_decode_rows} decode rows: expected whole sequences, they end inside of one")
        if batch.page_table.shape[1] > limits.max_pages:
            raise KernelError(f"{batch.page_table.shape[1]} pages of a sequence: expected {limits.max_pages} or fewer")
        check_ids(batch.token_ids, limits.vocab_size, num_samples)
        check_slots(batch.slots, self._num_pages)
        first, lengths, table = batch.query_start, batch.context_len, batch.page_table
        check_tables(first[: B + 1], lengths[:B], table[:B], batch.slots, self._num_pages)
        check_pages(first[B:], lengths[B:], table[B:], self._num_pages)

    def _arrays(self, batch: ForwardBatch) -> list[np.ndarray]:
        """In the order of ``_sizes``."""
        table = np.zeros((batch.num_sequences, self._limits.max_pages), np.int32)
        table[:, : batch.page_table.shape[1]] = batch.page_table
        cosine, sine = rope_tables(batch, self._rope, self._limits.head_dim)
        own = [batch.token_ids, batch.slots, batch.query_start, batch.context_len, table]
        return [*own, cosine.numpy(), sine.numpy()]

    def _sizes(self, shape: BatchShape) -> list[tuple[int, ...]]:
        T, B = shape.num_rows, shape.num_sequences
        half = num_angles(self._rope, self._limits.head_dim)
        return [(T,), (T,), (B + 1,), (B,), (B, self._limits.max_pages), (T, half), (T, half)]

    def _views_of(self, shapes: Sequence[BatchShape]) -> list[DeviceBatch]:
        if len(shapes) == 1 and shapes[0] in self._views:
            return [self._views[shapes[0]]]
        at, start, found = 0, 0, []
        for shape in shapes:
            serial, tensors = self._serial(shape, start, at), []
            for size in self._sizes(shape):
                num_words = math.prod(size)
                tensors.append(self._tables[at : at + num_words].view(size))
                at = align_up(at + num_words, TABLE_ALIGN)
            angles = [tensor.view(torch.float32) for tensor in tensors[5:]]
            found.append(DeviceBatch(shape, start, serial, *tensors[:5], *angles))
            start += shape.num_rows
        if len(shapes) == 1 and shapes[0].is_decode:
            self._views[shapes[0]] = found[0]  # a decode step's come again
        return found

    def _serial(self, *where: BatchShape | int) -> int:
        """Of a batch of a shape, from a row of the window and a word of the tables on."""
        if where not in self._serials:
            if len(self._serials) >= _MAX_SERIALS:
                self._serials.clear()
            self._serials[where] = next(self._next_serial)
        return self._serials[where]


def _context_bound(length: int, most: int) -> int:
    """One grid, and one graph, for many lengths: ``_context_bound(5000, 20000) == 16384``."""
    bound = _FIRST_CONTEXT
    while bound < length:
        bound *= 4
    return min(bound, most)


def _runs(rows: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Rows in a row: ``_runs([0, 1, 2, 7]) == ((0, 3), (7, 8))``."""
    if not len(rows):
        return ()
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(rows, cuts))
