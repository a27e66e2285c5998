"""What goes into a linear kernel besides its weight, and what comes out (activations.cuh, epilogue.cuh)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from exl.errors import KernelError
from exl.kernels.checks import check_tensor
from exl.layout.tiles import ROWS

INPUT_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
OUT_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
STORE, GATED, RESIDUAL = 0, 1, 2
NO_MACROS: Mapping[str, int] = MappingProxyType({})
ACTIVATIONS = ("silu", "gelu_tanh")  # of a gate


@dataclass(frozen=True)
class NormedInput:
    """RMSNorm on the way in: x is the f32 residual; ``sumsq`` f32 [T, ceil(K / 16)] are its sums of squares over 16
    channels each, as ``Output.residual`` leaves them, ``weight`` f32 [K]."""

    sumsq: torch.Tensor
    weight: torch.Tensor
    eps: float

    def rows(self, start: int, stop: int) -> NormedInput:
        return NormedInput(self.sumsq[start:stop], self.weight, self.eps)


@dataclass(frozen=True)
class Output:
    """Where sums go (epilogue.cuh); made by ``store``, ``gated`` or ``residual``."""

    kind: int
    y: torch.Tensor
    sumsq: torch.Tensor | None = None
    permuted: torch.Tensor | None = None
    channel_map: torch.Tensor | None = None
    scale: float = 1.0
    activation: str = "silu"

    @classmethod
    def store(cls, y: torch.Tensor) -> Output:
        """y [T, N] f16, bf16 or f32 = the product."""
        return cls(STORE, y)

    @classmethod
    def gated(cls, y: torch.Tensor, activation: str = "silu") -> Output:
        """y [T, F] = activation(gate) * up, for rows packed by ``gated_rows``."""
        return cls(GATED, y, activation=activation)

    @classmethod
    def residual(
        cls,
        h: torch.Tensor,
        sumsq: torch.Tensor,
        scale: float = 1.0,
        permuted: torch.Tensor | None = None,
        channel_map: torch.Tensor | None = None,
    ) -> Output:
        """h f32 [T, N] += scale * product; sumsq f32 [T, ceil(N / 16)] becomes the sums of h^2 over 16 channels each.

        ``permuted`` f32 [T, N] gets a second copy of h with channel n at ``channel_map[n]`` (i32 [N]). Nothing asks for
        it yet: it is for linears under act-order, which then need no launch that sorts their input.
        """
        return cls(RESIDUAL, h, sumsq, permuted, channel_map, scale)

    @property
    def is_gated(self) -> bool:
        return self.kind == GATED

    @property
    def macros(self) -> dict[str, int]:
        """What a kernel that ends with this is compiled with: ``activation_macros``."""
        return activation_macros(self.activation)

    def rows(self, start: int, stop: int) -> Output:
        def cut(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t[start:stop]

        return replace(self, y=cut(self.y), sumsq=cut(self.sumsq), permuted=cut(self.permuted))


def activation_macros(activation: str) -> dict[str, int]:
    """Macros of epilogue.cuh. None for SiLU, so that its kernels are the same whatever else there is. Raises
    ``KernelError``."""
    if activation not in ACTIVATIONS:
        raise KernelError(f"activation {activation!r}: expected {' or '.join(ACTIVATIONS)}")
    return {} if activation == "silu" else {"EXL_GELU": 1}


def check_input(K: int, x: torch.Tensor, norm: NormedInput | None, device: torch.device) -> None:
    dtypes = (torch.float16, torch.bfloat16) if norm is None else (torch.float32,)
    if not isinstance(x, torch.Tensor):
        raise KernelError(f"x: expected a tensor, found {type(x).__name__}")
    if x.dim() != 2 or x.shape[0] < 1:
        raise KernelError(f"x: expected [T, {K}] with at least one token, found {tuple(x.shape)}")
    num_tokens = x.shape[0]
    check_tensor("x", x, dtypes, (num_tokens, K), device, 16, rows_apart=True)
    if norm is not None:
        check_tensor("sumsq", norm.sumsq, (torch.float32,), (num_tokens, -(-K // ROWS)), device)
        check_tensor("norm weight", norm.weight, (torch.float32,), (K,), device, 16)
        if not norm.eps >= 0:
            raise KernelError(f"eps is {norm.eps}: expected 0 or more")


def check_output(num_tiles: int, num_tokens: int, out: Output, device: torch.device) -> None:
    y = out.y
    if not isinstance(y, torch.Tensor) or y.dim() != 2:
        raise KernelError(f"output: expected two dimensions, found {getattr(y, 'shape', type(y))}")
    N = y.shape[1]
    rows_of_y = 8 if out.kind == GATED else ROWS
    if -(-N // rows_of_y) != num_tiles:
        raise KernelError(f"output has {N} columns: the matrix has {num_tiles} tiles of {rows_of_y}")
    name, dtypes = ("h", (torch.float32,)) if out.kind == RESIDUAL else ("y", tuple(OUT_TYPES))
    check_tensor(name, y, dtypes, (num_tokens, N), device, y.element_size(), rows_apart=True)
    if out.kind != RESIDUAL:
        return
    check_tensor("sumsq", out.sumsq, (torch.float32,), (num_tokens, num_tiles), device)
    if (out.permuted is None) != (out.channel_map is None):
        raise KernelError("permuted and channel_map go together: one is missing")
    if out.permuted is not None:
        check_tensor("permuted", out.permuted, (torch.float32,), (num_tokens, N), device)
        check_tensor("channel_map", out.channel_map, (torch.int32,), (N,), device)
