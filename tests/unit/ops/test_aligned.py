"""Rows from the middle of a buffer, for torch's products of vectors."""

from __future__ import annotations

import torch

from exl.memory.host import host_tensor
from exl.ops.torch_linear import aligned


def test_rows_begin_where_torch_allocates():
    rows = host_tensor([4, 24], torch.float32, "test")
    rows.copy_(torch.arange(96.0).view(4, 24))
    assert aligned(rows) is rows
    assert aligned(rows[2:]).data_ptr() == rows[2:].data_ptr()  # 192 bytes on
    moved = aligned(rows[1:])  # 96 bytes on
    assert moved.data_ptr() % 64 == 0
    assert torch.equal(moved, rows[1:])
