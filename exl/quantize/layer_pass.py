"""Runs calibration sequences through one layer at a time, and captures the inputs and outputs of its linears.

The forward pass is the decoder's own, over ``TorchOps``; none of it is repeated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from exl.batch import I32, ForwardBatch
from exl.cache.kv import KVCache, KVPages
from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.config import ModelConfig
from exl.errors import UnsupportedModelError
from exl.formats.load import load_matrix
from exl.formats.tensors import read_float, read_norm
from exl.layout.kv import KVLayout
from exl.layout.layers import layer_layout
from exl.layout.specs import BlobSpec, LinearSpec
from exl.layout.steps import StepLimits
from exl.models.decoder import Decoder, StepBuffers
from exl.models.manifest import ModelManifest
from exl.ops.base import PLAIN_BRANCH, Branch, LayerWeights, Linear, Segments, view_field, view_segments
from exl.ops.cpu_target import torch_target
from exl.ops.torch_ops import TorchOps
from exl.quantize.calibration import make_chunks, num_pages
from exl.threads import Threads, layer_kind

_CHUNK_ROWS = 2048  # bounds the activations that are alive at once; larger chunks do not multiply faster


@dataclass(frozen=True)
class Heard:
    """What ``LayerPass.listen`` heard of a linear; valid until the next call."""

    x: torch.Tensor  # [T, K], its inputs
    output: torch.Tensor | None  # [T, N], with the residual if the linear adds to it: from "down" the layer's own
    scale: float = 1.0  # a change of the linear's result changes ``output`` by ``scale`` times as much


class _Captured(Exception):
    """Carries what was heard out of a layer and skips the rest of the layer."""

    def __init__(self, heard: Heard) -> None:
        self.heard = heard


class _CapturingOps(TorchOps):
    """Stops at ``target_linear`` by raising ``_Captured`` with its input and, if asked, its output."""

    target_linear: Segments | None = None
    with_output = False
    _adds = False  # whether the linear's result is still to be added to the residual

    def _multiply(self, x: torch.Tensor, w: Segments, out: torch.Tensor, num_decode_rows: int) -> None:
        if w is self.target_linear and not self.with_output:
            raise _Captured(Heard(x, None))
        super()._multiply(x, w, out, num_decode_rows)
        if w is self.target_linear and not self._adds:
            raise _Captured(Heard(x, out))

    def add_projection(self, x: torch.Tensor, w: Segments, h: torch.Tensor, branch: Branch = PLAIN_BRANCH) -> None:
        is_target = w is self.target_linear
        if is_target and self.with_output and branch.post_norm is not None:
            raise UnsupportedModelError(
                f"{w[0].layout.spec.parts[0].name}: found a norm of what it adds, expected none where quantized layers "
                "are to follow the dense ones: no scale takes a difference of outputs back to the linear"
            )
        self._adds = True
        try:
            super().add_projection(x, w, h, branch)
        finally:
            self._adds = False
        if is_target:
            raise _Captured(Heard(x, h, branch.scale))


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
        threads: Threads | None = None,
    ) -> None:
        self.checkpoint, self.config, self.manifest = checkpoint, config, manifest
        max_rows = max(_CHUNK_ROWS, max((len(sequence) for sequence in sequences), default=0))
        self.chunks = make_chunks(sequences, max_rows)
        max_rows = max((chunk.num_rows for chunk in self.chunks), default=1)
        limits = StepLimits(
            max_rows=max_rows,
            window_rows=max_rows,
            max_logit_rows=1,
            max_context=max_rows,
            hidden_size=config.hidden_size,
            qkv_width=config.qkv_width,
            attn_width=config.attn_width,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            head_dim=config.head_dim,
        )
        kv_layout = KVLayout("f32", 1, config.num_kv_heads, config.head_dim)
        self._ops = _CapturingOps(torch_target(), kv_layout, limits, threads)
        self._decoder = Decoder(config, self._ops)
        pages = max(map(num_pages, self.chunks), default=1)
        self._kv = _OneLayerCache(kv_layout, pages, self._ops.device)
        self._buffers = StepBuffers(
            qkv=torch.empty(max_rows, config.qkv_width),
            attn=torch.empty(max_rows, config.attn_width),
            mlp=torch.empty(max_rows, config.intermediate_size),
        )

    def embed(self) -> Iterator[torch.Tensor]:
        """The first layer's input for each chunk, f32 [T, C]."""
        layout = layer_layout(self.manifest.embed, self._ops.target)
        blob = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        start, stop = layout.linear_range("embed", 0)
        matrix = load_matrix(self.checkpoint, layout.linears["embed"][0].spec.parts[0].name, None)
        self._ops.pack([matrix], layout.linears["embed"][0], blob[start:stop])
        table: Linear = view_segments(layout, blob, "embed")[0]
        for chunk in self.chunks:
            h = torch.empty(chunk.num_rows, self.config.hidden_size)
            self._ops.stage([chunk])
            self._decoder.embed(table, h)
            yield h

    def read_layer(self, layer_idx: int) -> LayerWeights:
        """The dense layer in f32; modules that share an input are fused into one linear."""
        spec = self.manifest.layers[layer_idx]
        linears = tuple(
            (name, (LinearSpec(tuple(replace(part, dtype="f32", bits=32) for old in group for part in old.parts)),))
            for name, group in spec.linears
        )
        layout = layer_layout(BlobSpec(spec.norms, linears), self._ops.target)
        blob = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        names = self.manifest.names
        prefix = f"{names.layers}.{layer_idx}."
        for norm in layout.norms:
            vector = torch.from_numpy(read_norm(self.checkpoint, prefix + names.norms[norm.name], norm))
            view_field(blob, layout.fields[norm.name]).copy_(vector)
        weights = LayerWeights.view(layout, blob)
        for name, _ in linears:
            (linear,) = getattr(weights, name)
            start = 0
            for part in linear.layout.spec.parts:
                self._fill(linear, part.name, start, start + part.N)
                start += part.N
        return weights

    def _fill(self, linear: Linear, name: str, start: int, stop: int) -> None:
        linear.fields["weight"][start:stop] = torch.from_numpy(read_float(self.checkpoint, f"{name}.weight"))
        if f"{name}.bias" in self.checkpoint.tensors:
            linear.fields["bias"][start:stop] = torch.from_numpy(read_float(self.checkpoint, f"{name}.bias"))

    def run(self, layer_idx: int, weights: LayerWeights, chunk: ForwardBatch, h: torch.Tensor) -> None:
        """Runs the chunk's hidden states h [T, C] through the layer, in place."""
        self._ops.target_linear = None
        self._ops.stage([chunk])
        with self._ops.threads.measured(layer_kind(len(h)), len(h)):
            self._decoder.layer(layer_idx, weights, self._buffers.rows(len(h)), h, self._kv)

    def listen(
        self, layer_idx: int, weights: LayerWeights, name: str, chunk: ForwardBatch, h: torch.Tensor, output: bool
    ) -> Heard:
        """Runs the chunk's hidden states h [T, C] up to the linear ``name``. Overwrites h.

        With ``output``, raises ``UnsupportedModelError`` if the linear's result is normalised before it is added.
        """
        self._ops.target_linear = getattr(weights, name)
        self._ops.with_output = output
        self._ops.stage([chunk])
        try:
            with self._ops.threads.measured(f"{layer_kind(len(h))} to {name}, {output}", len(h)):
                try:
                    self._decoder.layer(layer_idx, weights, self._buffers.rows(len(h)), h, self._kv)
                except _Captured as captured:
                    return captured.heard
        finally:
            self._ops.target_linear = None
        raise AssertionError(f"layer {layer_idx} has no linear {name}")
