"""Keys that are turned in the cache, in each backend's pages and each type, against RoPE in f64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl.batch import PAGE_SIZE
from exl.cache.kv import KVCache, KVPages
from exl.checkpoint.rope_config import RopeConfig
from exl.layout.cpu_pages import page_arrays
from exl.layout.kv import KV_BITS, KV_GROUP, DeviceKVLayout, KVLayout, page_offsets
from exl.layout.pages import PageLayout, pack_pages, unpack_pages
from exl.ops.rope import inverse_frequencies
from exl.ops.torch_kv import dequantize_rows, quantize_rows
from exl.ops.turned_keys import turn_keys

LAYERS, HEADS, D, POSITIONS = 2, 2, 48, 3000
ROPES = {"plain": RopeConfig(), "half": RopeConfig(partial_rotary_factor=0.5), "yarn": RopeConfig("yarn", factor=4.0)}
# The largest error of a value by its group's largest: half a step of 127, or a step of 8, to which the largest value is
# cut if it is positive; the scale's own rounding; and f16's and f32's.
ERRORS = {8: 1 / 254 + 2**-10, 4: 1 / 8 + 2**-10, 16: 2**-11, 32: 2**-21}


def filled(kind: str, where: str) -> KVCache:
    layout = (KVLayout if where == "torch" else DeviceKVLayout)(kind, LAYERS, HEADS, D)
    kv, generator = KVCache(layout, 4, torch.device("cpu")), torch.Generator().manual_seed(1)
    for layer_idx in range(LAYERS):
        pages = kv.layer(layer_idx)
        rows = torch.randn(2, 4 * PAGE_SIZE, HEADS, D, generator=generator)
        if where == "gpu":
            pages.copy_(torch.from_numpy(pack_pages(PageLayout(kind, D), rows[0].numpy(), rows[1].numpy())))
            continue
        for values, bits, name in zip(rows, KV_BITS[kind], "kv", strict=True):
            stored = (values, None) if bits >= 16 else quantize_rows(values, bits)
            for array, suffix in zip(stored, ("", "_scales"), strict=True):
                if array is None:
                    continue
                paged = array.unflatten(0, (4, PAGE_SIZE))
                if isinstance(pages, KVPages):
                    getattr(pages, name + suffix).copy_(paged)
                else:
                    target = torch.from_numpy(getattr(page_arrays(pages.numpy(), kind, D), name + suffix))
                    order = (0, 2, 3, 1) if name == "k" else (0, 2, 1, 3)
                    target.copy_(paged.permute(order).contiguous().view(target.dtype) if bits == 8 and not suffix
                                 else paged.permute(order))  # fmt: skip
    return kv


def keys(kv: KVCache, where: str, page: int) -> np.ndarray:
    """f64 [layer, token, head, D] as stored: after the Hadamard rotation, if there is one."""
    found, kind = [], kv.layout.kind
    for layer_idx in range(LAYERS):
        pages = kv.layer(layer_idx)
        if where == "gpu":
            k, _ = unpack_pages(PageLayout(kind, D), pages[page : page + 1].numpy())
            found.append(k)
            continue
        if isinstance(pages, KVPages):
            codes, scales = pages.k[page], None if pages.k_scales is None else pages.k_scales[page]
        else:
            arrays = page_arrays(pages[page].numpy(), kind, D)
            codes, scales = (torch.from_numpy(x).permute(2, 0, 1).contiguous() for x in (arrays.k, arrays.k_scales))
        if KV_BITS[kind][0] < 16:
            codes = dequantize_rows(codes.view(torch.uint8), scales, D)
        found.append(codes.numpy())
    return np.stack(found).astype(np.float64)


def hadamard(x: np.ndarray, size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (x.reshape(*x.shape[:-1], -1, size) @ matrix / np.sqrt(size)).reshape(x.shape)


def turned(x: np.ndarray, rope: RopeConfig) -> np.ndarray:
    angles = inverse_frequencies(rope, D, 0)[0].astype(np.float64) * POSITIONS
    half, out = len(angles), x.copy()
    low, high = x[..., :half], x[..., half : 2 * half]
    out[..., :half] = low * np.cos(angles) - high * np.sin(angles)
    out[..., half : 2 * half] = high * np.cos(angles) + low * np.sin(angles)
    return out


CASES = [(where, kind) for where in ("torch", "compiled", "gpu") for kind in KV_BITS if (where, kind) != ("gpu", "f32")]


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize(("where", "kind"), CASES)
def test_keys_are_those_of_later_positions_and_nothing_else_changes(where, kind, rope):
    kv = filled(kind, where)
    before, bits = kv.slab.clone(), KV_BITS[kind][0]
    size = D & -D if bits < 16 else 1
    turn_keys(kv, [rope] * kv.layout.num_layers, [2, 0], [3, 1], POSITIONS, on_gpu=where == "gpu")
    for src, dst in ((2, 3), (0, 1)):
        expected = hadamard(turned(hadamard(keys(kv, where, src), size), rope), size)
        padded = np.pad(np.abs(expected), [(0, 0)] * 3 + [(0, -D % KV_GROUP)])
        largest = padded.reshape(*expected.shape[:-1], -1, KV_GROUP).max(-1).repeat(KV_GROUP, -1)[..., :D]
        assert (np.abs(keys(kv, where, dst) - expected) <= ERRORS[bits] * largest).all()
        assert np.abs(keys(kv, where, src) - expected).max() > 0.5
    untouched = kv.slab.clone()
    kv.slab.copy_(before)
    kv.copy_pages([2, 0], [3, 1])  # the source, and values of the copies: bit for bit
    for layer_idx in range(LAYERS):
        pages = kv.layer(layer_idx)
        if isinstance(pages, KVPages):
            now = KVCache(kv.layout, 4, torch.device("cpu"))
            now.slab.copy_(untouched)
            for name in ("v", "v_scales"):
                if getattr(pages, name) is not None:
                    assert torch.equal(getattr(now.layer(layer_idx), name), getattr(pages, name))
            assert torch.equal(now.layer(layer_idx).k[[0, 2]], pages.k[[0, 2]])
        else:
            now, start = untouched.view_as(kv.slab).split(kv.layout.layer_bytes(4))[layer_idx].view_as(pages), 0
            start = page_offsets(kind, D).v_codes
            assert torch.equal(now[..., start:], pages[..., start:])
            assert torch.equal(now[[0, 2]], pages[[0, 2]])
