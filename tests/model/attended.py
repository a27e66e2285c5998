"""Attention of any backend's operations, without a model, and the same in float64: for tests of what families ask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from exl.cache.kv import KVCache
from exl.checkpoint.rope_config import RopeConfig
from exl.ops.base import AttentionSpec, Norm, Ops
from tests.model.batches import batch_of
from tests.reference.attention_twin import attention, rotate
from tests.reference.linear_twin import rms_norm

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 24
WIDTH, KV_WIDTH = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
QKV_WIDTH = WIDTH + 2 * KV_WIDTH
CONTEXT = 9  # tokens of each sequence


@dataclass
class Attended:
    """Two sequences of ``CONTEXT`` tokens in layer 1: q, k and v of each as they were before norms and RoPE, and what
    attention made of them. All but the last token came as a prompt, the last in a decode step."""

    qkv: np.ndarray  # [2, CONTEXT, W]
    out: np.ndarray  # [2, CONTEXT, A]

    def largest_error(self, spec: AttentionSpec) -> float:
        return float(np.abs(self.out - expected(self.qkv, spec)).max())


def spec_of(rope: RopeConfig | None = None, **fields) -> AttentionSpec:
    values = {"scale": HEAD_DIM**-0.5, "window": None, "softcap": None, "q_norm": None, "k_norm": None}
    rope = RopeConfig(theta=10.0) if rope is None else rope
    return AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, rope=rope, **values | fields)


def row_norms(rng: np.random.Generator, device: torch.device, eps: float = 1e-5) -> dict[str, object]:
    """Fields of a spec: norms of q and k over the channels of all heads."""
    weights = (torch.from_numpy(rng.uniform(0.5, 2, size)).float().to(device) for size in (WIDTH, KV_WIDTH))
    return {"norm_rows": True, **{name: Norm(w, eps) for name, w in zip(("q_norm", "k_norm"), weights, strict=True)}}


def sinks(rng: np.random.Generator, device: torch.device) -> torch.Tensor:
    """[H]: far below the scores, like them, above them."""
    return torch.from_numpy(rng.normal(0, 1, HEADS) + np.array([-30.0, 0.0, 1.0, 8.0])).float().to(device)


def attend(ops: Ops, kv: KVCache, rng: np.random.Generator, spec: AttentionSpec) -> Attended:
    """q, k and v are drawn; all heads have sizes of their own, so that norms of heads and of rows differ."""
    device = ops.device
    scale = np.repeat(rng.uniform(0.5, 2, HEADS + 2 * KV_HEADS), HEAD_DIM)
    qkv = torch.from_numpy(scale * rng.standard_normal((2, CONTEXT, QKV_WIDTH))).to(ops.act_dtype)
    found = []
    for new, cached in ((slice(0, CONTEXT - 1), 0), (slice(CONTEXT - 1, CONTEXT), CONTEXT - 1)):
        rows = qkv[:, new].reshape(-1, QKV_WIDTH)
        ids = [0] * (len(rows) // 2)
        ops.stage([batch_of([(ids, cached, [1]), (ids, cached, [0])], decode=cached > 0)])
        buffer, out = ops.buffer("qkv")[: len(rows)], ops.buffer("attn")[: len(rows)]
        buffer.copy_(rows.to(device))
        ops.attend(buffer, spec, 1, kv, out)
        ops.launch()
        ops.fence()
        found.append(out.double().cpu().numpy().reshape(2, -1, WIDTH).copy())
    return Attended(qkv.double().numpy(), np.concatenate(found, 1))


def expected(qkv: np.ndarray, spec: AttentionSpec) -> np.ndarray:
    """[2, CONTEXT, A]."""
    places, rows = np.arange(CONTEXT), []
    heads = lambda x: x.reshape(CONTEXT, -1, HEAD_DIM)  # noqa: E731
    for q, k, v in (np.split(sequence, [WIDTH, WIDTH + KV_WIDTH], axis=-1) for sequence in qkv):
        if spec.norm_rows:
            q, k = (
                rms_norm(x, norm.weight.double().cpu().numpy(), norm.eps)
                for x, norm in ((q, spec.q_norm), (k, spec.k_norm))
            )
        q, k = (rotate(heads(x), places, spec.rope.theta) for x in (q, k))
        ends = None if spec.sinks is None else spec.sinks.double().cpu().numpy()
        found = attention(q, k, heads(v), places, spec.scale, spec.window, spec.softcap, ends)
        rows.append(found.reshape(CONTEXT, WIDTH))
    return np.stack(rows)
