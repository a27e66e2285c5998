"""A batch's index arrays as kernels read them: at addresses that stay, for a recorded step, as the batches change."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl.batch import ForwardBatch
from exl.checkpoint.config import RopeConfig
from exl.layout.cpu_steps import FEW_ROWS
from exl.layout.steps import StepLimits
from exl.ops.rope import depends_on_length, inverse_frequencies

_NAMES = ("positions", "slots", "query_start", "context_len", "rope_len", "logit_rows")


class BatchTables:
    """Arrays i32 of one batch: ``ids``, ``positions``, ``slots`` [T], ``query_start`` [B + 1], ``context_len`` and
    ``rope_len`` [B], ``page_table`` [B, pages of the longest context], ``logit_rows`` [R]."""

    def __init__(self, batch: ForwardBatch, ids: NDArray[np.int32], limits: StepLimits) -> None:
        """``ids``: the batch's tokens, all known."""
        self._limits = limits
        self.ids = np.array(ids, np.int32)
        self.positions, self.slots, self.query_start, self.context_len, self.rope_len, self.logit_rows = (
            np.array(getattr(batch, name), np.int32) for name in _NAMES
        )
        self.page_table = np.zeros((batch.num_sequences, limits.max_pages), np.int32)
        self.page_table[:, : batch.page_table.shape[1]] = batch.page_table

    @property
    def num_rows(self) -> int:
        return len(self.ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_len)

    @property
    def shape(self) -> tuple[int, ...]:
        """Batches of one shape run the same stages."""
        return self.num_rows, self.num_sequences, len(self.logit_rows)

    def copy(self) -> BatchTables:
        """Arrays of its own, with the same values."""
        other = BatchTables.__new__(BatchTables)
        for name, value in vars(self).items():
            setattr(other, name, value.copy() if isinstance(value, np.ndarray) else value)
        other._frequencies, other.angles, other._items = {}, {}, {}
        return other

    def fill(self, other: BatchTables) -> None:
        """The values of another batch of the same shape, in place."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                value[...] = getattr(other, name)
        for (rope, head_dim), values in self._frequencies.items():
            values[...] = self._frequencies_now(rope, head_dim)
        for window, items in self._items.items():
            self._fill_items(window, items)

    # RoPE

    def frequencies(self, rope: RopeConfig, head_dim: int) -> NDArray[np.float32]:
        """f32 [1 or B, half], in radians per token: one row for all, or for each sequence."""
        key = rope, head_dim
        if key not in self._frequencies:
            self._frequencies[key] = self._frequencies_now(rope, head_dim)
        return self._frequencies[key]

    def _frequencies_now(self, rope: RopeConfig, head_dim: int) -> NDArray[np.float32]:
        lengths = self.rope_len if depends_on_length(rope) else (0,)
        return np.stack([inverse_frequencies(rope, head_dim, int(length))[0] for length in lengths])

    def sequence_of_row(self) -> NDArray[np.int32]:
        """i32 [T]; of padding rows the last."""
        rows = np.searchsorted(self.query_start, np.arange(self.num_rows), side="right") - 1
        return np.minimum(rows, self.num_sequences - 1).astype(np.int32)
