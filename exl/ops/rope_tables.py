"""RoPE's cos and sin for a batch's rows, computed once for all layers."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import ForwardBatch
from exl.checkpoint.config import RopeConfig
from exl.ops.rope import depends_on_length, inverse_frequencies, rotary_dim


def rope_tables(batch: ForwardBatch, rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each f32 [T, ceil(rotary_dim / 2)], on the CPU, times the model's factor (yarn)."""
    positions = torch.from_numpy(batch.positions).float()
    angles = torch.empty(batch.num_rows, num_angles(rope, head_dim))
    factor = 1.0
    runs = [(0, batch.num_rows, int(batch.rope_len[0]))]
    if depends_on_length(rope):
        runs = zip(batch.query_start[:-1], batch.query_start[1:], batch.rope_len, strict=True)
    for start, stop, length in runs:
        freq, factor = _frequencies(rope, head_dim, int(length) if depends_on_length(rope) else 0)
        torch.outer(positions[start:stop], torch.from_numpy(freq), out=angles[start:stop])
    return angles.cos() * factor, angles.sin() * factor


def num_angles(rope: RopeConfig, head_dim: int) -> int:
    return (rotary_dim(rope, head_dim) + 1) // 2


@functools.lru_cache(maxsize=16)
def _frequencies(rope: RopeConfig, head_dim: int, length: int) -> tuple[NDArray[np.float32], float]:
    return inverse_frequencies(rope, head_dim, length)
