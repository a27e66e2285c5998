"""Quantized linears on the GPU: y = x W, straight from the codes (``linear_q.cu``, ``linear_q_wide.cu``).

For any number of tokens, 64 at a time. ``Output`` says what becomes of the product: it is stored, or a gated product
is, or it is added to the f32 residual, which leaves the residual's sums of squares for the next norm. A row's bits
depend neither on the other rows nor on the configuration. Arguments are checked before anything is launched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch

from exl.errors import KernelError
from exl.kernels.args import Arg, f32, i32, ptr
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
from exl.kernels.linear_simt import run_simt, simt_spec
from exl.kernels.spec import KernelSpec, Variant
from exl.kernels.weights import TiledWeight, check_weight
from exl.layout.linear_config import (
    MAX_TOKENS,
    MIN_ARCH,
    NARROW_TOKENS,
    NUM_SLICES,
    NUM_THREADS,
    LinearConfig,
    choose_config,
    scratch_shapes,
)
from exl.layout.tiles import TileLayout


@dataclass(frozen=True)
class LinearScratch:
    """Memory that launches of more than 8 tokens share, one at a time: see ``scratch_shapes``."""

    x: torch.Tensor  # f16 [64 * K]: rounded activations
    x_scale: torch.Tensor  # f32 [64, 8]
    partial: torch.Tensor  # f32: sums of slices
    arrived: torch.Tensor  # i32, zero; kernels leave it zero


def make_scratch(layouts: list[TileLayout], backend: Backend) -> LinearScratch:
    dtypes = {"f16": torch.float16, "f32": torch.float32, "i32": torch.int32}
    shapes = scratch_shapes(layouts, backend.arch, backend.num_multiprocessors)
    return LinearScratch(**{k: torch.zeros(n, dtype=dtypes[t], device=backend.device) for k, (t, n) in shapes.items()})


def multiply(
    backend: Backend,
    weight: TiledWeight,
    x: torch.Tensor,
    out: Output,
    *,
    norm: NormedInput | None = None,
    scratch: LinearScratch | None = None,
    config: LinearConfig | None = None,
    dependent: bool = False,
) -> None:
    """``out`` gets x [T, K] W + bias: stored, gated or added, as it says.

    x is f16 or bf16, or with ``norm`` the f32 residual, normalised on the way. Rows of x and of the output may lie
    apart, their elements may not. More than 8 tokens need ``scratch``. ``config`` overrides the choice for up to 64
    tokens. ``dependent``: start before the launches before it on the stream have ended (sm_90 and up), which must then
    not write the weight. Raises ``KernelError``.
    """
    check_weight(weight, backend.device)
    check_input(weight.layout.K, x, norm, backend.device)
    check_output(weight.layout.num_tiles, x.shape[0], out, backend.device)
    num_tokens = x.shape[0]
    if backend.arch < MIN_ARCH and config is None:
        return run_simt(backend, weight, x, out, norm)
    if num_tokens > NARROW_TOKENS:
        _check_scratch(weight.layout, num_tokens, scratch, backend, config)
    for start in range(0, num_tokens, MAX_TOKENS):
        stop = min(start + MAX_TOKENS, num_tokens)
        part = None if norm is None else norm.rows(start, stop)
        _launch(backend, weight, x[start:stop], out.rows(start, stop), part, scratch, config, dependent)


def _launch(
    backend: Backend,
    weight: TiledWeight,
    x: torch.Tensor,
    out: Output,
    norm: NormedInput | None,
    scratch: LinearScratch | None,
    config: LinearConfig | None,
    dependent: bool,
) -> None:
    layout, num_tokens = weight.layout, x.shape[0]
    if config is None:
        config = choose_config(layout, num_tokens, backend.arch, backend.num_multiprocessors)
    function = backend.load(linear_spec(config, layout, backend.arch, out.macros))
    shared = config.shared_bytes(layout, num_tokens, backend.arch)
    kind = INPUT_KINDS[x.dtype]
    sumsq, norm_weight, eps = (None, None, 0.0) if norm is None else (norm.sumsq, norm.weight, norm.eps)
    matrix = [ptr(weight.codes), ptr(weight.qparams), ptr(weight.bias)]
    target = [ptr(out.y), ptr(out.sumsq), ptr(out.permuted), ptr(out.channel_map)]
    sizes = [i32(layout.K), i32(out.y.shape[1]), i32(layout.num_tiles), i32(layout.num_blocks), i32(layout.group_units)]
    ending = [i32(out.kind), i32(OUT_TYPES[out.y.dtype]), i32(out.y.stride(0))]
    args: list[Arg]
    if not config.wide:
        args = [*matrix, ptr(x), ptr(sumsq), ptr(norm_weight), *target, *sizes, i32(num_tokens), i32(kind)]
        args += [i32(x.stride(0)), i32(config.x_stages), *ending, f32(eps), f32(out.scale)]
    else:
        x_scale = None
        if kind != INPUT_KINDS[torch.float16]:
            x, x_scale = _round(backend, layout, x, norm, scratch, dependent)
        args = [*matrix, ptr(x), ptr(x_scale), *target, ptr(scratch.partial), ptr(scratch.arrived), *sizes]
        args += [i32(num_tokens), i32(x.stride(0)), i32(config.x_stages), *ending, f32(out.scale)]
    launch(function, config.grid(layout), (NUM_THREADS,), args, shared, dependent=dependent)


def _round(
    backend: Backend,
    layout: TileLayout,
    x: torch.Tensor,
    norm: NormedInput | None,
    scratch: LinearScratch,
    dependent: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """f16 activations for the wide kernel, and what their sums over a slice are multiplied by."""
    num_tokens, K = x.shape
    rounded = scratch.x[: num_tokens * K].view(num_tokens, K)
    round_activations(backend, layout.stage_inputs, x, norm, rounded, scratch.x_scale, dependent)
    return rounded, scratch.x_scale if norm is None else None


def round_activations(
    backend: Backend,
    stage_inputs: int,
    x: torch.Tensor,
    norm: NormedInput | None,
    rounded: torch.Tensor,
    x_scale: torch.Tensor | None,
    dependent: bool = False,
) -> None:
    """rounded f16 [T, K] = x normalised, or x in bf16 with ``x_scale`` f32 [T, 8] to multiply sums over slices by.

    The caller has checked its arguments.
    """
    num_tokens, K = x.shape
    spec = KernelSpec("round_activations.cu", "round_activations", {"EXL_STAGE_K": stage_inputs}, backend.arch)
    sumsq, weight, eps = (None, None, 0.0) if norm is None else (norm.sumsq, norm.weight, norm.eps)
    args = [ptr(x), ptr(sumsq), ptr(weight), ptr(rounded), ptr(x_scale), i32(K), i32(num_tokens)]
    args += [i32(INPUT_KINDS[x.dtype]), i32(x.stride(0)), f32(eps)]
    launch(backend.load(spec), (num_tokens,), (NUM_THREADS,), args, dependent=dependent)


def linear_spec(
    config: LinearConfig, layout: TileLayout, arch: int, ending: Mapping[str, int] = NO_MACROS
) -> KernelSpec:
    """The kernel that runs ``config``; ``ending``: ``Output.macros``."""
    name = "linear_q_wide" if config.wide else "linear_q"
    return KernelSpec(f"{name}.cu", name, config.macros(layout) | ending, arch)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_scratch(
    layout: TileLayout, num_tokens: int, scratch: LinearScratch | None, backend: Backend, config: LinearConfig | None
) -> None:
    if scratch is None:
        raise KernelError(f"{num_tokens} tokens: more than {NARROW_TOKENS} need scratch memory")
    counts = {min(MAX_TOKENS, num_tokens), num_tokens % MAX_TOKENS or MAX_TOKENS}
    configs = [config] if config is not None else [
        choose_config(layout, count, backend.arch, backend.num_multiprocessors) for count in counts
    ]  # fmt: skip
    configs = [c for c in configs if c.wide]  # a rest of few tokens needs none
    least = {
        "x": (torch.float16, min(MAX_TOKENS, num_tokens) * layout.K),
        "x_scale": (torch.float32, MAX_TOKENS * NUM_SLICES),
        "partial": (torch.float32, max(c.partial_bytes(layout) for c in configs) // 4),
        "arrived": (torch.int32, max(c.row_blocks(layout) for c in configs)),
    }
    for name, (dtype, count) in least.items():
        tensor = getattr(scratch, name)
        check_tensor(f"scratch.{name}", tensor, (dtype,), (tensor.numel(),), backend.device, 16)
        if tensor.numel() < count:
            raise KernelError(f"scratch.{name} has {tensor.numel()} elements: expected {count} or more")


# ---- what CI compiles ----------------------------------------------------------------------------------------------


# Layouts that differ where macros do; the others differ from these in one macro that changes little.
COMPILED = tuple(
    TileLayout(bits, 4096, 4096, group_size, symmetric, scale_dtype)
    for bits, group_size, symmetric, scale_dtype in (
        (4, 128, False, "f16"), (4, 128, True, "f16"), (4, 64, False, "f16"), (4, 32, False, "f16"),
        (4, 256, False, "f16"), (4, 128, True, "bf16"), (4, 128, False, "f32"), (8, 128, False, "f16"),
        (8, 32, True, "f32"), (3, 128, False, "f16"), (3, 64, True, "bf16"), (2, 64, False, "f16"),
        (2, 256, True, "f16"),
    )
)  # fmt: skip


def variants(arch: int) -> Iterator[Variant]:
    """Macro sets that ``choose_config`` asks for on ``arch``: all of them for each layout in ``COMPILED``, and with the
    other activation those of the first."""
    for stage in (128, 256):
        yield Variant(KernelSpec("round_activations.cu", "round_activations", {"EXL_STAGE_K": stage}, arch))
    endings = [(layout, NO_MACROS) for layout in COMPILED]
    endings += [(COMPILED[0], activation_macros(other)) for other in ACTIVATIONS[1:]]
    if arch < MIN_ARCH:
        for layout, ending in endings:
            for tokens in (1, 2, 4):
                yield Variant(simt_spec(layout, tokens, arch, ending))
        return
    seen = set()
    for layout, ending in endings:
        for tokens, K in product((1, 2, 3, 4, 8, 16, 32, 64), (896, 4096, 28672)):
            for num_multiprocessors in (1, 32, 128, 1024):
                config = choose_config(replace(layout, K=K), tokens, arch, num_multiprocessors)
                spec = linear_spec(config, layout, arch, ending)
                if spec not in seen:
                    seen.add(spec)
                    # 64 tokens of 2 or 3 bits: some architectures keep up to 32 bytes a thread outside of the loop
                    yield Variant(spec, may_spill=layout.bits in (2, 3) and config.token_tiles == 8 and arch >= 100)
