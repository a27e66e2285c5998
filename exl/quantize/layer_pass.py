"""Runs calibration sequences through one layer at a time, or a part of it, and captures the inputs of its linears.

The forward pass is the decoder's own, over the operations that models run by; none of it is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from exl.batch import I32, ForwardBatch
from exl.cache.kv import KVCache, KVPages
from exl.checkpoint.checkpoint import Checkpoint
from exl.families.config import ModelConfig
from exl.formats.load import load_matrix, load_part
from exl.formats.tensors import read_norm, to_float
from exl.layout.layers import LayerLayout, layer_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec
from exl.layout.steps import ExpertLimits, StepLimits
from exl.models.decoder import Decoder, RoutedRows, StepBuffers
from exl.models.manifest import ModelManifest
from exl.ops.base import LayerWeights, Linear, Segments, view_field, view_segments
from exl.quantize.calibration import make_chunks, num_pages
from exl.quantize.compute import Compute
from exl.quantize.span_ops import Stopped
from exl.quantize.steps import ATTN, HIDDEN, MLP
from exl.threads import layer_kind

_CHUNK_ROWS = 2048  # bounds the activations that are alive at once; larger chunks do not multiply faster


@dataclass(frozen=True)
class Head:
    final_norm: torch.Tensor  # f32 [C]
    linear: Linear


class _OneLayerCache(KVCache):
    """One layer's pages, shared by all layers: layers run one after another and none reads another's cache."""

    def layer(self, layer_idx: int) -> KVPages:
        return super().layer(0)


class LayerPass:
    """Runs the sequences chunk by chunk. Peak memory: one chunk's activations. The caller holds weights and hidden
    states."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        manifest: ModelManifest,
        sequences: Sequence[I32],
        compute: Compute,
        max_logit_rows: int = 1,
    ) -> None:
        """``max_logit_rows``: rows of which :meth:`logits` gives the logits at a time."""
        self.checkpoint, self.config, self.manifest, self.compute = checkpoint, config, manifest, compute
        max_rows = max(_CHUNK_ROWS, max((len(sequence) for sequence in sequences), default=0))
        self.chunks = make_chunks(sequences, max_rows)
        max_rows = max((chunk.num_rows for chunk in self.chunks), default=1)
        limits = StepLimits(
            max_rows=max_rows,
            window_rows=max_rows,
            max_logit_rows=max_logit_rows,
            max_context=max_rows,
            hidden_size=config.hidden_size,
            qkv_width=config.qkv_width,
            attn_width=config.attn_width,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            head_dim=config.head_dim,
            max_sequences=max((chunk.num_sequences for chunk in self.chunks), default=1),
            experts=_expert_limits(config),
        )
        self._max_logit_rows = max_logit_rows
        self._ops = compute.span_ops(limits, config.num_kv_heads)
        self._decoder = Decoder(config, self._ops)
        pages = max(map(num_pages, self.chunks), default=1)
        self._kv = _OneLayerCache(self._ops.kv_layout, pages, self._ops.device)
        self._buffers = StepBuffers(
            qkv=torch.empty(max_rows, config.qkv_width),
            attn=torch.empty(max_rows, config.attn_width),
            mlp=torch.empty(max_rows, config.intermediate_size),
            routed=_routed_rows(config, max_rows),
        )

    def embed(self) -> Iterator[torch.Tensor]:
        """The first layer's input for each chunk, f32 [T, C]."""
        table, _ = self._read_table(self.manifest.embed, "embed")
        for chunk in self.chunks:
            h = torch.empty(chunk.num_rows, self.config.hidden_size)
            self._ops.stage([chunk])
            self._decoder.embed(table, h)
            self._ops.fence()
            yield h

    def _read_table(self, spec: BlobSpec, name: str) -> tuple[Linear, dict[str, torch.Tensor]]:
        """A linear in the file's own type, and the norms beside it."""
        layout = layer_layout(spec, self._ops.target)
        blob = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        start, stop = layout.linear_range(name, 0)
        matrix = load_matrix(self.checkpoint, layout.linears[name][0].spec.parts[0].name, self.manifest.quant)
        self._ops.pack([matrix], layout.linears[name][0], blob[start:stop])
        return view_segments(layout, blob, name)[0], self._read_norms(layout, blob)

    def _read_norms(self, layout: LayerLayout, blob: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {norm.name: view_field(blob, layout.fields[norm.name]) for norm in layout.norms}
        for norm in layout.norms:
            found[norm.name].copy_(torch.from_numpy(read_norm(self.checkpoint, norm.tensor, norm)))
        return found

    def read_head(self) -> Head:
        """If the embedding is also the head, that."""
        manifest = self.manifest
        if not manifest.tied:
            linear, norms = self._read_table(manifest.head, "head")
            return Head(norms["final_norm"], linear)
        layout = layer_layout(manifest.head, self._ops.target)
        norms = self._read_norms(layout, torch.zeros(layout.num_bytes, dtype=torch.uint8))
        return Head(norms["final_norm"], self._read_table(manifest.embed, "embed")[0])

    def logits(self, head: Head, chunk: ForwardBatch, h: torch.Tensor) -> Iterator[torch.Tensor]:
        """The logits [R, V] of hidden states [T, C] behind the last layer, some rows at a time; each valid until the
        next."""
        out = torch.empty(self._max_logit_rows, self.config.vocab_size)
        for start in range(0, chunk.num_rows, self._max_logit_rows):
            rows = np.arange(start, min(chunk.num_rows, start + self._max_logit_rows), dtype=np.int32)
            self._ops.stage([replace(chunk, logit_rows=rows)])
            logits = self._decoder.head(head.final_norm, head.linear, h, out)
            self._ops.fence()
            yield logits

    def read_layer(self, layer_idx: int) -> LayerWeights:
        """The layer in f32; modules that share an input are fused into one linear. Without experts."""
        spec = self.manifest.layers[layer_idx]
        return self._read_blob(spec, lambda part: part)

    def read_expert(self, layer_idx: int, expert: int) -> Mapping[str, Segments]:
        """The "gate_up" and "down" of an expert in f32, each one linear."""
        experts = self.manifest.experts[layer_idx]
        return self._read_blob(experts.blob, lambda part: experts.part(part, expert)).linears

    def _read_blob(self, spec: BlobSpec, source: Callable[[MatrixSpec], MatrixSpec]) -> LayerWeights:
        """``source``: where in the checkpoint a part of ``spec`` is."""
        linears = tuple(
            (name, (LinearSpec(tuple(replace(part, dtype="f32", bits=32) for old in group for part in old.parts)),))
            for name, group in spec.linears
        )
        layout = layer_layout(BlobSpec(spec.norms, linears), self._ops.target)
        blob = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        self._read_norms(layout, blob)
        weights = LayerWeights.view(layout, blob)
        for name, _ in linears:
            (linear,) = weights[name]
            start = 0
            for part in linear.layout.spec.parts:
                matrix = load_part(self.checkpoint, source(part), self.manifest.quant)
                rows = to_float(matrix.rows(0, part.N), matrix.dtype)
                linear.fields["weight"][start : start + part.N] = torch.from_numpy(np.ascontiguousarray(rows))
                if matrix.bias is not None:
                    bias = torch.from_numpy(to_float(matrix.bias, matrix.bias_dtype))
                    linear.fields["bias"][start : start + part.N] = bias
                start += part.N
        return weights

    def route(self, layer_idx: int, weights: LayerWeights, chunk: ForwardBatch, h: torch.Tensor) -> RoutedRows:
        """What the router of a mixture leaves for the experts, of h [T, C] behind attention; valid until the next
        call."""
        self.run(layer_idx, weights, chunk, {HIDDEN: h}, start="router")
        return self._buffers.rows(len(h)).routed

    def run(
        self,
        layer_idx: int,
        weights: LayerWeights,
        chunk: ForwardBatch,
        state: Mapping[str, torch.Tensor],
        *,
        start: str | None = None,
        stop: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Runs a chunk through the layer from the linear ``start`` (None: the first) to the linear ``stop``, which is
        not run (None: to the end, or, in a mixture of experts, to the router).

        ``state`` is what the chunk has come to: "hidden" [T, C], changed in place, and the inputs [T, K] "attn" of "o"
        and "mlp" of "down", if they are computed before ``start`` and needed. Returns the state at ``stop`` and "x"
        [T, K], the inputs of ``stop``; all but "hidden" is valid until the next call.
        """
        ops, h = self._ops, state[HIDDEN]
        buffers = self._buffers.rows(len(h))
        mlp = buffers.mlp[:, : self.config.layers[layer_idx].mlp.width]
        places = {ATTN: buffers.attn, MLP: mlp}
        for name, place in places.items():
            if name in state and state[name].data_ptr() != place.data_ptr():
                place.copy_(state[name])
        ops.start, ops.stop = (None if name is None else weights[name] for name in (start, stop))
        ops.stage([chunk])
        kind = f"{layer_kind(len(h))} from {start} to {stop}"
        found = {HIDDEN: h, **places}
        with nullcontext() if ops.threads is None else ops.threads.measured(kind, len(h)):
            try:
                self._decoder.layer(layer_idx, weights, buffers, h, self._kv)
            except Stopped as stopped:
                return found | {"x": stopped.x}
            ops.fence()
        return found


def _expert_limits(config: ModelConfig) -> ExpertLimits | None:
    """Of routing: experts themselves are not run by operations."""
    mixtures = config.mixtures
    if not mixtures:
        return None
    return ExpertLimits(max(moe.count for moe in mixtures), max(moe.per_token for moe in mixtures), 0)


def _routed_rows(config: ModelConfig, max_rows: int) -> RoutedRows | None:
    if not config.mixtures:
        return None
    per_token = max(moe.per_token for moe in config.mixtures)
    x, ids = torch.empty(max_rows, config.hidden_size), torch.empty(max_rows, per_token, dtype=torch.int32)
    return RoutedRows(x, ids, torch.empty(max_rows, per_token))
