"""What goes into attention's kernels besides pages: rows of new tokens, their norms and angles, and its parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import PAGE_SIZE
from exl.errors import KernelError
from exl.kernels.args import Pointer, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.linear_io import OUT_TYPES


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm over each head's channels, before RoPE: weights f32 [D]; None: that one is not normalised."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    eps: float


NO_NORMS = HeadNorms(None, None, 0.0)


@dataclass(frozen=True)
class QkvRows:
    """Rows of new tokens as the qkv linear leaves them, and how q and k are turned."""

    qkv: torch.Tensor  # [T, (H + 2 Hkv) * D] f16, bf16 or f32; rows may lie apart
    cosine: torch.Tensor  # f32 [T, half the rotated channels], scaled as the model scales it
    sine: torch.Tensor
    norms: HeadNorms = NO_NORMS

    @property
    def half_dim(self) -> int:
        """Angles per token."""
        return self.cosine.shape[1]

    def pointers(self) -> list[Pointer]:
        """The kernels' first arguments."""
        return [ptr(x) for x in (self.qkv, self.norms.q, self.norms.k, self.cosine, self.sine)]

    def rows(self, start: int, stop: int) -> QkvRows:
        return QkvRows(self.qkv[start:stop], self.cosine[start:stop], self.sine[start:stop], self.norms)


@dataclass(frozen=True)
class AttentionParams:
    """Of one layer."""

    scale: float
    window: int | None = None  # a token sees itself and the window - 1 tokens before it; None: all
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # f32 [H]: one more score of each head, which has no value

    @property
    def macros(self) -> dict[str, int]:
        """What kernels are compiled with. None without sinks, so that those are the same whatever else there is."""
        return {} if self.sinks is None else {"EXL_SINKS": 1}

    def check(self, num_heads: int, device: torch.device) -> None:
        """Raises ``KernelError``."""
        check_window(self.window)
        if self.sinks is not None:
            check_tensor("sinks", self.sinks, (torch.float32,), (num_heads,), device)


def check_dims(name: str, tensor: torch.Tensor, dims: int) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != dims:
        raise KernelError(f"{name}: expected {dims} dimensions, found {getattr(tensor, 'shape', type(tensor))}")


def check_rows(
    rows: QkvRows, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> None:
    """Raises ``KernelError`` for rows of another shape or type."""
    check_dims("cosine", rows.cosine, 2)
    if 2 * rows.half_dim > head_dim:
        raise KernelError(
            f"cosine has {rows.half_dim} angles: expected {head_dim // 2} or fewer for a head size of {head_dim}"
        )
    width = (num_heads + 2 * num_kv_heads) * head_dim
    size = rows.qkv.element_size()
    check_tensor("qkv", rows.qkv, tuple(OUT_TYPES), (num_tokens, width), device, size, rows_apart=True)
    for name, tensor in (("cosine", rows.cosine), ("sine", rows.sine)):
        check_tensor(name, tensor, (torch.float32,), (num_tokens, rows.half_dim), device)
    for name, tensor in (("q_norm", rows.norms.q), ("k_norm", rows.norms.k)):
        if tensor is not None:
            check_tensor(name, tensor, (torch.float32,), (head_dim,), device)


def check_used_pages(context_len: NDArray[np.int32], page_table: NDArray[np.int32], num_pages: int) -> None:
    """Tables on the host: raises ``KernelError`` for the first page of a sequence that the cache does not have. What
    lies beyond a sequence's pages may be anything."""
    wrong = page_table.view(np.uint32) >= num_pages  # negative ones, too
    if not wrong.any():
        return
    wrong &= np.arange(page_table.shape[1]) < -(-context_len // PAGE_SIZE)[:, None]
    if wrong.any():
        b, i = (int(found[0]) for found in wrong.nonzero())
        raise KernelError(f"sequence {b} has page {page_table[b, i]}: expected 0 to {num_pages - 1}")


def check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise KernelError(f"window {window}: expected 1 or more")
