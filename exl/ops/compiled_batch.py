"""A batch's index arrays as kernels read them: at addresses that stay, for a recorded step, as the batches change."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import ForwardBatch
from exl.checkpoint.config import RopeConfig
from exl.cpu_kernels.attention_items import ITEM, ROW, decode_items, most_splits, prefill_items
from exl.layout.cpu_steps import FEW_ROWS
from exl.layout.steps import StepLimits
from exl.ops.rope import depends_on_length, inverse_frequencies

_NAMES = ("positions", "slots", "query_start", "context_len", "rope_len", "logit_rows")


class StagedBatch:
    """A batch, and its tables once they are needed: a recorded step has tables of its own."""

    def __init__(self, batch: ForwardBatch, ids: NDArray[np.int32], limits: StepLimits) -> None:
        """``ids``: the batch's tokens, all known."""
        self.batch, self.ids, self._limits = batch, ids, limits

    @cached_property
    def tables(self) -> BatchTables:
        return BatchTables(self.batch, self.ids, self._limits)

    @property
    def shape(self) -> tuple[int, ...]:
        """Batches of one shape run the same stages."""
        return self.batch.num_rows, self.batch.num_sequences, len(self.batch.logit_rows)


@dataclass
class Items:
    """Entries of a table i32 that kernels read: ``count`` now, of ``most`` that there is room for."""

    array: NDArray[np.int32]  # [most, numbers of an entry]
    count: int

    @property
    def most(self) -> int:
        return len(self.array)

    def fill(self, entries: NDArray[np.int32]) -> None:
        self.array[: len(entries)] = entries
        self.count = len(entries)


class BatchTables:
    """Arrays i32 of one batch: ``ids``, ``positions``, ``slots`` [T], ``query_start`` [B + 1], ``context_len`` and
    ``rope_len`` [B], ``page_table`` [B, pages of the longest context], ``logit_rows`` [R], ``row_sequences`` [T]."""

    def __init__(self, batch: ForwardBatch, ids: NDArray[np.int32], limits: StepLimits) -> None:
        """``ids``: the batch's tokens, all known."""
        self._limits = limits
        self.ids = np.array(ids, np.int32)
        self.positions, self.slots, self.query_start, self.context_len, self.rope_len, self.logit_rows = (
            np.array(getattr(batch, name), np.int32) for name in _NAMES
        )
        self.page_table = np.zeros((batch.num_sequences, limits.max_pages), np.int32)
        self.page_table[:, : batch.page_table.shape[1]] = batch.page_table
        self.row_sequences = self._row_sequences()
        many = np.flatnonzero(np.diff(self.query_start) > FEW_ROWS)
        self.num_few = int(many[0]) if len(many) else batch.num_sequences  # sequences, the first ones, with few rows
        self.angles: dict[Hashable, torch.Tensor] = {}
        self._frequencies: dict[tuple[RopeConfig, int], NDArray[np.float32]] = {}
        self._splits: dict[int | None, tuple[Items, Items]] = {}

    @property
    def num_rows(self) -> int:
        return len(self.ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_len)

    def _row_sequences(self) -> NDArray[np.int32]:
        rows = np.searchsorted(self.query_start, np.arange(self.num_rows), side="right") - 1
        return np.minimum(rows, self.num_sequences - 1).astype(np.int32)  # padding: any

    def fill(self, batch: ForwardBatch, ids: NDArray[np.int32]) -> None:
        """The values of another step of the same shape, in place, and all that was made from them."""
        self.ids[:] = ids
        for name in _NAMES:
            getattr(self, name)[:] = getattr(batch, name)
        self.row_sequences[:] = self._row_sequences()
        self.page_table[:, : batch.page_table.shape[1]] = batch.page_table
        for (rope, head_dim), values in self._frequencies.items():
            if depends_on_length(rope):
                values[...] = self._frequencies_now(rope, head_dim)
        for window, items in self._splits.items():
            self._fill_splits(window, items)

    # attention

    def splits(self, window: int | None) -> tuple[Items, Items]:
        """Pieces of attention of the sequences with few rows, and their rows: see ``attention_items.decode_items``."""
        if window not in self._splits:
            rows = self.num_rows if self.num_few == self.num_sequences else int(self.query_start[self.num_few])
            most = rows * most_splits(self._limits.max_context, window, FEW_ROWS)
            self._splits[window] = items = Items(_entries(most, ITEM), 0), Items(_entries(rows, ROW), 0)
            self._fill_splits(window, items)
        return self._splits[window]

    def _fill_splits(self, window: int | None, items: tuple[Items, Items]) -> None:
        few = self.num_few
        num_rows = self.num_rows if few == self.num_sequences else None
        tables = decode_items(self.query_start[: few + 1], self.context_len[:few], window, num_rows=num_rows)
        items[0].fill(tables.items)
        items[1].fill(tables.rows)

    def num_items(self, key: tuple[str, int | None]) -> int:
        """Of a table that ``splits`` has made: ``("splits", window)`` or ``("rows", window)``."""
        what, window = key
        return self._splits[window][0 if what == "splits" else 1].count

    def blocks(self, group: int, head_dim: int) -> NDArray[np.int32]:
        """Pieces of attention of the other sequences: see ``attention_items.prefill_items``."""
        few = self.num_few
        return prefill_items(self.query_start[few:], self.context_len[few:], group, head_dim, few)

    # RoPE

    def frequencies(self, rope: RopeConfig, head_dim: int) -> tuple[NDArray[np.float32], float]:
        """f32 [1 or B, half], in radians per token: one row for all, or for each sequence; and the factor of cos and
        sin."""
        key = rope, head_dim
        if key not in self._frequencies:
            self._frequencies[key] = self._frequencies_now(rope, head_dim)
        return self._frequencies[key], inverse_frequencies(rope, head_dim, int(self.rope_len[0]))[1]

    def _frequencies_now(self, rope: RopeConfig, head_dim: int) -> NDArray[np.float32]:
        lengths = self.rope_len if depends_on_length(rope) else (0,)
        return np.stack([inverse_frequencies(rope, head_dim, int(length))[0] for length in lengths])


def _entries(count: int, size: int) -> NDArray[np.int32]:
    return np.zeros((count, size), np.int32)
