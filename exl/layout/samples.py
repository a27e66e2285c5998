"""Memory that sampling on a GPU takes (``sample.cu``), from shapes alone."""

from __future__ import annotations

import numpy as np

MAX_ROWS = 64  # per launch
PART = 4096  # vocabulary entries per block
NUM_BINS = 45 * 16

# ``Params`` of the kernel.
ROW = np.dtype(
    [
        ("uniform", "<u8"),  # times 2^64
        ("top_p", "<u8"),  # times 2^64; 0: off
        ("log_min_p", "<f8"),  # -inf: off
        ("temperature", "<f4"),
        ("scale_hi", "<f4"),  # log2(e) / temperature, in two parts
        ("scale_lo", "<f4"),
        ("penalty", "<f4"),
        ("top_k", "<i4"),
        ("seen_start", "<i4"),
        ("seen_stop", "<i4"),
        ("unused", "<i4"),
    ]
)


def table_bytes(num_rows: int, max_seen: int) -> int:
    """Of the buffer for ``num_rows`` rows and ``max_seen`` earlier tokens. Those are of all rows that have a repetition
    penalty; a row has no more of them than its context or the vocabulary."""
    return -(-(num_rows * ROW.itemsize + 4 * max_seen) // 16) * 16


def scratch_shapes(num_rows: int, vocab_size: int) -> dict[str, tuple[str, int]]:
    """Type and number of elements of each field of ``SampleScratch``, for up to ``num_rows`` rows."""
    return {
        "tops": ("i64", num_rows * -(-vocab_size // PART)),
        "seen": ("i32", num_rows * -(-vocab_size // 32)),
        "bin_counts": ("i32", num_rows * NUM_BINS),
        "bin_weights": ("i64", num_rows * NUM_BINS),
        "arrived": ("i32", num_rows),
    }
