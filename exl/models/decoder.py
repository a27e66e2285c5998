"""The decoder, one for all families. It defines what a layer computes; ``Runner`` orders layers and chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exl.cache.kv import KVCache
from exl.checkpoint.config import ModelConfig
from exl.ops.base import (
    AttentionSpec,
    Branch,
    EmbedSpec,
    GatedMlp,
    LayerWeights,
    Linear,
    LogitsSpec,
    Norm,
    Ops,
)


@dataclass(frozen=True)
class StepBuffers:
    """Activations of one chunk, preallocated at fixed addresses."""

    qkv: torch.Tensor  # [max_rows, W]
    attn: torch.Tensor  # [max_rows, A]
    mlp: torch.Tensor  # [max_rows, F]

    def rows(self, num_rows: int) -> StepBuffers:
        """The first rows of each."""
        return StepBuffers(self.qkv[:num_rows], self.attn[:num_rows], self.mlp[:num_rows])


class Decoder:
    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        self.config = config
        self.ops = ops

    def embed(self, table: Linear, h: torch.Tensor) -> None:
        """Tokens of the selected batch -> h [T, C]."""
        self.ops.embed(table, h, EmbedSpec())

    def layer(self, layer_idx: int, w: LayerWeights, buffers: StepBuffers, h: torch.Tensor, kv: KVCache) -> None:
        """One pre-norm transformer block over the selected batch; h [T, C] in place, ``buffers`` of T rows."""
        ops, qkv, attn, mlp = self.ops, buffers.qkv, buffers.attn, buffers.mlp
        ops.project(h, self._norm(w.attn_norm), w.qkv, qkv)
        ops.attend(qkv, self._attention(layer_idx, w), layer_idx, kv, attn, w.o)
        ops.add_projection(attn, w.o, h, Branch())
        ops.gated_mlp(h, self._norm(w.mlp_norm), w.gate_up, GatedMlp(), mlp, w.down)
        ops.add_projection(mlp, w.down, h, Branch())

    def head(self, final_norm: torch.Tensor, head: Linear, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits of the selected batch's logit rows, a view of ``out`` [R, V]."""
        return self.ops.logits(h, self._norm(final_norm), head, LogitsSpec(), out)

    def _norm(self, weight: torch.Tensor) -> Norm:
        return Norm(weight, self.config.rms_norm_eps)

    def _attention(self, layer_idx: int, w: LayerWeights) -> AttentionSpec:
        config = self.config
        return AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            window=config.windows[layer_idx],
            softcap=None,
            rope=config.rope,
            q_norm=None if w.q_norm is None else self._norm(w.q_norm),
            k_norm=None if w.k_norm is None else self._norm(w.k_norm),
        )
