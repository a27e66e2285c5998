"""activation(gate) * up, if gate and up could not share a launch (``gated_product.cu``)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exl.errors import KernelError
from exl.kernels.args import i32, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.linear_io import ACTIVATIONS, OUT_TYPES, activation_macros
from exl.kernels.spec import KernelSpec, Variant

NUM_THREADS = 256


def gated_product(
    backend: Backend,
    gate: torch.Tensor,
    up: torch.Tensor,
    y: torch.Tensor,
    activation: str = "silu",
    *,
    channel_map: torch.Tensor | None = None,
    dependent: bool = False,
) -> None:
    """y [T, N] = activation(gate) * up, both [T, N] of one type, their rows equally far apart; y may have another type.

    ``activation``: "silu" or "gelu_tanh". Types: f16, bf16, f32; the arithmetic is f32. ``channel_map`` i32 [N]: where
    a consumer under act-order expects each column. Raises ``KernelError``.
    """
    if not isinstance(gate, torch.Tensor) or gate.dim() != 2 or not gate.numel():
        raise KernelError(f"gate: expected [T, N], found {getattr(gate, 'shape', type(gate))}")
    num_tokens, N = gate.shape
    size = gate.element_size()
    check_tensor("gate", gate, tuple(OUT_TYPES), (num_tokens, N), backend.device, size, rows_apart=True)
    check_tensor("up", up, (gate.dtype,), (num_tokens, N), backend.device, size, rows_apart=True)
    if num_tokens > 1 and gate.stride(0) != up.stride(0):
        raise KernelError(f"gate has rows {gate.stride(0)} elements apart, up {up.stride(0)}: expected the same")
    check_tensor("y", y, tuple(OUT_TYPES), (num_tokens, N), backend.device, y.element_size(), rows_apart=True)
    if channel_map is not None:
        check_tensor("channel_map", channel_map, (torch.int32,), (N,), backend.device)
    args = [ptr(gate), ptr(up), ptr(y), ptr(channel_map), i32(N), i32(num_tokens), i32(OUT_TYPES[gate.dtype])]
    args += [i32(gate.stride(0)), i32(OUT_TYPES[y.dtype]), i32(y.stride(0))]
    grid = (-(-N // NUM_THREADS), num_tokens)
    launch(backend.load(_spec(activation, backend.arch)), grid, (NUM_THREADS,), args, dependent=dependent)


def _spec(activation: str, arch: int) -> KernelSpec:
    return KernelSpec("gated_product.cu", "gated_product", activation_macros(activation), arch)


def variants(arch: int) -> Iterator[Variant]:
    for activation in ACTIVATIONS:
        yield Variant(_spec(activation, arch))
