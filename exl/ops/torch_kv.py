"""Quantized K and V on the CPU. ``docs/memory.md`` defines codes and scales, the same for every device."""

from __future__ import annotations

import torch

from exl.layout.kv import KV_GROUP

_F16_MAX = 65504.0


def as_stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in a cache's type that is not quantized. f16 saturates, as the kernels do: an infinity would spread NaN."""
    return (x.clamp(-_F16_MAX, _F16_MAX) if dtype == torch.float16 else x).to(dtype)


def hadamard(x: torch.Tensor, size: int) -> None:
    """Orthonormal Walsh-Hadamard transform of every run of ``size`` channels (a power of two), in place.

    Uses only additions, so that no bit of a row depends on other rows, as it could in a matrix product.
    """
    runs = x.unflatten(-1, (-1, size))
    half = 1
    while half < size:
        pairs = runs.unflatten(-1, (-1, 2, half))
        low, high = pairs.select(-2, 0), pairs.select(-2, 1)
        difference = low - high
        low.add_(high)
        high.copy_(difference)
        half *= 2
    if size > 1:
        x.mul_(size**-0.5)


def quantize_rows(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x f32 [..., D] -> codes u8 [..., D * bits / 8], scales f16 [..., ceil(D / 32)].

    8 bits: scale = largest magnitude / 127, codes -127..127. 4 bits: the value of largest magnitude gets code -8, so
    the scale may be negative; codes -8..7. Codes are chosen for the scale as stored, in f16.
    """
    D = x.shape[-1]
    padding = -D % KV_GROUP
    groups = torch.nn.functional.pad(x, (0, padding)).unflatten(-1, (-1, KV_GROUP))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = extreme.abs() / 127 if bits == 8 else extreme / -8
    scales = scales.clamp(-_F16_MAX, _F16_MAX).half()
    wide = scales.float()
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    codes = torch.where(wide == 0, 0, groups / wide).round_().clamp_(low, high).to(torch.int8).flatten(-2)[..., :D]
    if bits == 8:
        return codes.view(torch.uint8), scales[..., 0]
    nibbles = (codes + 8).view(torch.uint8)
    return nibbles[..., : D // 2] | nibbles[..., D // 2 :] << 4, scales[..., 0]


def dequantize_rows(codes: torch.Tensor, scales: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of ``quantize_rows``: f32 [..., D]."""
    if codes.shape[-1] == head_dim:
        values = codes.view(torch.int8).float()
    else:
        values = torch.cat([codes & 15, codes >> 4], dim=-1).float().sub_(8)
    whole = head_dim // KV_GROUP * KV_GROUP
    wide = scales.float()
    if whole:
        values[..., :whole].unflatten(-1, (-1, KV_GROUP)).mul_(wide[..., : whole // KV_GROUP, None])
    if whole < head_dim:
        values[..., whole:].mul_(wide[..., -1:])
    return values
