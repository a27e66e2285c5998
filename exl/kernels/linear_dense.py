"""Linears whose weights are f16 or bf16 as the checkpoint has them: the head, and layers that are not quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from exl.errors import KernelError
from exl.kernels.args import f32, i32, i64, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.linear_io import (
    ACTIVATIONS,
    INPUT_KINDS,
    NO_MACROS,
    OUT_TYPES,
    NormedInput,
    Output,
    activation_macros,
    check_input,
    check_output,
)
from exl.kernels.spec import KernelSpec, Variant
from exl.layout.arch import arch_limits
from exl.layout.tiles import ROWS

MAX_TOKENS = 32  # per launch
NUM_WARPS = 8
STAGE_INPUTS = 64
STAGE_BYTES = 2048  # of a warp's ring: 16 rows x 64 inputs
SLICE_INPUTS = 128  # slices of K are multiples of this
NUM_SLICES = 8
MIN_ARCH = {torch.float16: 75, torch.bfloat16: 80}  # tensor cores with such inputs


@dataclass(frozen=True)
class DenseWeight:
    """``weight`` [N, K] f16 or bf16, rows side by side or apart; ``bias`` f32 [16 * tiles] in the tiles' order.

    ``gated``: the first half of the rows is gate, the second up, and both are F = N / 2 outputs.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    gated: bool = False

    @property
    def form(self) -> bool:
        """All that launches depend on besides the tensors."""
        return self.gated

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[0] // (2 if self.gated else 1)

    @property
    def num_tiles(self) -> int:
        return -(-self.num_outputs // (ROWS // 2 if self.gated else ROWS))


@dataclass(frozen=True)
class DenseConfig:
    """One way to run one launch of up to 32 tokens."""

    token_tiles: int  # of 8 tokens
    ring_stages: int
    x_stages: int  # whose activations are in shared memory at a time

    def spec(self, dtype: torch.dtype, arch: int, ending: Mapping[str, int] = NO_MACROS) -> KernelSpec:
        """``ending``: ``Output.macros``."""
        macros = {"EXL_BF16": int(dtype == torch.bfloat16), "EXL_NT": self.token_tiles, "EXL_STAGES": self.ring_stages}
        return KernelSpec("linear_dense.cu", "linear_dense", macros | ending, arch)

    def shared_bytes(self, dtype: torch.dtype, num_tokens: int, arch: int) -> int:
        ring = NUM_WARPS * self.ring_stages * STAGE_BYTES if arch >= 80 else 0
        planes = 2 if dtype == torch.bfloat16 else 1
        staged = NUM_WARPS * num_tokens * self.x_stages * STAGE_INPUTS * 2 * planes
        return max(ring + staged, self.token_tiles * NUM_SLICES * 512)


def choose_dense_config(K: int, dtype: torch.dtype, num_tokens: int, arch: int) -> DenseConfig:
    """A ring of three stages (32 KB in flight per block) if it fits, and as many activations of a slice as fit beside
    it. Pure. Raises ``KernelError`` for other than 1 to 32 tokens and GPUs without such tensor cores."""
    if arch < MIN_ARCH[dtype]:
        raise KernelError(
            f"{dtype} weights need compute capability {MIN_ARCH[dtype] / 10} or higher, found {arch / 10}"
        )
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise KernelError(f"{num_tokens} tokens: a launch takes 1 to {MAX_TOKENS}")
    token_tiles = 1 if num_tokens <= 8 else 2 if num_tokens <= 16 else 4
    units = -(-K // SLICE_INPUTS)
    whole = -(-units // NUM_SLICES) * (SLICE_INPUTS // STAGE_INPUTS)  # stages of the longest slice
    limit = arch_limits(arch).max_shared_bytes
    for ring_stages in (3, 2):
        for x_stages in range(whole, 0, -1):
            config = DenseConfig(token_tiles, ring_stages, x_stages)
            if config.shared_bytes(dtype, num_tokens, arch) <= limit:
                return config
    raise KernelError(f"linear_dense does not fit sm_{arch}: {num_tokens} tokens of {dtype}")


def multiply_dense(
    backend: Backend,
    weight: DenseWeight,
    x: torch.Tensor,
    out: Output,
    *,
    norm: NormedInput | None = None,
    dependent: bool = False,
) -> None:
    """``out`` gets x [T, K] W.T + bias, any T, 32 rows at a time; x, ``norm``, ``dependent`` as in ``linear.multiply``.

    Weights are used as they are, never converted. A row's bits do not depend on the other rows. Raises ``KernelError``,
    among others for bf16 weights below compute capability 8.0: load them as f16 there.
    """
    matrix = weight.weight
    if not isinstance(matrix, torch.Tensor) or matrix.dim() != 2:
        raise KernelError(f"weight: expected [N, K], found {getattr(matrix, 'shape', type(matrix))}")
    N, K = matrix.shape
    if K % 8 or N % (2 if weight.gated else 1) or not N or not K:
        raise KernelError(f"weight [{N}, {K}]: expected K a multiple of 8{', N even' if weight.gated else ''}")
    check_tensor("weight", matrix, tuple(MIN_ARCH), (N, K), backend.device, 16, rows_apart=True)
    if weight.bias is not None:
        check_tensor("bias", weight.bias, (torch.float32,), (weight.num_tiles * ROWS,), backend.device)
    check_input(K, x, norm, backend.device)
    check_output(weight.num_tiles, x.shape[0], out, backend.device)
    if out.y.shape[1] != weight.num_outputs or out.is_gated != weight.gated:
        raise KernelError(f"output has {out.y.shape[1]} columns: the matrix has {weight.num_outputs} outputs")
    for start in range(0, x.shape[0], MAX_TOKENS):
        stop = min(start + MAX_TOKENS, x.shape[0])
        part = None if norm is None else norm.rows(start, stop)
        _launch(backend, weight, x[start:stop], out.rows(start, stop), part, dependent)


def _launch(
    backend: Backend, weight: DenseWeight, x: torch.Tensor, out: Output, norm: NormedInput | None, dependent: bool
) -> None:
    matrix, num_tokens = weight.weight, x.shape[0]
    config = choose_dense_config(matrix.shape[1], matrix.dtype, num_tokens, backend.arch)
    sumsq, norm_weight, eps = (None, None, 0.0) if norm is None else (norm.sumsq, norm.weight, norm.eps)
    args = [ptr(matrix), ptr(weight.bias), ptr(x), ptr(sumsq), ptr(norm_weight)]
    args += [ptr(out.y), ptr(out.sumsq), ptr(out.permuted), ptr(out.channel_map)]
    args += [i32(matrix.shape[1]), i32(weight.num_outputs), i32(weight.num_tiles)]
    args += [i32(weight.num_outputs if weight.gated else 0), i64(matrix.stride(0)), i32(num_tokens)]
    args += [i32(INPUT_KINDS[x.dtype]), i32(x.stride(0)), i32(config.x_stages)]
    args += [i32(out.kind), i32(OUT_TYPES[out.y.dtype]), i32(out.y.stride(0)), f32(eps), f32(out.scale)]
    shared = config.shared_bytes(matrix.dtype, num_tokens, backend.arch)
    function = backend.load(config.spec(matrix.dtype, backend.arch, out.macros))
    launch(function, (weight.num_tiles,), (32 * NUM_WARPS,), args, shared, dependent=dependent)


def variants(arch: int) -> Iterator[Variant]:
    """All of them."""
    for dtype, least in MIN_ARCH.items():
        for num_tokens in (8, 16, 32) if arch >= least else ():
            for activation in ACTIVATIONS:
                config = choose_dense_config(4096, dtype, num_tokens, arch)
                yield Variant(config.spec(dtype, arch, activation_macros(activation)))
