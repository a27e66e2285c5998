"""How a batch's attention is cut into pieces of work: tables that kernels read, so that only their contents differ
from step to step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exl.cpu_kernels.attention_tiles import SPLIT, queries_of_a_block

ITEM, ROW = 8, 4  # numbers of an entry
_FEW_PIECES = 64


class DecodeTables(NamedTuple):
    """``items`` i32 [n][8]: sequence, first row, number of rows, position of the first row, split, first partial row,
    0, 0. ``rows`` i32 [rows][4]: row, its first partial row, how far apart its partial rows are, number of its splits;
    one for each row, in order. ``num_partials``: partial rows in all."""

    items: NDArray[np.int32]
    rows: NDArray[np.int32]
    num_partials: int


def decode_items(
    query_start: NDArray[np.int32],
    context_len: NDArray[np.int32],
    window: int | None,
    first_sequence: int = 0,
    num_rows: int | None = None,
) -> DecodeTables:
    """The pieces of sequences with few rows each: one for every split of 256 tokens that one of the rows sees.

    ``query_start`` [B + 1] and ``context_len`` [B] as in ``ForwardBatch``, or runs of them whose first sequence is
    ``first_sequence`` in the page table. Sequences without rows have no pieces. ``num_rows``: rows behind those of the
    sequences, up to this one, belong to none; they get entries without splits, so that the merge writes zeros.
    """
    pieces = int(np.sum(context_len)) // SPLIT + len(context_len)
    make = _few_items if pieces <= _FEW_PIECES else _many_items
    return make(query_start, context_len, window, first_sequence, num_rows)


def _few_items(
    query_start: NDArray[np.int32],
    context_len: NDArray[np.int32],
    window: int | None,
    first_sequence: int,
    num_rows: int | None,
) -> DecodeTables:
    items, rows, partials = [], [], 0
    for b, context in enumerate(context_len):
        start, count = int(query_start[b]), int(query_start[b + 1] - query_start[b])
        position = int(context) - count  # of the first row
        splits = range(_first_split(position, window), _last_split(position + count - 1) + 1) if count else range(0)
        for row in range(count):
            first = _first_split(position + row, window)
            seen = _last_split(position + row) + 1 - first
            rows.append((start + row, partials + (first - splits.start) * count + row, count, seen))
        for split in splits:
            items.append((first_sequence + b, start, count, position, split, partials, 0, 0))
            partials += count
    rows += [(row, 0, 0, 0) for row in range(int(query_start[-1]), num_rows or 0)]
    return DecodeTables(_table(items, ITEM), _table(rows, ROW), partials)


def _many_items(
    query_start: NDArray[np.int32],
    context_len: NDArray[np.int32],
    window: int | None,
    first_sequence: int,
    num_rows: int | None,
) -> DecodeTables:
    """The same by whole columns, whose few dozen steps take as long as some sixty entries one by one."""
    start, count = query_start[:-1], np.diff(query_start)
    position = context_len - count
    low = _first_splits(position, window)
    num_splits = np.where(count > 0, (context_len - 1) // SPLIT + 1 - low, 0)
    partials = num_splits * count
    before = np.cumsum(partials) - partials
    of = np.repeat(np.arange(len(count)), num_splits)
    nth = np.arange(len(of)) - (np.cumsum(num_splits) - num_splits)[of]
    items = np.zeros((len(of), ITEM), np.int32)
    columns = (first_sequence + of, start[of], count[of], position[of], low[of] + nth, before[of] + nth * count[of])
    for i, column in enumerate(columns):
        items[:, i] = column
    of = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(of)) - (start - start[0])[of]
    at = position[of] + nth
    first = _first_splits(at, window)
    end, own = int(query_start[-1]), len(of)
    rows = np.zeros((own + max(0, (num_rows or 0) - end), ROW), np.int32)
    columns = (start[of] + nth, before[of] + (first - low[of]) * count[of] + nth, count[of], at // SPLIT + 1 - first)
    for i, column in enumerate(columns):
        rows[:own, i] = column
    rows[own:, 0] = np.arange(end, end + len(rows) - own)
    return DecodeTables(items, rows, int(partials.sum()))


def most_splits(max_context: int, window: int | None, most_rows: int) -> int:
    """Items that ``decode_items`` may give a sequence of ``most_rows`` new rows or fewer, at any length.

    Times the rows, it is how many partial rows there may be.
    """
    splits = -(-max_context // SPLIT)
    return splits if window is None else min(splits, (window + most_rows - 3) // SPLIT + 2)


def prefill_items(
    query_start: NDArray[np.int32],
    context_len: NDArray[np.int32],
    group: int,
    head_dim: int,
    first_sequence: int = 0,
) -> NDArray[np.int32]:
    """i32 [n][8], blocks of rows: sequence, first row, number of rows, position of the first row, 0, 0, 0, 0.

    ``group``: query heads of a KV head. The others as for ``decode_items``. The longest pieces of a sequence, its last
    ones, come first.
    """
    size = max(1, queries_of_a_block(head_dim) // group)
    items = []
    for b, context in enumerate(context_len):
        start, stop = int(query_start[b]), int(query_start[b + 1])
        for first in reversed(range(start, stop, size)):
            position = int(context) - (stop - first)
            items.append((first_sequence + b, first, min(size, stop - first), position, 0, 0, 0, 0))
    return _table(items, ITEM)


def _first_split(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position + 1 - window) // SPLIT


def _first_splits(positions: NDArray[np.int32], window: int | None) -> NDArray[np.int32]:
    return np.zeros_like(positions) if window is None else np.maximum(positions + (1 - window), 0) // SPLIT


def _last_split(position: int) -> int:
    return position // SPLIT


def _table(entries: list[tuple[int, ...]], size: int) -> NDArray[np.int32]:
    return np.array(entries, np.int32).reshape(-1, size)
