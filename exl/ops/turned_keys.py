"""Keys in the cache as if their tokens stood at later positions: RoPE turned on, in each backend's own pages.

A key lies in the cache after norm and RoPE and, if the cache is quantized, after a Hadamard rotation (its own inverse).
It is taken out of that, turned in f32, and stored as new keys are. One rounding of the cache's type is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from exl.cache.kv import KVCache, KVPages
from exl.checkpoint.rope_config import RopeConfig
from exl.layout.cpu_pages import page_arrays
from exl.layout.kv import KV_BITS
from exl.layout.pages import PageLayout, replace_keys, unpack_pages
from exl.ops.rope import inverse_frequencies
from exl.ops.torch_kv import as_stored, dequantize_rows, hadamard, quantize_rows


def turn_keys(
    kv: KVCache,
    ropes: Sequence[RopeConfig],
    src: Sequence[int],
    dst: Sequence[int],
    num_positions: int,
    *,
    on_gpu: bool,
) -> None:
    """Makes pages ``dst`` those of ``src``, whose tokens stand ``num_positions`` later. ``ropes``: of each layer;
    ``on_gpu``: the slab is in the order of a GPU's kernels. Waits for the device. Not for RoPE that depends on the
    length of the text."""
    kv.copy_pages(src, dst)
    for layer_idx, rope in enumerate(ropes):
        frequencies, _ = inverse_frequencies(rope, kv.layout.head_dim, 0)
        angles = torch.from_numpy(frequencies.astype(np.float64)) * num_positions
        cosine, sine = angles.cos().float(), angles.sin().float()
        pages = kv.layer(layer_idx)
        for page in dst:
            if isinstance(pages, KVPages):
                _turn_torch(pages, page, kv.layout.head_dim, cosine, sine)
            elif on_gpu:
                _turn_gpu(pages, page, kv.layout.kind, kv.layout.head_dim, cosine, sine)
            else:
                _turn_compiled(pages, page, kv.layout.kind, kv.layout.head_dim, cosine, sine)


def _turn(keys: torch.Tensor, size: int, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    """f32 [..., D] in place: channel i with channel i + rotary_dim / 2. ``size``: of the Hadamard rotation."""
    hadamard(keys, size)
    half = len(cosine)
    low, high = keys[..., :half], keys[..., half : 2 * half]
    turned = low * cosine - high * sine
    high.mul_(cosine).add_(low * sine)
    low.copy_(turned)
    hadamard(keys, size)


def _turn_torch(pages: KVPages, page: int, head_dim: int, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    codes = pages.k[page]
    if pages.k_scales is None:
        keys = codes.float()
        _turn(keys, 1, cosine, sine)
        codes.copy_(as_stored(keys, codes.dtype))
        return
    keys = dequantize_rows(codes, pages.k_scales[page], head_dim)
    _turn(keys, head_dim & -head_dim, cosine, sine)
    new_codes, scales = quantize_rows(keys, 8 * codes.shape[-1] // head_dim)
    codes.copy_(new_codes)
    pages.k_scales[page].copy_(scales)


def _turn_compiled(
    pages: torch.Tensor, page: int, kind: str, head_dim: int, cosine: torch.Tensor, sine: torch.Tensor
) -> None:
    """Codes [kv head, channels, 64 tokens], scales [kv head, groups, 64 tokens]."""
    arrays, bits = page_arrays(pages[page].numpy(), kind, head_dim), KV_BITS[kind][0]
    codes, scales = (torch.from_numpy(array).transpose(1, 2) for array in (arrays.k, arrays.k_scales))
    if bits >= 16:
        keys = codes.float().contiguous()
        _turn(keys, 1, cosine, sine)
        codes.copy_(as_stored(keys, codes.dtype))
        return
    keys = dequantize_rows(codes.contiguous().view(torch.uint8), scales, head_dim).contiguous()
    _turn(keys, head_dim & -head_dim, cosine, sine)
    new_codes, new_scales = quantize_rows(keys, bits)
    codes.copy_(new_codes.view(codes.dtype))
    scales.copy_(new_scales)


def _turn_gpu(
    pages: torch.Tensor, page: int, kind: str, head_dim: int, cosine: torch.Tensor, sine: torch.Tensor
) -> None:
    layout = PageLayout(kind, head_dim)
    found = pages[page : page + 1].cpu().numpy()
    keys = torch.from_numpy(np.ascontiguousarray(unpack_pages(layout, found)[0]))
    _turn(keys, layout.hadamard_size, cosine, sine)
    hadamard(keys, layout.hadamard_size)  # which storing does
    pages[page : page + 1].copy_(torch.from_numpy(replace_keys(layout, found, keys.numpy())))
