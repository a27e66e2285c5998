"""The decoder, one for all families. It defines what a layer computes; ``Runner`` orders layers and chunks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from exl.cache.kv import KVCache
from exl.families.config import ModelConfig
from exl.families.specs import AttentionShape, BranchShape, LayerSpec, MoeShape
from exl.ops.base import (
    TORCH_DTYPES,
    AttentionSpec,
    Branch,
    EmbedSpec,
    GatedMlp,
    LayerWeights,
    Linear,
    LogitsSpec,
    Loras,
    Norm,
    Ops,
    RouteSpec,
)


@dataclass(frozen=True)
class RoutedRows:
    """What a router leaves for the experts: see ``Ops.route``."""

    x: torch.Tensor  # f32 [max_rows, C]
    ids: torch.Tensor  # i32 [max_rows, k]
    weights: torch.Tensor  # f32 [max_rows, k]

    def rows(self, num_rows: int) -> RoutedRows:
        return RoutedRows(self.x[:num_rows], self.ids[:num_rows], self.weights[:num_rows])


@dataclass(frozen=True)
class StepBuffers:
    """Activations of one chunk, preallocated at fixed addresses."""

    qkv: torch.Tensor  # [max_rows, W]
    attn: torch.Tensor  # [max_rows, A]
    mlp: torch.Tensor  # [max_rows, F]
    routed: RoutedRows | None = None  # of a model with mixtures of experts

    @classmethod
    def of(cls, ops: Ops, config: ModelConfig) -> StepBuffers:
        """The buffers that ``ops`` has."""
        routed = None
        if config.mixtures:
            routed = RoutedRows(*map(ops.buffer, ("routed", "expert ids", "expert weights")))
        return cls(*map(ops.buffer, ("qkv", "attn", "mlp")), routed)

    def rows(self, num_rows: int) -> StepBuffers:
        """The first rows of each."""
        routed = None if self.routed is None else self.routed.rows(num_rows)
        return StepBuffers(self.qkv[:num_rows], self.attn[:num_rows], self.mlp[:num_rows], routed)


@functools.lru_cache(maxsize=16)  # once for a model, not in each step
def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value).to(dtype).item()


class Decoder:
    def __init__(self, config: ModelConfig, ops: Ops, loras: Sequence[Mapping[str, Loras]] = ()) -> None:
        """``loras``: by layer and linear, what adapters add; (): there are none."""
        self.config = config
        self.ops = ops
        self._loras = loras

    def embed(self, table: Linear, h: torch.Tensor) -> None:
        """Tokens of the selected batch -> h [T, C]."""
        shape = self.config.embed
        scale = shape.scale
        if shape.in_file_type:
            scale = _rounded(scale, TORCH_DTYPES[table.layout.spec.dtype])
        self.ops.embed(table, h, EmbedSpec(scale))

    def layer(self, layer_idx: int, w: LayerWeights, buffers: StepBuffers, h: torch.Tensor, kv: KVCache) -> None:
        """One transformer block over the selected batch; h [T, C] in place, ``buffers`` of T rows."""
        ops, attn, spec = self.ops, buffers.attn, self.config.layers[layer_idx]
        mlp, activation = buffers.mlp, GatedMlp(spec.mlp.activation, spec.mlp.limit)
        if spec.mlp.width < mlp.shape[1]:
            mlp = mlp[:, : spec.mlp.width]
        loras: Mapping[str, Loras] = self._loras[layer_idx] if self._loras else {}
        added = loras.get("gate_up", ())
        ops.project(h, self._norm(w, spec.attn_norm), w["qkv"], buffers.qkv, loras.get("qkv", ()))
        ops.attend(buffers.qkv, self._attention(spec.attention, w), layer_idx, kv, attn, w["o"])
        if spec.parallel:  # the MLP's inputs are those of attention, to which nothing has been added yet
            ops.gated_mlp(h, self._norm(w, spec.mlp_norm), w["gate_up"], activation, mlp, w["down"], added)
        ops.add_projection(attn, w["o"], h, self._branch(w, spec.attn_branch), loras.get("o", ()))
        if isinstance(spec.mlp, MoeShape):
            self._mixture(spec, spec.mlp, w, buffers.routed, activation, h)
            return
        if not spec.parallel:
            ops.gated_mlp(h, self._norm(w, spec.mlp_norm), w["gate_up"], activation, mlp, w["down"], added)
        ops.add_projection(mlp, w["down"], h, self._branch(w, spec.mlp_branch), loras.get("down", ()))

    def _mixture(
        self, spec: LayerSpec, moe: MoeShape, w: LayerWeights, rows: RoutedRows, activation: GatedMlp, h: torch.Tensor
    ) -> None:
        ops, route = self.ops, moe.route
        how = RouteSpec(
            moe.per_token, route.score, route.normalize, route.eps, route.scaling, route.groups, route.top_groups
        )
        bias = w.norms.get("router_bias")
        ops.route(h, self._norm(w, spec.mlp_norm), w["router"][0], bias, how, rows.x, rows.ids, rows.weights)
        ops.experts_add(rows.x, rows.ids, rows.weights, w.experts, activation, h)
        if moe.shared is not None:
            gate = w["shared_gate"][0] if moe.shared.gated else None
            ops.shared_add(rows.x, w["shared_gate_up"], w["shared_down"], gate, activation, h)

    def head(self, final_norm: torch.Tensor, head: Linear, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits of the selected batch's logit rows, a view of ``out`` [R, V]."""
        norm, logits = self.config.norm, self.config.logits
        spec = LogitsSpec(logits.softcap, logits.scale)
        return self.ops.logits(h, Norm(final_norm, norm.eps, norm.kind), head, spec, out)

    def _norm(self, w: LayerWeights, name: str | None) -> Norm | None:
        return None if name is None else Norm(w.norms[name], self.config.norm.eps, self.config.norm.kind)

    def _branch(self, w: LayerWeights, shape: BranchShape) -> Branch:
        return Branch(shape.scale, self._norm(w, shape.norm))

    def _attention(self, shape: AttentionShape, w: LayerWeights) -> AttentionSpec:
        has_norms = shape.norms is not None
        return AttentionSpec(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            scale=shape.scale,
            window=shape.window,
            softcap=shape.softcap,
            rope=shape.rope,
            q_norm=self._norm(w, "q_norm" if has_norms else None),
            k_norm=self._norm(w, "k_norm" if has_norms else None),
            norm_rows=shape.norms == "row",
            sinks=w.norms["sinks"] if shape.sinks else None,
        )
