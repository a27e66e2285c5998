"""KV caches of every layout that a CPU can hold, filled with bytes that say where they are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from exl.cache.kv import KVCache
from exl.layout.kv import KV_BITS, DeviceKVLayout, KVLayout

NUM_LAYERS = 3
LAYOUTS = [
    pytest.param(layout(kind, NUM_LAYERS, num_kv_heads, head_dim), id=f"{layout.__name__}-{kind}-{head_dim}")
    for layout, kind, (num_kv_heads, head_dim) in itertools.product(
        (KVLayout, DeviceKVLayout), KV_BITS, ((2, 40), (3, 6))
    )
]
SMALL = DeviceKVLayout("q4", 2, 1, 8)


def filled(layout: KVLayout | DeviceKVLayout, num_pages: int, seed: int = 0) -> KVCache:
    """Random bytes in every place."""
    kv = KVCache(layout, num_pages, torch.device("cpu"))
    bytes_ = np.random.default_rng(seed).integers(0, 256, kv.slab.numel(), np.uint8)
    kv.slab.copy_(torch.from_numpy(bytes_))
    return kv


def page_bytes(kv: KVCache, page: int) -> list[np.ndarray]:
    """All bytes of a page, through what the kernels read: by layer, by array."""
    layers = [kv.layer(i) for i in range(kv.layout.num_layers)]
    arrays = [[layer] if isinstance(layer, torch.Tensor) else layer.arrays() for layer in layers]
    return [
        np.frombuffer(array[page].contiguous().numpy().tobytes(), np.uint8)
        for layer in arrays
        for array in layer
    ]  # fmt: skip
