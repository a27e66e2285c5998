"""The operations on the CPU: torch kernels, f32 arithmetic, weights in the layouts of ``exl.layout.layers``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from exl.batch import ForwardBatch, SampleRows, SamplingBatch
from exl.cache.kv import KVCache
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.layout.kv import KVLayout
from exl.layout.layers import LinearLayout
from exl.layout.specs import Target
from exl.layout.steps import StepLimits, scratch_bytes
from exl.memory.host import host_tensor
from exl.ops import torch_attention
from exl.ops.base import (
    PLAIN_BRANCH,
    AttentionSpec,
    Branch,
    EmbedSpec,
    ExpertSet,
    GatedMlp,
    Linear,
    LogitsSpec,
    Loras,
    Norm,
    RouteSpec,
    Segments,
    TableRows,
)
from exl.ops.cpu_buffers import refuse_output_order, step_buffer
from exl.ops.torch_experts import choose_experts, gated_product, sigmoid
from exl.ops.torch_linear import Scratch, aligned, matmul, pack_linear
from exl.sampling import sample
from exl.threads import DECODE, Threads, thread_limit


@dataclass(frozen=True)
class HostSamples:
    """See ``exl.ops.base.Samples``."""

    rows: SampleRows

    def read(self) -> SampleRows:
        return self.rows


def keep_samples(rows: SampleRows, out: torch.Tensor) -> None:
    """Into i64 [..], for the next batch, in which a row that had no distribution reads as token 0."""
    out.numpy()[: len(rows.ids)] = np.maximum(rows.ids, 0)


class TorchOps:
    """See ``exl.ops.base.Ops``. Owns its scratch and samples; the caller owns everything else."""

    device = torch.device("cpu")
    act_dtype = torch.float32
    backend = None
    dependent = False
    captures = 0
    invariant_rows = 1
    decode_alike = False
    runs_ahead = False

    def __init__(self, target: Target, kv_layout: KVLayout, limits: StepLimits, threads: Threads | None = None) -> None:
        """``threads``: None is as many as ``exl.threads.thread_limit`` says."""
        self.target = target
        self.threads = Threads(thread_limit()) if threads is None else threads
        self.kv_layout = kv_layout
        self.limits = limits
        sizes = scratch_bytes(limits, target)

        def buffer(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return host_tensor([sizes[name] // dtype.itemsize], dtype, name)

        self._scratch = Scratch(buffer("panel"), buffer("panel codes", torch.uint8), buffer("sorted input"))
        self._normed = buffer("normed input")
        self._fused = buffer("fused output")
        self._inner, self._added = buffer("adapters' inner rows"), buffer("adapters' output")
        self._expert_rows = buffer("expert rows") if limits.experts is not None else None
        self._samples = buffer("samples", torch.int64)
        self._staged: list[torch_attention.StagedBatch] = []
        self._now: torch_attention.StagedBatch | None = None

    def buffer(self, name: str) -> torch.Tensor:
        return step_buffer(self.limits, name)

    def close(self) -> None:
        pass

    def capture(self, step: Callable[[], None]) -> None:
        return None

    # load

    def pack(
        self,
        parts: Sequence[QuantizedMatrix | DenseMatrix],
        layout: LinearLayout,
        out: torch.Tensor,
        output_order: np.ndarray | None = None,
    ) -> None:
        refuse_output_order(output_order)
        pack_linear(parts, layout, self.target, out)

    # step

    def stage(self, batches: Sequence[ForwardBatch], rows: TableRows | None = None) -> None:
        if rows is not None:
            raise ValueError("an embedding on the disk: the CPU has it in RAM")
        self._staged = [torch_attention.StagedBatch(batch, self._resolve(batch.token_ids)) for batch in batches]
        self._now = self._staged[0] if self._staged else None

    def _resolve(self, token_ids: np.ndarray) -> torch.Tensor:
        """Replaces token -1-i by sample i of the previous step."""
        ids = torch.from_numpy(token_ids).long()
        if (ids < 0).any():
            ids = torch.where(ids < 0, self._samples[(-1 - ids).clamp_(min=0)], ids)
        return ids

    def select(self, batch_idx: int) -> None:
        self._now = self._staged[batch_idx]

    def choose_logits(self, rows: np.ndarray) -> None:
        self._now.logit_rows = torch.from_numpy(rows).long()

    def fence(self) -> None:
        pass

    def launch(self) -> None:
        pass

    @property
    def step_key(self) -> None:
        return None

    def embed(self, table: Linear, h: torch.Tensor, spec: EmbedSpec) -> None:
        h.copy_(table.fields["weight"].index_select(0, self._now.token_ids))
        if spec.scale != 1.0:
            h.mul_(spec.scale)

    def _input(self, h: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        if norm is None:
            return h
        normed, shape = self._normed[: h.numel()].view(h.shape), (h.shape[-1],)
        if norm.kind == "layer":
            return normed.copy_(F.layer_norm(h, shape, norm.weight, None, norm.eps))
        return normed.copy_(F.rms_norm(h, shape, norm.weight, norm.eps))

    def _multiply(self, x: torch.Tensor, w: Segments, out: torch.Tensor, num_decode_rows: int) -> None:
        start = 0
        for linear in w:
            matmul(x, linear, num_decode_rows, self._scratch, out[:, start : start + linear.N])
            start += linear.N

    def _add_loras(self, x: torch.Tensor, loras: Loras, out: torch.Tensor) -> None:
        """To rows of ``out`` what their adapters add: ``out`` is the product of x and the linear itself."""
        batch = self._now.batch
        for start, stop, adapter in batch.lora_runs if loras else ():
            num_rows, num_decode_rows = stop - start, min(max(batch.num_decode_rows - start, 0), stop - start)
            for lora in loras[adapter]:
                inner = self._inner[: num_rows * lora.A.N].view(num_rows, lora.A.N)
                added = self._added[: num_rows * lora.B.N].view(num_rows, lora.B.N)
                matmul(aligned(x[start:stop]), lora.A, num_decode_rows, self._scratch, inner)
                matmul(inner, lora.B, num_decode_rows, self._scratch, added)
                # The factor by itself: added with one, elements of whole vectors and the last ones round differently.
                out[start:stop, lora.start : lora.start + lora.B.N].add_(added.mul_(lora.scale))

    def project(self, h: torch.Tensor, norm: Norm | None, w: Segments, out: torch.Tensor, loras: Loras = ()) -> None:
        x = self._input(h, norm)
        self._multiply(x, w, out, self._now.batch.num_decode_rows)
        self._add_loras(x, loras, out)

    def attend(
        self,
        qkv: torch.Tensor,
        spec: AttentionSpec,
        layer_idx: int,
        kv: KVCache,
        out: torch.Tensor,
        consumer: Segments = (),
    ) -> None:
        torch_attention.attend(qkv, spec, self._now, layer_idx, kv, out, self.threads)

    def gated_mlp(
        self,
        h: torch.Tensor,
        norm: Norm | None,
        w: Segments,
        spec: GatedMlp,
        out: torch.Tensor,
        consumer: Segments = (),
        loras: Loras = (),
    ) -> None:
        self._gated(self._input(h, norm), w, spec, out, self._now.batch.num_decode_rows, loras)

    def _gated(
        self,
        x: torch.Tensor,
        w: Segments,
        spec: GatedMlp,
        out: torch.Tensor,
        num_decode_rows: int,
        loras: Loras = (),
    ) -> None:
        T, width = out.shape
        both = self._fused[: T * 2 * width].view(T, 2 * width)
        self._multiply(x, w, both, num_decode_rows)
        self._add_loras(x, loras, both)
        gated_product(both[:, :width], both[:, width:], spec, out)

    def route(
        self,
        h: torch.Tensor,
        norm: Norm,
        router: Linear,
        bias: torch.Tensor | None,
        spec: RouteSpec,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        x.copy_(self._input(h, norm))
        logits = torch.empty(len(x), router.N)
        self._multiply(x, (router,), logits, self._now.batch.num_decode_rows)
        choose_experts(logits, bias, spec, ids, weights)

    def experts_add(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: ExpertSet,
        spec: GatedMlp,
        h: torch.Tensor,
    ) -> None:
        hidden, num_decode_rows = h.shape[1], self._now.batch.num_decode_rows
        for expert in ids.unique().tolist():  # rising
            rows, place = (ids == expert).nonzero(as_tuple=True)
            w = experts[expert]
            num_decode = int((rows < num_decode_rows).sum())
            width = sum(linear.N for linear in w["gate_up"]) // 2
            gathered, product, y = self._rows_of_expert(len(rows), hidden, width)
            torch.index_select(x, 0, rows, out=gathered)
            self._gated(gathered, w["gate_up"], spec, product, num_decode)
            self._multiply(product, w["down"], y, num_decode)
            h[rows] += y.mul_(weights[rows, place][:, None])

    def shared_add(
        self, x: torch.Tensor, gate_up: Segments, down: Segments, gate: Linear | None, spec: GatedMlp, h: torch.Tensor
    ) -> None:
        num_decode_rows = self._now.batch.num_decode_rows
        _, product, y = self._rows_of_expert(*h.shape, sum(linear.N for linear in gate_up) // 2)
        self._gated(x, gate_up, spec, product, num_decode_rows)
        self._multiply(product, down, y, num_decode_rows)
        if gate is not None:
            factor = torch.empty(len(x), 1)
            self._multiply(x, (gate,), factor, num_decode_rows)
            y.mul_(sigmoid(factor))
        h.add_(y)

    def _rows_of_expert(self, num_rows: int, hidden: int, width: int) -> tuple[torch.Tensor, ...]:
        """Room for an expert's inputs [n, C], what is between its linears [n, F], and what it gives [n, C]."""
        sizes = [num_rows * hidden, num_rows * width, num_rows * hidden]
        pieces = self._expert_rows[: sum(sizes)].split(sizes)
        return tuple(piece.view(num_rows, -1) for piece in pieces)

    def add_projection(
        self, x: torch.Tensor, w: Segments, h: torch.Tensor, branch: Branch = PLAIN_BRANCH, loras: Loras = ()
    ) -> None:
        y = self._fused[: h.numel()].view(h.shape)
        self._multiply(x, w, y, self._now.batch.num_decode_rows)
        self._add_loras(x, loras, y)
        h.add_(self._input(y, branch.post_norm), alpha=branch.scale)

    def logits(self, h: torch.Tensor, norm: Norm, head: Linear, spec: LogitsSpec, out: torch.Tensor) -> torch.Tensor:
        rows = self._now.logit_rows
        out = out[: len(rows)]
        if len(rows) == 0:
            return out
        num_decode_rows = int((rows < self._now.batch.num_decode_rows).sum())
        x = self._input(h.index_select(0, rows), norm)
        matmul(x, head, num_decode_rows, self._scratch, out, by_tiles=True)
        if spec.scale != 1.0:
            out.mul_(spec.scale)
        if spec.softcap is not None:
            out.div_(spec.softcap).tanh_().mul_(spec.softcap)
        return out

    def sample(self, logits: torch.Tensor, params: SamplingBatch) -> HostSamples:
        with self.threads.like(DECODE):
            rows = sample(logits, params)
        keep_samples(rows, self._samples)
        return HostSamples(rows)
