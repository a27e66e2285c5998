"""Kernel arguments with their types said aloud: CUDA takes raw bytes and checks nothing."""

from __future__ import annotations

import functools
import operator
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from exl.errors import KernelError

TORCH_DTYPES = {
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bool: "u8",
}
NUMPY_DTYPES = {"u1": "u8", "i1": "i8", "u2": "u16", "i2": "i16", "u4": "u32", "i4": "i32", "u8": "u64", "i8": "i64"}
NUMPY_DTYPES |= {"f2": "f16", "f4": "f32", "f8": "f64", "b1": "u8"}
SCALARS = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "f32": "<f"}


@dataclass(frozen=True)
class Pointer:
    """Device memory: ``num_bytes`` from ``address`` on are the tensor's, and a kernel must not touch more."""

    address: int
    num_bytes: int
    dtype: str  # "f16", "u8", ...; "null" for no memory at all
    device: str  # "cpu", "cuda:0"
    owner: Any = None  # keeps the memory alive while the argument does

    def pack(self) -> bytes:
        return struct.pack("<Q", self.address)


@dataclass(frozen=True)
class Scalar:
    """A number of a stated type."""

    value: int | float
    dtype: str

    def pack(self) -> bytes:
        return struct.pack(SCALARS[self.dtype], self.value)


Arg = Pointer | Scalar


@functools.cache
def device_name(device: torch.device) -> str:
    """``str(device)``, which takes longer than all else of an argument."""
    return str(device)


def ptr(tensor: torch.Tensor | np.ndarray | None) -> Pointer:
    """Base address of a tensor, with the bytes from its first to its last element; ``None`` is a null pointer.

    Strides are the wrapper's affair: it passes them, or refuses what it cannot take.
    """
    if tensor is None:
        return Pointer(0, 0, "null", "any")
    if isinstance(tensor, np.ndarray):
        code = tensor.dtype.newbyteorder("=").str[1:]
        if code not in NUMPY_DTYPES or not tensor.dtype.isnative:
            raise KernelError(f"no kernel takes a NumPy array of {tensor.dtype}")
        low, high = np.lib.array_utils.byte_bounds(tensor) if tensor.size else (tensor.ctypes.data,) * 2
        if low != tensor.ctypes.data:
            raise KernelError(f"no kernel takes an array with negative strides: {tensor.strides}")
        return Pointer(low, high - low, NUMPY_DTYPES[code], "cpu", tensor)
    if not isinstance(tensor, torch.Tensor):
        raise KernelError(f"expected a tensor, an array or None as a kernel's pointer, found {type(tensor).__name__}")
    if tensor.dtype not in TORCH_DTYPES:
        raise KernelError(f"no kernel takes a tensor of {tensor.dtype}")
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    num_bytes = span * tensor.element_size() if tensor.numel() else 0
    return Pointer(tensor.data_ptr(), num_bytes, TORCH_DTYPES[tensor.dtype], device_name(tensor.device), tensor)


def _integer(value: int, dtype: str) -> Scalar:
    if isinstance(value, bool):
        raise KernelError(f"expected an integer for a kernel's {dtype}, found a bool")
    try:
        number = operator.index(value)
        struct.pack(SCALARS[dtype], number)
    except (TypeError, struct.error) as error:
        raise KernelError(f"{value!r} does not fit a kernel's {dtype}: {error}") from error
    return Scalar(number, dtype)


def i32(value: int) -> Scalar:
    """``int``; raises ``KernelError`` for what is no integer or does not fit."""
    return _integer(value, "i32")


def u32(value: int) -> Scalar:
    """``unsigned int``."""
    return _integer(value, "u32")


def i64(value: int) -> Scalar:
    """``long long``."""
    return _integer(value, "i64")


def u64(value: int) -> Scalar:
    """``unsigned long long``, ``size_t``."""
    return _integer(value, "u64")


def f32(value: float) -> Scalar:
    """``float``: rounded to the nearest."""
    try:
        return Scalar(float(np.float32(value)), "f32")
    except (TypeError, ValueError) as error:
        raise KernelError(f"{value!r} is no number for a kernel's float") from error
