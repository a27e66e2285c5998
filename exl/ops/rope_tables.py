"""RoPE's cos and sin for a batch's rows, computed once for all layers."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import ForwardBatch
from exl.checkpoint.rope_config import RopeConfig
from exl.ops.rope import depends_on_length, inverse_frequencies, rotary_dim


def rope_tables(batch: ForwardBatch, rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each f32 [T, ceil(rotary_dim / 2)], on the CPU, times the model's factor (yarn)."""
    cosine, sine = (torch.empty(batch.num_rows, num_angles(rope, head_dim)) for _ in range(2))
    fill_rope_tables(batch, rope, head_dim, cosine, sine)
    return cosine, sine


def fill_rope_tables(
    batch: ForwardBatch, rope: RopeConfig, head_dim: int, cosine: torch.Tensor, sine: torch.Tensor
) -> None:
    """``rope_tables`` into tensors that are there."""
    positions = torch.from_numpy(batch.positions).float()
    angles, factor = sine, 1.0
    runs = [(0, batch.num_rows, 0)]
    if depends_on_length(rope):
        # Padding rows belong to no sequence: angles of position 0.
        angles[batch.query_start[-1] :] = 0.0
        runs = zip(*(x.tolist() for x in (batch.query_start[:-1], batch.query_start[1:], batch.rope_len)), strict=True)
    for start, stop, length in runs:
        freq, factor = _frequencies(rope, head_dim, length)
        torch.outer(positions[start:stop], torch.from_numpy(freq), out=angles[start:stop])
    torch.cos(angles, out=cosine)
    torch.sin(angles, out=sine)
    if factor != 1.0:
        cosine *= factor
        sine *= factor


def num_angles(rope: RopeConfig, head_dim: int) -> int:
    return (rotary_dim(rope, head_dim) + 1) // 2


@functools.lru_cache(maxsize=16)
def _frequencies(rope: RopeConfig, head_dim: int, length: int) -> tuple[NDArray[np.float32], float]:
    return inverse_frequencies(rope, head_dim, length)
