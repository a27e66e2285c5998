"""Compiles what a model's steps need in one go, before the first of them: one file in the cache instead of many, and
nobody waits in the middle of an answer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from exl.batch import ForwardBatch
from exl.cache.kv import KVCache
from exl.cpu_kernels.dense import dense_kernel
from exl.layout.layers import LayerLayout
from exl.layout.steps import routed_widths
from exl.models.decoder import Decoder, RoutedRows, StepBuffers
from exl.ops.base import LayerWeights
from exl.ops.compiled_ops import CompiledOps
from exl.planning.plan import PlanInput
from exl.weights.loader import ModelWeights

# Rows of steps that take different kernels: a token, and prompts of a few, of some, and of many tokens.
_NUM_ROWS = (1, 2, 4, 12, 33)
_SPEC_FIELDS = (
    "bits",
    "dtype",
    "group_size",
    "symmetric",
    "scale_dtype",
    "code_kind",
)  # that choose a linear's kernels


def load_kernels(
    decoder: Decoder, weights: ModelWeights, model: PlanInput, kv: KVCache, windows: KVCache | None = None
) -> None:
    """Loads the kernels of decode steps and prompts. Nothing is computed, no weight is read. ``windows``: of the layers
    that ``kv`` has not."""
    ops = decoder.ops
    assert isinstance(ops, CompiledOps)
    limits = model.limits
    layers = list(_different(model))
    specs = set()
    for count in sorted({min(count, limits.max_rows) for count in _NUM_ROWS}):
        num_logits = min(count, limits.max_logit_rows)

        def step(count: int = count, num_logits: int = num_logits) -> None:
            h = torch.empty(count, limits.hidden_size)
            widths = (limits.qkv_width, limits.attn_width, limits.intermediate_size)
            routed = {name: torch.empty(count, width) for name, width in routed_widths(limits).items()}
            buffers = StepBuffers(
                *(torch.empty(count, width) for width in widths), RoutedRows(*routed.values()) if routed else None
            )
            decoder.embed(weights.embed, h)
            for layer_idx, layer in layers:
                cache = kv if windows is None or layer_idx in kv else windows
                decoder.layer(layer_idx, layer, buffers, h, cache)
            decoder.head(weights.final_norm, weights.head, h, torch.empty(num_logits, limits.vocab_size))

        specs |= ops.kernels_of(step, _prompt(count, num_logits, windows is not None))
        if model.adapters:
            specs |= ops.kernels_of(step, _prompt(count, num_logits, windows is not None, adapter=0))
            specs |= {dense_kernel(dtype, count, ops.library.isa) for dtype in _adapter_types(model)}
    ops.library.load(specs)


def _adapter_types(model: PlanInput) -> set[str]:
    linears = [linear for adapter in model.adapters for some in adapter.blob.linears.values() for linear in some]
    return {linear.spec.dtype for linear in linears}


def _different(model: PlanInput) -> Iterator[tuple[int, LayerWeights]]:
    """One layer of each kind, with memory that is never touched in the place of its weights."""
    seen = set()
    for layer_idx, (layout, experts) in enumerate(zip(model.layers, model.experts, strict=True)):
        kinds = _kinds(layout), None if experts is None else (experts.count, _kinds(experts.blob))
        if kinds not in seen:
            seen.add(kinds)
            num_bytes = layout.num_bytes + model.expert_bytes[layer_idx]
            yield layer_idx, LayerWeights.view(layout, torch.empty(num_bytes, dtype=torch.uint8), experts)


def _kinds(layout: LayerLayout) -> tuple:
    return tuple(
        (name, linear.kind, *linear.fields, *(getattr(linear.spec, field) for field in _SPEC_FIELDS))
        for name, segments in layout.linears.items()
        for linear in segments
    )


def _prompt(count: int, num_logits: int, has_windows: bool, adapter: int | None = None) -> ForwardBatch:
    """The first tokens of a text, of which the last ones' logits are wanted."""
    table = np.zeros((1, 1), np.int32)
    array = np.arange(count, dtype=np.int32)
    one = np.array([count], np.int32)
    return ForwardBatch(
        token_ids=array,
        positions=array,
        slots=array,
        query_start=np.array([0, count], np.int32),
        context_len=one,
        rope_len=one,
        page_table=table,
        logit_rows=array[count - num_logits :],
        num_decode_rows=0,
        window_slots=array if has_windows else None,
        window_table=table if has_windows else None,
        lora_idx=None if adapter is None else np.array([adapter], np.int32),
    )
