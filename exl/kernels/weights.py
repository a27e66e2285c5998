"""Packed matrices on the device, as every kernel of quantized linears takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exl.kernels.checks import check_tensor
from exl.kernels.tile_pack import PackedMatrix
from exl.layout.tiles import ROWS, TileLayout


@dataclass(frozen=True)
class TiledWeight:
    """A packed matrix on the device (``exl/layout/tiles.py``): codes i32, qparams u8, bias f32 or None."""

    layout: TileLayout
    codes: torch.Tensor
    qparams: torch.Tensor
    bias: torch.Tensor | None

    @property
    def form(self) -> TileLayout:
        """All that launches depend on besides the tensors."""
        return self.layout

    @classmethod
    def from_packed(cls, packed: PackedMatrix, device: torch.device) -> TiledWeight:
        def tensor(array):
            return None if array is None else torch.from_numpy(array).to(device)

        codes = torch.from_numpy(packed.codes.view("<i4")).to(device)
        return cls(packed.layout, codes, tensor(packed.qparams), tensor(packed.bias))


def check_weight(weight: TiledWeight, device: torch.device) -> None:
    layout = weight.layout
    check_tensor("codes", weight.codes, (torch.int32,), layout.codes_shape, device, 16)
    check_tensor("qparams", weight.qparams, (torch.uint8,), layout.qparams_shape, device, 16)
    if weight.bias is not None:
        check_tensor("bias", weight.bias, (torch.float32,), (layout.num_tiles * ROWS,), device)
