"""Panels of a quantized matrix: every weight is its exact value rounded once, in the right place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from reference.linear_twin import dequantize as exact_weights
from reference.linear_twin import random_matrix

from exl.errors import KernelError
from exl.kernels.dequantize import dequantize
from exl.kernels.launch import Backend
from exl.kernels.tile_pack import pack_matrix
from exl.kernels.weights import TiledWeight
from exl.layout.panels import PANEL_BYTES, panel_tiles
from exl.layout.tiles import TileLayout, gated_rows


def rounded(weights: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Scales have 11 bits and codes at most 9, so f32 holds the product exactly and this rounds once. If scales are f32
    it rounds twice, as the kernel does."""
    return torch.from_numpy(weights).float().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "K", "N", "group_size", "symmetric", "scale_dtype"),
    [
        (4, 384, 40, 128, False, "f16"),
        (4, 96, 16, -1, True, "f16"),
        (3, 608, 24, 32, False, "f16"),
        (2, 1600, 20, 64, True, "f16"),
        (8, 224, 40, 32, False, "f16"),
        (4, 704, 24, 256, False, "f32"),
        (3, 928, 24, 384, False, "bf16"),
        (8, 352, 24, 64, True, "f32"),
    ],
)
def test_every_weight_is_rounded_once(
    backend: Backend,
    bits: int,
    K: int,
    N: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    dtype: torch.dtype,
) -> None:
    matrix = random_matrix(np.random.default_rng(bits), bits, K, N, group_size, symmetric, scale_dtype=scale_dtype)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    panel = torch.full((weight.layout.num_tiles * 16, K), float("nan"), dtype=dtype, device=backend.device)
    dequantize(backend, weight, panel)
    assert torch.equal(panel[:N].cpu(), rounded(exact_weights(matrix).T, dtype))
    assert not panel[N:].any()
    last = torch.full((16, K), float("nan"), dtype=dtype, device=backend.device)
    dequantize(backend, weight, last, first_tile=weight.layout.num_tiles - 1)
    assert torch.equal(last, panel[-16:])


def test_gate_lies_above_up(backend: Backend) -> None:
    rng = np.random.default_rng(1)
    gate, up = (random_matrix(rng, 4, 128, 24, 128) for _ in range(2))
    weight = TiledWeight.from_packed(pack_matrix([gate, up], gated_rows(24)), backend.device)
    panel = torch.full((32, 128), float("nan"), dtype=torch.float16, device=backend.device)
    dequantize(backend, weight, panel, first_tile=1, gated=True)
    assert torch.equal(panel[:16].cpu(), rounded(exact_weights(gate).T[8:24], torch.float16))
    assert torch.equal(panel[16:].cpu(), rounded(exact_weights(up).T[8:24], torch.float16))


@pytest.mark.parametrize("arch", [61, 75])
def test_other_architectures(arch: int) -> None:
    backend = backend_or_skip("race", arch)
    matrix = random_matrix(np.random.default_rng(2), 4, 256, 16, 64)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    panel = torch.full((16, 256), float("nan"), dtype=torch.bfloat16)
    dequantize(backend, weight, panel)
    assert torch.equal(panel, rounded(exact_weights(matrix).T, torch.bfloat16))


def test_panels_are_bounded() -> None:
    assert panel_tiles(TileLayout(4, 4096, 22016, 128, True)) == 512
    assert panel_tiles(TileLayout(4, 4096, 256, 128, True)) == 16
    assert panel_tiles(TileLayout(4, 4096, 22016, 128, True), max_bytes=20 * 2**20) == 160
    with pytest.raises(KernelError, match=r"panel of 1000 bytes: expected 131072 \(one tile\)"):
        panel_tiles(TileLayout(4, 4096, 22016, 128, True), max_bytes=1000)


class NeverLaunches:
    device = torch.device("cpu")
    arch = 86
    num_multiprocessors = 4

    def load(self, spec):
        pytest.fail(f"{spec} was loaded in spite of its arguments")


@pytest.mark.parametrize(
    ("out", "first_tile", "message"),
    [
        (torch.zeros(24, 128, dtype=torch.float16), 0, r"expected \[16 n, 128\]"),
        (torch.zeros(32, 64, dtype=torch.float16), 0, r"panel has shape \(32, 64\)"),
        (torch.zeros(32, 128), 0, "panel is torch.float32"),
        (torch.zeros(128, 32, dtype=torch.float16).T, 0, "panel has strides"),
        (torch.zeros(32 * 128 + 1, dtype=torch.float16)[1:].view(32, 128), 0, "panel starts at address"),
        (torch.zeros(32, 128, dtype=torch.float16), 2, r"tiles 2..3: the matrix has 3"),
        (torch.zeros(16, 128, dtype=torch.float16), -1, r"tiles -1..-1"),
    ],
)
def test_refused_before_any_launch(out: torch.Tensor, first_tile: int, message: str) -> None:
    weight = TiledWeight.from_packed(
        pack_matrix([random_matrix(np.random.default_rng(3), 4, 128, 40, 128)]), NeverLaunches.device
    )
    with pytest.raises(KernelError, match=message):
        dequantize(NeverLaunches(), weight, out, first_tile)


def test_a_panel_too_large_is_refused() -> None:
    layout = TileLayout(4, 4096, 16384, 4096, True)
    weight = TiledWeight(
        layout,
        torch.zeros(layout.codes_shape, dtype=torch.int32),
        torch.zeros(layout.qparams_shape, dtype=torch.uint8),
        None,
    )
    out = torch.empty((PANEL_BYTES // 8192 + 16, 4096), dtype=torch.float16)
    with pytest.raises(KernelError, match="bytes: expected 67108864 or less"):
        dequantize(NeverLaunches(), weight, out)
