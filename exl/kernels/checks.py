"""Checks of a kernel's tensors: CUDA takes a base address and believes it."""

from __future__ import annotations

import torch

from exl.errors import KernelError


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
    alignment: int = 4,
    rows_apart: bool = False,
) -> None:
    """One tensor argument: type, shape, device, dense (or with ``rows_apart`` a stride between rows), aligned."""
    if not isinstance(tensor, torch.Tensor):
        raise KernelError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise KernelError(f"{name} is {tensor.dtype}: expected {' or '.join(str(d) for d in dtypes)}")
    if tuple(tensor.shape) != shape:
        raise KernelError(f"{name} has shape {tuple(tensor.shape)}: expected {shape}")
    if tensor.device != device:
        raise KernelError(f"{name} is on {tensor.device}: expected {device}")
    if rows_apart:
        row = tensor.stride(0) if tensor.shape[0] > 1 else max(tensor.stride(0), shape[1])
        if tensor.stride(1) != 1 or row < shape[1] or (row * tensor.element_size()) % alignment:
            raise KernelError(
                f"{name} has strides {tensor.stride()}: expected elements side by side and rows {shape[1]} elements or "
                f"more apart, a multiple of {alignment} bytes"
            )
    elif not tensor.is_contiguous():
        raise KernelError(f"{name} has strides {tensor.stride()}: expected a contiguous tensor")
    if tensor.data_ptr() % alignment:
        raise KernelError(f"{name} starts at address {tensor.data_ptr():#x}: expected a multiple of {alignment}")
