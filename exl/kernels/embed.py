"""Token ids -> the residual stream (``embed.cu``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from exl.errors import KernelError
from exl.kernels.args import f32, i32, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.spec import KernelSpec, Variant
from exl.layout.tiles import ROWS

NUM_THREADS, CHANNELS = 128, 8  # of a block; of a thread


def check_ids(ids: Sequence[int], vocab_size: int, num_samples: int) -> None:
    """A batch's ids, on the host, before they are copied: of the vocabulary, or -1 - i for sample i of the previous
    step. Raises ``KernelError`` that names the first that is neither."""
    found = np.asarray(ids)
    wrong = (found < -num_samples) | (found >= vocab_size)
    if wrong.any():
        i = int(wrong.argmax())
        raise KernelError(f"token id {found[i]} at row {i}: expected {-num_samples} to {vocab_size - 1}")


def embed(
    backend: Backend,
    table: torch.Tensor,
    ids: torch.Tensor,
    h: torch.Tensor,
    sumsq: torch.Tensor,
    *,
    scale: float = 1.0,
    samples: torch.Tensor | None = None,
    permuted: torch.Tensor | None = None,
    channel_map: torch.Tensor | None = None,
    dependent: bool = False,
) -> None:
    """h f32 [T, C] = scale * rows ``ids`` i32 [T] of table f16 or bf16 [V, C]; sumsq f32 [T, ceil(C / 16)].

    The table may be memory of the host that the device reads over the bus (``exl.memory.device.mapped``).
    A negative id -1 - i is ``samples[i]`` (i32). ``permuted`` and ``channel_map`` as for ``Output.residual``. An
    invalid id gives zeros: ``check_ids`` checks them while they are still on the host. Raises ``KernelError``.
    """
    device = backend.device
    if not isinstance(table, torch.Tensor) or table.dim() != 2 or table.shape[1] % 8 or not table.shape[1]:
        raise KernelError(f"table: expected [V, C], C a multiple of 8, found {getattr(table, 'shape', type(table))}")
    vocab_size, C = table.shape
    check_tensor("table", table, (torch.float16, torch.bfloat16), (vocab_size, C), device, 16)
    if not isinstance(ids, torch.Tensor) or ids.dim() != 1 or not len(ids):
        raise KernelError(f"ids: expected [T] with at least one token, found {getattr(ids, 'shape', type(ids))}")
    num_tokens, num_tiles = len(ids), -(-C // ROWS)
    check_tensor("ids", ids, (torch.int32,), (num_tokens,), device)
    check_tensor("h", h, (torch.float32,), (num_tokens, C), device, 16)
    check_tensor("sumsq", sumsq, (torch.float32,), (num_tokens, num_tiles), device)
    if samples is not None:
        check_tensor("samples", samples, (torch.int32,), (samples.numel(),), device)
    if (permuted is None) != (channel_map is None):
        raise KernelError("permuted and channel_map go together: one is missing")
    if permuted is not None:
        check_tensor("permuted", permuted, (torch.float32,), (num_tokens, C), device)
        check_tensor("channel_map", channel_map, (torch.int32,), (C,), device)
    args = [ptr(table), ptr(ids), ptr(samples), ptr(h), ptr(sumsq), ptr(permuted), ptr(channel_map)]
    args += [i32(C), i32(vocab_size), i32(0 if samples is None else samples.numel()), f32(scale)]
    function = backend.load(_spec(table.dtype == torch.bfloat16, scale != 1.0, backend.arch))
    grid = -(-C // (NUM_THREADS * CHANNELS)), num_tokens
    launch(function, grid, (NUM_THREADS,), args, dependent=dependent)


def _spec(bf16: bool, scaled: bool, arch: int) -> KernelSpec:
    macros = {"EXL_BF16": int(bf16)} | ({"EXL_SCALED": 1} if scaled else {})
    return KernelSpec("embed.cu", "embed", macros, arch)


def variants(arch: int) -> Iterator[Variant]:
    for bf16, scaled in itertools.product((False, True), repeat=2):
        yield Variant(_spec(bf16, scaled, arch))
