"""Whether two dense tensors have the same values: read in blocks, or in a sample if they are remote."""

from __future__ import annotations

import numpy as np

from exl.checkpoint.checkpoint import Checkpoint
from exl.formats.tensors import to_float

_BLOCK_BYTES = 1 << 20  # of each tensor
_NUM_SAMPLES = 4  # rows that are compared before all others


def same_values(checkpoint: Checkpoint, name: str, other: str, block_bytes: int = _BLOCK_BYTES) -> bool:
    """Compares two tensors [N, K] of f32, f16 or bf16, which may have different types: f32 holds all three exactly.

    Some rows are compared first: two matrices that were trained apart differ there, and nothing more is read. If these
    rows are equal, a local file is read to its end or to the first difference; of a remote one no more is read.
    """
    info, other_info = checkpoint.info(name), checkpoint.info(other)
    if info.shape != other_info.shape:
        return False
    num_rows = info.shape[0]

    def equal(start: int, stop: int) -> bool:
        rows, other_rows = (checkpoint.read_rows(each, start, stop) for each in (name, other))
        if info.dtype != other_info.dtype:
            rows, other_rows = to_float(rows, info.dtype), to_float(other_rows, other_info.dtype)
        bits = f"u{rows.itemsize}"  # compared as integers: a NaN is not equal to itself
        return np.array_equal(rows.view(bits), other_rows.view(bits))

    # Not the first row: it often belongs to padding and is zero in both.
    samples = {num_rows * (i + 1) // _NUM_SAMPLES - 1 for i in range(_NUM_SAMPLES)} - {-1}
    if not all(equal(row, row + 1) for row in sorted(samples)):
        return False
    if checkpoint.is_remote:
        return True
    step = max(1, block_bytes // max(1, info.num_bytes // max(1, num_rows)))
    return all(equal(start, min(num_rows, start + step)) for start in range(0, num_rows, step))
