"""Adapters in memory: each a blob of its own, packed as its layout says, and what the decoder's operations take of it.
They stay there whole, also where layers are streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from exl.adapters.manifest import AdapterLayout, blob_name, open_weights
from exl.formats.load import load_part
from exl.memory.host import HostBuffer
from exl.ops.base import Lora, Loras, Ops, view_segments

SLAB = "adapters"


@dataclass(frozen=True)
class AdapterWeights:
    """``loras``: by layer and linear; (): there are none. ``names``: in the order of the adapters' numbers."""

    names: tuple[str, ...] = ()
    loras: Sequence[Mapping[str, Loras]] = ()
    num_bytes: int = 0


def load_adapters(layouts: Sequence[AdapterLayout], ops: Ops, stack: ExitStack) -> AdapterWeights:
    """On a CPU. ``stack`` gives the memory back. Raises ``CheckpointError`` if a file cannot be read, or is another one
    than when its layout was made; ``MemoryBudgetError``."""
    if not layouts:
        return AdapterWeights()
    found = [_load(layout, ops, stack) for layout in layouts]
    loras: list[Mapping[str, Loras]] = []
    for of_each in zip(*found, strict=True):
        linears = dict.fromkeys(name for layer in of_each for name in layer)
        loras.append({name: tuple(layer.get(name, ()) for layer in of_each) for name in linears})
    names = tuple(layout.manifest.name for layout in layouts)
    return AdapterWeights(names, loras, sum(layout.num_bytes for layout in layouts))


def _load(layout: AdapterLayout, ops: Ops, stack: ExitStack) -> list[dict[str, tuple[Lora, ...]]]:
    """By layer, of one adapter."""
    blob, adapter = layout.blob, layout.manifest
    buffer = HostBuffer(layout.num_bytes, SLAB)
    stack.callback(buffer.close)
    memory = torch.from_numpy(buffer.array)
    with open_weights(adapter.folder) as tensors:
        for name, linears in blob.linears.items():
            for i, linear in enumerate(linears):
                start, stop = blob.linear_range(name, i)
                parts = [load_part(tensors, part, None) for part in linear.spec.parts]
                ops.pack(parts, linear, memory[start:stop])
    layers: list[dict[str, tuple[Lora, ...]]] = []
    for layer_idx, terms_of in enumerate(adapter.layers):
        layer: dict[str, tuple[Lora, ...]] = {}
        for name, terms in terms_of.items():
            views = view_segments(blob, memory, blob_name(layer_idx, name))
            layer[name] = tuple(
                Lora(views[2 * i], views[2 * i + 1], term.start, term.scale) for i, term in enumerate(terms)
            )
        layers.append(layer)
    return layers
