"""A batch's index arrays as kernels read them: at addresses that stay, for a recorded step, as the batches change."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import ForwardBatch
from exl.checkpoint.rope_config import RopeConfig
from exl.cpu_kernels.attention_items import ITEM, ROW, DecodeTables, decode_items, most_splits, prefill_items
from exl.layout.cpu_steps import FEW_ROWS, scratch_partials
from exl.layout.steps import StepLimits
from exl.ops.rope import depends_on_length, inverse_frequencies, query_scales

_NAMES = ("positions", "query_start", "context_len", "rope_len", "logit_rows")


class StagedBatch:
    """A batch, and its tables once they are needed: a recorded step has tables of its own."""

    def __init__(self, batch: ForwardBatch, ids: NDArray[np.int32], limits: StepLimits) -> None:
        """``ids``: the batch's tokens, all known."""
        self.batch, self.ids, self.limits = batch, ids, limits
        self._pieces: dict[int | None, DecodeTables] = {}

    @cached_property
    def tables(self) -> BatchTables:
        return BatchTables(self)

    @property
    def shape(self) -> tuple[Hashable, ...]:
        """Batches of one shape run the same stages, but for how their sequences attend."""
        counts = self.batch.num_rows, self.batch.num_sequences, len(self.batch.logit_rows)
        return counts if self.batch.lora_idx is None else (*counts, *self.batch.lora_runs)

    @cached_property
    def num_few(self) -> int:
        """Sequences, the first ones, that have few rows."""
        if self.batch.num_rows <= FEW_ROWS:
            return self.batch.num_sequences
        many = np.flatnonzero(np.diff(self.batch.query_start) > FEW_ROWS)
        return int(many[0]) if len(many) else self.batch.num_sequences

    def pieces(self, window: int | None) -> DecodeTables:
        """Of attention of the sequences with few rows."""
        if window not in self._pieces:
            self._pieces[window] = self.some_pieces(window, 0, self.num_few)
        return self._pieces[window]

    def some_pieces(self, window: int | None, first: int, last: int) -> DecodeTables:
        """Those of sequences ``first`` to ``last - 1``. Rows of no sequence are with the last one."""
        batch = self.batch
        num_rows = batch.num_rows if last == batch.num_sequences else None
        starts, lengths = batch.query_start[first : last + 1], batch.context_len[first:last]
        return decode_items(starts, lengths, window, first, num_rows)


@dataclass
class Items:
    """Entries of a table i32 that kernels read: ``count`` now, of ``most`` that there is room for."""

    array: NDArray[np.int32]  # [most, numbers of an entry]
    count: int

    @classmethod
    def of(cls, entries: NDArray[np.int32]) -> Items:
        return cls(entries, len(entries))

    @property
    def most(self) -> int:
        return len(self.array)

    def fill(self, entries: NDArray[np.int32]) -> None:
        self.array[: len(entries)] = entries
        self.count = len(entries)


@dataclass
class Pieces:
    """Attention's items of some sequences, their rows' entries, and how many partial rows there may be."""

    items: Items
    rows: Items
    num_partials: int


@dataclass(frozen=True)
class Places:
    """Where a batch's rows go in the cache, and where its sequences' pages are: i32."""

    slots: NDArray[np.int32]  # [T]
    page_table: NDArray[np.int32]  # [B, pages of the longest context, or as many as a recorded step may need]

    @classmethod
    def of(cls, batch: ForwardBatch, windowed: bool, width: int | None) -> Places:
        """``windowed``: see ``ForwardBatch.places``. ``width``: of the table; None: as the batch has it."""
        slots, table = batch.places(windowed)
        found = cls(np.array(slots, np.int32), np.zeros((batch.num_sequences, width or table.shape[1]), np.int32))
        found.fill(batch, windowed)
        return found

    def fill(self, batch: ForwardBatch, windowed: bool) -> None:
        slots, table = batch.places(windowed)
        self.slots[:] = slots
        self.page_table[:, : table.shape[1]] = table


class BatchTables:
    """Arrays i32 of one batch: ``ids``, ``positions`` [T], ``query_start`` [B + 1], ``context_len`` and ``rope_len``
    [B], ``logit_rows`` [R], ``row_sequences`` [T]; and ``places``."""

    def __init__(self, staged: StagedBatch, num_partials: int | None = None) -> None:
        """``num_partials``: of a recorded step, for which other batches are filled in later; None: it is not."""
        self._staged, self._num_partials = staged, num_partials
        batch, limits = staged.batch, staged.limits
        self.ids = np.array(staged.ids, np.int32)
        self.positions, self.query_start, self.context_len, self.rope_len, self.logit_rows = (
            np.array(getattr(batch, name), np.int32) for name in _NAMES
        )
        width = None if num_partials is None else limits.max_pages
        self._places = {False: Places.of(batch, False, width)}
        if batch.window_table is not None:
            self._places[True] = Places.of(batch, True, width)
        self.row_sequences = self._row_sequences()
        self.num_few = staged.num_few
        self.angles: dict[Hashable, torch.Tensor] = {}
        self._frequencies: dict[tuple[RopeConfig, int], NDArray[np.float32]] = {}
        self._query_scales: dict[RopeConfig, NDArray[np.float32]] = {}
        self._splits: dict[int | None, list[Pieces]] = {}

    @property
    def num_rows(self) -> int:
        return len(self.ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_len)

    def places(self, windowed: bool) -> Places:
        """Of layers that keep all tokens, or of those with a window and pages of their own."""
        return self._places[windowed]

    def _row_sequences(self) -> NDArray[np.int32]:
        rows = np.searchsorted(self.query_start, np.arange(self.num_rows), side="right") - 1
        return np.minimum(rows, self.num_sequences - 1).astype(np.int32)  # padding: any

    def takes(self, staged: StagedBatch) -> bool:
        """Whether a recorded step has room for another batch of its shape: for how its sequences attend."""
        if staged.num_few < staged.batch.num_sequences:
            return False
        return all(staged.pieces(window).num_partials <= made.num_partials for window, (made,) in self._splits.items())

    def fill(self, staged: StagedBatch) -> None:
        """The values of another batch that the step ``takes``, in place, and all that was made from them."""
        self._staged, batch = staged, staged.batch
        self.ids[:] = staged.ids
        for name in _NAMES:
            getattr(self, name)[:] = getattr(batch, name)
        self.row_sequences[:] = self._row_sequences()
        for windowed, places in self._places.items():
            places.fill(batch, windowed)
        for (rope, head_dim), values in self._frequencies.items():
            if depends_on_length(rope):
                values[...] = self._frequencies_now(rope, head_dim)
        for rope, scales in self._query_scales.items():
            scales[:] = query_scales(rope, self.positions)
        for window, (made,) in self._splits.items():
            pieces = staged.pieces(window)
            made.items.fill(pieces.items)
            made.rows.fill(pieces.rows)

    # attention

    def splits(self, window: int | None) -> list[Pieces]:
        """Pieces of attention of the sequences with few rows, and their rows: see ``attention_items.decode_items``. In
        groups of sequences whose partial rows fit into the memory that there is for them; of a recorded step, one."""
        if window not in self._splits:
            self._splits[window] = self._groups(window) if self._num_partials is None else [self._room(window)]
        return self._splits[window]

    def _room(self, window: int | None) -> Pieces:
        staged = self._staged
        most = min(self._num_partials, self.num_rows * most_splits(staged.limits.max_context, window, FEW_ROWS))
        made = Pieces(Items(_entries(most, ITEM), 0), Items(_entries(self.num_rows, ROW), 0), most)
        pieces = staged.pieces(window)
        if len(pieces.items) <= most:  # else it is recorded for batches to come
            made.items.fill(pieces.items)
        made.rows.fill(pieces.rows)
        return made

    def _groups(self, window: int | None) -> list[Pieces]:
        staged, few, most = self._staged, self.num_few, scratch_partials(self._staged.limits)
        pieces = staged.pieces(window)
        if pieces.num_partials <= most:
            groups = [pieces]
        else:
            counts = np.bincount(pieces.items[:, 0], pieces.items[:, 2], few).astype(np.int64)
            groups, first = [], 0
            while first < few:
                last = max(first + 1, first + int(np.searchsorted(np.cumsum(counts[first:]), most, side="right")))
                groups.append(staged.some_pieces(window, first, last))
                first = last
        return [Pieces(Items.of(group.items), Items.of(group.rows), group.num_partials) for group in groups]

    def num_items(self, key: tuple[str, int | None]) -> int:
        """Of a recorded step's table that ``splits`` has made: ``("splits", window)`` or ``("rows", window)``."""
        what, window = key
        (made,) = self._splits[window]
        return (made.items if what == "splits" else made.rows).count

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

    def query_scales(self, rope: RopeConfig) -> NDArray[np.float32]:
        """f32 [T], see ``exl.ops.rope.query_scales``."""
        if rope not in self._query_scales:
            self._query_scales[rope] = query_scales(rope, self.positions)
        return self._query_scales[rope]

    def _frequencies_now(self, rope: RopeConfig, head_dim: int) -> NDArray[np.float32]:
        lengths = self.rope_len if depends_on_length(rope) else (0,)
        return np.stack([inverse_frequencies(rope, head_dim, int(length))[0] for length in lengths])


def _entries(count: int, size: int) -> NDArray[np.int32]:
    return np.zeros((count, size), np.int32)
