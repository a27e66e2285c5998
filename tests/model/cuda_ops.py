"""A GPU's operations on the host shim without a model: linears from random matrices, batches of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from exl.batch import ForwardBatch
from exl.checkpoint.rope_config import RopeConfig
from exl.formats.matrix import DenseMatrix
from exl.kernels.launch import Backend
from exl.layout.arena import arena_layout
from exl.layout.kv import DeviceKVLayout
from exl.layout.layers import layer_layout, linear_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec, Target, fuse
from exl.layout.steps import StepLimits
from exl.ops.base import EmbedSpec, Linear, Segments, view_field
from exl.ops.cuda_ops import CudaOps
from tests.model.attended import HEAD_DIM, KV_HEADS, QKV_WIDTH, WIDTH
from tests.reference.linear_twin import dequantize, random_matrix

HIDDEN, INNER, VOCAB, GROUP = 64, 96, 72, 32
DEFAULT_ROPE = RopeConfig()


@dataclass(frozen=True)
class Packed:
    """One or more linears, and W [K, N] of all of them side by side as f64: inputs as the file has them."""

    segments: Segments
    weight: np.ndarray


@dataclass(frozen=True)
class Matrix:
    """A random matrix of the file: 4 or 8 bits, or 16: f16 as it is. ``order``: act-order of a digest's name."""

    bits: int = 4
    order: str | None = None

    def draw(self, rng: np.random.Generator, name: str, K: int, N: int, order: np.ndarray | None):
        """-> MatrixSpec, the matrix, W [K, N]."""
        if self.bits == 16:
            rows = (rng.standard_normal((N, K)) / K**0.5).astype(np.float16)
            matrix = DenseMatrix("f16", K, N, None, None, lambda start, stop: rows[start:stop])
            return MatrixSpec(name, K, N, 16, "f16"), matrix, rows.T.astype(np.float64)
        matrix = random_matrix(rng, self.bits, K, N, GROUP)
        matrix = replace(matrix, scales=(matrix.scales / np.float16(K**0.5)).astype(np.float16), order=order)
        exact = dequantize(matrix)
        if order is not None:
            exact[order] = exact.copy()
        return MatrixSpec(name, K, N, self.bits, "u8", GROUP, order_key=self.order), matrix, exact


class Bench:
    """``CudaOps`` and what it multiplies. Everything is drawn from one seed."""

    def __init__(
        self,
        backend: Backend,
        *,
        seed: int = 0,
        rows: int = 12,
        ropes: Sequence[RopeConfig] = (DEFAULT_ROPE,),
        post_norms: bool = False,
        act_dtype: torch.dtype = torch.float16,
        kv_kind: str = "f16",
    ) -> None:
        self.rng, self.backend = np.random.default_rng(seed), backend
        self.target = Target("cuda", arch=backend.arch, num_multiprocessors=backend.num_multiprocessors)
        self.limits = StepLimits(
            max_rows=rows,
            window_rows=2 * rows,
            max_logit_rows=rows,
            max_context=128,
            hidden_size=HIDDEN,
            qkv_width=QKV_WIDTH,
            attn_width=WIDTH,
            intermediate_size=INNER,
            vocab_size=VOCAB,
            head_dim=HEAD_DIM,
            max_sequences=rows,
            cache_tokens=rows * 64,
            num_ropes=len(ropes),
            post_norms=post_norms,
        )
        self.kv_layout = DeviceKVLayout(kv_kind, 2, KV_HEADS, HEAD_DIM)
        sizes = {
            "qkv": (HIDDEN, QKV_WIDTH),
            "o": (WIDTH, HIDDEN),
            "gate_up": (HIDDEN, 2 * INNER),
            "down": (INNER, HIDDEN),
        }
        linears = {
            name: (LinearSpec((MatrixSpec(name, K, N, 4, "u8", GROUP),), gated=name == "gate_up"),)
            for name, (K, N) in sizes.items()
        }
        apart = tuple(LinearSpec((MatrixSpec(name, HIDDEN, INNER, 4, "u8", GROUP),)) for name in ("gate", "up"))
        layers = [layer_layout(BlobSpec((), tuple(one.items())), self.target) for one in (linears, {"gate_up": apart})]
        self.arena = arena_layout(self.limits, self.target, layers)
        self.ops = CudaOps(
            backend, self.target, self.kv_layout, self.limits, self.arena, ropes, rows, act_dtype=act_dtype
        )

    def pack(
        self, K: int, *parts: tuple[str, int, Matrix], gated: bool = False, consumer: Packed | None = None
    ) -> Packed:
        """Matrices [K, N] side by side; parts that agree share a launch. ``gated``: gate and up."""
        orders = {m.order: self.rng.permutation(K).astype(np.int32) for _, _, m in parts if m.order is not None}
        drawn = [m.draw(self.rng, name, K, N, orders.get(m.order)) for name, N, m in parts]
        wanted = None
        if consumer is not None and "channel_map" in consumer.segments[0].fields:
            wanted = consumer.segments[0].fields["channel_map"].argsort().int().cpu().numpy()
        segments, at = [], 0
        for spec in fuse([spec for spec, _, _ in drawn], gated=gated):
            layout = linear_layout(spec, self.target)
            blob = torch.zeros(layout.num_bytes, dtype=torch.uint8)
            matrices = [matrix for _, matrix, _ in drawn[at : at + len(spec.parts)]]
            self.ops.pack(matrices, layout, blob, wanted if spec.gated and layout.kind == "tiles" else None)
            at += len(spec.parts)
            blob = blob.to(self.backend.device)
            segments.append(Linear(layout, {name: view_field(blob, field) for name, field in layout.fields.items()}))
        return Packed(tuple(segments), np.concatenate([exact for _, _, exact in drawn], 1))

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy((scale * self.rng.standard_normal(shape)).astype(np.float32)).to(self.backend.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """A norm's weight."""
        return torch.from_numpy(self.rng.uniform(0.5, 1.5, shape).astype(np.float32)).to(self.backend.device)

    def residual(self, batch: ForwardBatch) -> torch.Tensor:
        """Rows of the residual stream with their sums of squares beside them, as an earlier operation leaves them: the
        batch is staged, its tokens' rows of a random table are embedded."""
        table = torch.from_numpy(self.rng.standard_normal((VOCAB, HIDDEN)).astype(np.float16) * 3 + 0.5).half()
        spec = LinearSpec((MatrixSpec("embed", HIDDEN, VOCAB, 16, "f16"),))
        linear = Linear(linear_layout(spec, self.target), {"weight": table.to(self.backend.device)})
        self.ops.stage([batch])
        h = self.ops.buffer("residual")[: batch.num_rows]
        self.ops.embed(linear, h, EmbedSpec())
        return h


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()
