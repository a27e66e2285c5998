"""Checkpoint -> packed blobs, layer by layer. Peak host memory: the blobs, and one matrix as the file has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from exl.checkpoint import Checkpoint
from exl.config import ModelConfig
from exl.formats import load_matrix, read_vector
from exl.layout import LayerLayout
from exl.models.manifest import ModelManifest
from exl.ops.base import LayerWeights, Linear, Ops, view_field, view_segments
from exl.quant_config import QuantConfig

Progress = Callable[[int, int], None]  # bytes packed so far, bytes in all


@dataclass(frozen=True)
class ModelWeights:
    embed: Linear
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [C] f32
    head: Linear
    num_bytes: int


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quant: QuantConfig | None,
    manifest: ModelManifest,
    ops: Ops,
    progress: Progress | None = None,
) -> ModelWeights:
    """One pass over the checkpoint. Raises ``CheckpointError`` for what only the data can show to be wrong."""
    layouts = manifest.layouts(ops.target)
    names, done = manifest.names, 0

    def fill(layout: LayerLayout, prefix: str, norms: dict[str, str]) -> torch.Tensor:
        nonlocal done
        blob = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=ops.device)
        for key in layout.fields.keys() & norms.keys():
            vector = torch.from_numpy(read_vector(checkpoint, prefix + norms[key]))
            view_field(blob, layout.fields[key]).copy_(vector)
        for key, linears in layout.linears.items():
            for i, linear in enumerate(linears):
                start, stop = layout.linear_range(key, i)
                parts = [load_matrix(checkpoint, part.name, quant) for part in linear.spec.parts]
                ops.pack(parts, linear, blob[start:stop])
        done += layout.num_bytes
        if progress is not None:
            progress(done, layouts.num_bytes)
        return blob

    embed = view_segments(layouts.embed, fill(layouts.embed, "", {}), "embed")[0]
    layers = tuple(
        LayerWeights.view(layout, fill(layout, f"{names.layers}.{i}.", dict(names.norms)))
        for i, layout in enumerate(layouts.layers)
    )
    head_blob = fill(layouts.head, "", {"final_norm": names.final_norm})
    head = embed if config.tie_embeddings else view_segments(layouts.head, head_blob, "head")[0]
    final_norm = view_field(head_blob, layouts.head.fields["final_norm"])
    return ModelWeights(embed, layers, final_norm, head, layouts.num_bytes)
