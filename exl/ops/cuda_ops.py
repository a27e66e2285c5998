"""The operations on a GPU: exl's own kernels, every buffer a view of one arena.

A decode step of up to 8 rows is five launches a layer: qkv, attention (with the append), o, gate and up, down. Under
act-order each of qkv and gate/up is preceded by one that normalises into its order.

What an operation launches is prepared once for each shape of its arguments and weights, and started for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import ForwardBatch, SamplingBatch
from exl.cache.kv import KVCache
from exl.checkpoint.rope_config import RopeConfig
from exl.errors import KernelError, UnsupportedModelError
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.kernels.append_kv import append_kv
from exl.kernels.attention_decode import DecodeScratch, attention_decode
from exl.kernels.attention_io import AttentionParams, HeadNorms, QkvRows
from exl.kernels.attention_prefill import attention_prefill
from exl.kernels.blob import pack_linear, view_linear
from exl.kernels.embed import embed
from exl.kernels.launch import Backend
from exl.kernels.linear import LinearScratch, multiply
from exl.kernels.linear_dense import DenseWeight, multiply_dense
from exl.kernels.linear_io import NormedInput, Output
from exl.kernels.linear_many import PanelScratch, multiply_f32, multiply_many
from exl.kernels.params import Bindings
from exl.kernels.program import Programs, place
from exl.kernels.rms_norm import rms_norm
from exl.kernels.silu_mul import silu_mul
from exl.kernels.weights import TiledWeight
from exl.layout.arena import ArenaLayout, crossover
from exl.layout.fields import Field
from exl.layout.kv import DeviceKVLayout
from exl.layout.layers import LinearLayout
from exl.layout.linear_config import MIN_ARCH
from exl.layout.pages import PageLayout
from exl.layout.specs import Target
from exl.layout.steps import StepLimits
from exl.memory.device import device_tensor
from exl.ops.base import (
    ALL_ROWS,
    PLAIN_BRANCH,
    TORCH_DTYPES,
    AttentionSpec,
    Branch,
    EmbedSpec,
    GatedMlp,
    Linear,
    LogitsSpec,
    Loras,
    Norm,
    Segments,
    TableRows,
)
from exl.ops.cuda_batch import BatchShape, DeviceBatch, Staging
from exl.ops.cuda_embedding import RowStaging
from exl.ops.cuda_sampling import DeviceSamples, Sampler

MAX_BINDINGS = 8192  # remembered: one per layer and operation


class CudaOps:
    """See ``exl.ops.base.Ops``. Owns the arena; weights and cache are the caller's."""

    threads = None

    def __init__(
        self,
        backend: Backend,
        target: Target,
        kv_layout: DeviceKVLayout,
        limits: StepLimits,
        arena: ArenaLayout,
        rope: RopeConfig,
        num_pages: int,
        *,
        act_dtype: torch.dtype = torch.float16,
        dependent: bool = True,
    ) -> None:
        """``act_dtype``: f16, or bf16 for models whose values leave f16's range. ``dependent``: launches start before
        their predecessors have ended, where the GPU can do that. A plain attribute, read at every launch: False from
        here on makes every launch wait for those before it, and changes no result. Graphs stay as they were captured.
        """
        self.backend, self.target, self.kv_layout, self.limits = backend, target, kv_layout, limits
        self.device, self.act_dtype = backend.device, act_dtype
        self.captures = limits.decode_rows
        self.dependent = dependent
        self._fenced = False
        self._slab = device_tensor(arena.num_bytes, self.device, "buffers of a step")
        self._arena = arena
        self._pages = PageLayout(kv_layout.kind, kv_layout.head_dim)
        self._crossover = crossover(target.arch)
        shared = arena.fields["shared"].offset
        self._few = LinearScratch(
            **{name: self._view(field, shared) for name, field in arena.few.items()},
            arrived=self._view(arena.fields["linear arrived"]),
        )
        self._many = None
        if arena.many:
            many = {name: self._view(field, shared) for name, field in arena.many.items()}
            self._many = PanelScratch(x=self._view(arena.fields["normed"]), **many)
        partial = self._view(arena.partial, shared)
        self._attention = DecodeScratch(partial, self._view(arena.fields["attention arrived"]))
        self._sumsq = self._view(arena.fields["sums of squares"])
        self._normed = self._view(arena.fields["normed"])
        self._samples = self._view(arena.fields["samples"])
        self._rope = rope  # of the angles that each batch brings
        self._owned = ExitStack()
        tables = self._view(arena.fields["tables"])
        self._staging = Staging(backend, tables, limits, rope, num_pages, self._owned)
        self._programs = Programs(backend)
        self._bound: dict[tuple[int, ...], tuple[Sequence, Bindings]] = {}
        fields = {name: self._view(field) for name, field in arena.fields.items()}
        self._row_staging = None
        if "embedding rows" in fields:
            self._row_staging = RowStaging(backend, fields["embedding rows"], self._owned)
        self.runs_ahead = self._row_staging is None  # rows from the disk are read by the host, which must know the ids
        self._sampler = Sampler(self._programs, limits, fields, self._owned)
        self._weights: dict[int, tuple[Linear, TiledWeight | DenseWeight]] = {}
        self._staged: list[DeviceBatch] = []
        self._now: DeviceBatch | None = None

    def close(self) -> None:
        self._owned.close()

    def capture(self, step: Callable[[], None]) -> Callable[[], None] | None:
        return self.backend.capture(step)

    def _view(self, field: Field, base: int = 0) -> torch.Tensor:
        raw = self._slab[base + field.offset : base + field.offset + field.num_bytes]
        return raw.view(TORCH_DTYPES[field.dtype]).view(field.shape)

    def buffer(self, name: str) -> torch.Tensor:
        tensor = self._view(self._arena.fields[name])
        if name == "mlp":
            tensor = tensor.view(self.act_dtype)[:, : self.limits.intermediate_size]
        elif name == "attn":
            tensor = tensor[:, : self.limits.attn_width]
        return tensor.view(self.act_dtype) if name == "qkv" else tensor

    # load

    def pack(
        self,
        parts: Sequence[QuantizedMatrix | DenseMatrix],
        layout: LinearLayout,
        out: torch.Tensor,
        output_order: NDArray[np.int32] | None = None,
    ) -> None:
        pack_linear(parts, layout, out.numpy(), output_order)

    # step

    def stage(self, batches: Sequence[ForwardBatch], rows: TableRows | None = None) -> None:
        self._staged, self._now = [], None
        if not batches:
            return
        if (rows is None) != self.runs_ahead:
            raise KernelError(
                f"rows: {'found none' if rows is None else 'found some'}, but the buffers of a step are made for an "
                f"embedding that is {'in memory' if self.runs_ahead else 'on the disk'}"
            )
        shapes = self._staging.check(batches, len(self._samples) if self.runs_ahead else 0)
        if rows is not None:
            batches = self._row_staging.send(batches, rows)
        self._staged = self._staging.fill(batches, shapes)
        self._now = self._staged[0]

    def select(self, batch_idx: int) -> None:
        self._now = self._staged[batch_idx]

    def choose_logits(self, rows: NDArray[np.int32]) -> None:
        self._now = self._staging.with_logits(self._now, rows)

    def fence(self) -> None:
        self._fenced = True

    def launch(self) -> None:
        pass

    def _may_overlap(self) -> bool:
        """Whether the next launch may start before its predecessor has ended."""
        fenced, self._fenced = self._fenced, False
        return self.dependent and not fenced

    def _run(self, key: Hashable, bindings: Bindings, record: Callable[[Backend], None]) -> None:
        """Starts what ``record`` launches, which is recorded the first time: see ``Programs.run`` on ``key``. The
        selected batch's tables, and all buffers of the arena, follow from its serial number."""
        key = key, self._now.serial, self._fenced, self.dependent
        if self._programs.run(key, bindings, record).work:
            self._fenced = False

    def _bind(self, *objects: Segments | torch.Tensor | None) -> Bindings:
        """Weights and tensors of one layer. They are kept alive, so that no other object is ever at their ``id``."""
        key = tuple(map(id, objects))
        found = self._bound.get(key)
        if found is None:
            if len(self._bound) >= MAX_BINDINGS:
                self._bound.clear()
            tensors, forms = [], []
            for one in objects:
                for linear in one if isinstance(one, tuple) else ():
                    names = sorted(linear.fields)
                    tensors += [linear.fields[name] for name in names]
                    forms.append((linear.N, linear.layout.kind, self._weight(linear).form, *names))
                if not isinstance(one, tuple):
                    tensors.append(one)
                forms.append(None)  # the end of one
            found = self._bound[key] = (objects, self._programs.bind(tensors, tuple(forms)))
        return found[1]

    decode_alike = False  # a prompt's attention is another kernel

    @property
    def invariant_rows(self) -> int:
        """From here on linears dequantize panels and leave the products to cuBLAS, whose bits depend on the number of
        rows. Attention of a chunk and all else is row-invariant at any size."""
        return ALL_ROWS if self._many is None else self._crossover

    @property
    def step_key(self) -> BatchShape:
        return self._now.shape

    def embed(self, table: Linear, h: torch.Tensor, spec: EmbedSpec) -> None:
        if spec.scale != 1.0:
            raise UnsupportedModelError(f"scale of the embedding: found {spec.scale:g}, expected 1 on a GPU")

        def record(backend: Backend) -> None:
            embed(
                *(backend, table.fields["weight"], self._now.ids, h, self._rows_sumsq(h)),
                samples=self._samples,
                dependent=self._may_overlap(),
            )

        self._run(("embed", place(h)), self._bind((table,)), record)

    def project(self, h: torch.Tensor, norm: Norm | None, w: Segments, out: torch.Tensor, loras: Loras = ()) -> None:
        _refuse_loras(loras)
        weight, eps = (None, None) if norm is None else (norm.weight, norm.eps)
        key = "project", place(h), place(out), eps
        self._run(key, self._bind(w, weight), lambda backend: self._project(backend, h, norm, w, out))

    def _project(self, backend: Backend, h: torch.Tensor, norm: Norm | None, w: Segments, out: torch.Tensor) -> None:
        start = 0
        for linear in w:
            self._linear(backend, h, norm, linear, Output.store(out[:, start : start + linear.N]))
            start += linear.N

    def attend(
        self,
        qkv: torch.Tensor,
        spec: AttentionSpec,
        layer_idx: int,
        kv: KVCache,
        out: torch.Tensor,
        consumer: Segments = (),
    ) -> None:
        if spec.rope is not self._rope and spec.rope != self._rope:
            raise UnsupportedModelError(
                f"RoPE of layer {layer_idx}: found {spec.rope}, expected {self._rope}, which all layers share on a GPU"
            )
        pages, eps = kv.layer(layer_idx), _head_eps(spec)
        key = (
            "attend",
            place(qkv),
            place(out),
            spec.num_heads,
            spec.head_dim,
            spec.scale,
            spec.window,
            spec.softcap,
            eps,
        )
        norms = (None if norm is None else norm.weight for norm in (spec.q_norm, spec.k_norm))
        self._run(
            key,
            self._bind(pages, *norms, consumer),
            lambda backend: self._attend(backend, qkv, spec, pages, out, consumer),
        )

    def _attend(
        self,
        backend: Backend,
        qkv: torch.Tensor,
        spec: AttentionSpec,
        pages: torch.Tensor,
        out: torch.Tensor,
        consumer: Segments,
    ) -> None:
        batch = self._now
        T, n = batch.shape.num_rows, batch.shape.num_decode_rows
        rows = QkvRows(qkv, batch.cosine, batch.sine, _head_norms(spec))
        params = AttentionParams(spec.scale, spec.window, spec.softcap)
        channel_map = consumer[0].fields.get("channel_map") if consumer else None
        for tables in batch.decode_tables(self._staging.most_items):
            attention_decode(
                *(backend, self._pages, rows.rows(0, n), tables, pages, out[:n], self._attention, params),
                channel_map=channel_map,
                dependent=self._may_overlap(),
            )
        if n < T:
            q = self._normed[: T * spec.num_heads * spec.head_dim].view(T, spec.num_heads, spec.head_dim)
            append_kv(
                *(backend, self._pages, rows.rows(n, T), batch.slots[n:], pages, q[n:]),
                dependent=self._may_overlap(),
            )
            attention_prefill(
                *(backend, self._pages, q, batch.prefill_tables, pages, out, params),
                channel_map=channel_map,
                dependent=self._may_overlap(),
            )

    def gated_mlp(
        self,
        h: torch.Tensor,
        norm: Norm,
        w: Segments,
        spec: GatedMlp,
        out: torch.Tensor,
        consumer: Segments = (),
        loras: Loras = (),
    ) -> None:
        _refuse_loras(loras)
        if spec.activation != "silu":
            raise UnsupportedModelError(
                f"activation of the gated MLP: found {spec.activation!r}, expected silu on a GPU"
            )
        key = "gated_mlp", place(h), place(out), norm.eps
        self._run(
            key,
            self._bind(w, norm.weight, consumer),
            lambda backend: self._gated_mlp(backend, h, norm, w, out, consumer),
        )

    def _gated_mlp(
        self, backend: Backend, h: torch.Tensor, norm: Norm, w: Segments, out: torch.Tensor, consumer: Segments
    ) -> None:
        if len(w) == 1:  # its rows are packed in the order that ``consumer`` wants
            self._linear(backend, h, norm, w[0], Output.gated(out))
            return
        T, width = out.shape
        both = self._view(self._arena.fields["fused"])[: T * 2 * width].view(self.act_dtype).view(T, 2 * width)
        self._project(backend, h, norm, w, both)
        channel_map = consumer[0].fields.get("channel_map") if consumer else None
        silu_mul(
            *(backend, both[:, :width], both[:, width:], out), channel_map=channel_map, dependent=self._may_overlap()
        )

    def add_projection(
        self, x: torch.Tensor, w: Segments, h: torch.Tensor, branch: Branch = PLAIN_BRANCH, loras: Loras = ()
    ) -> None:
        _refuse_loras(loras)
        if branch.post_norm is not None:
            raise UnsupportedModelError("norm of a block's output: found one, expected none on a GPU")

        def record(backend: Backend) -> None:
            for linear in w:
                self._linear(backend, x, None, linear, Output.residual(h, self._rows_sumsq(h), branch.scale))

        self._run(("add_projection", place(x), place(h), branch.scale), self._bind(w), record)

    def logits(self, h: torch.Tensor, norm: Norm, head: Linear, spec: LogitsSpec, out: torch.Tensor) -> torch.Tensor:
        done = sum(stop - start for start, stop in self._now.shape.logit_runs)
        if head.layout.kind == "dense" and self.target.arch < MIN_ARCH:
            self._logits(self.backend, h, norm, head, out)  # cuBLAS is handed the weight: nothing to record
        else:
            self._run(
                ("logits", place(h), place(out), norm.eps),
                self._bind((head,), norm.weight),
                lambda backend: self._logits(backend, h, norm, head, out),
            )
        out = out[:done]
        if spec.scale != 1.0:
            out.mul_(spec.scale)
        if spec.softcap is not None:
            out.div_(spec.softcap).tanh_().mul_(spec.softcap)
        return out

    def _logits(self, backend: Backend, h: torch.Tensor, norm: Norm, head: Linear, out: torch.Tensor) -> None:
        done, most = 0, self.invariant_rows - 1
        for first, last in self._now.shape.logit_runs:
            for start in range(first, last, most):
                stop = min(start + most, last)
                part = out[done : done + stop - start]
                self._linear(backend, h[start:stop], norm, head, Output.store(part), first_row=start)
                done += stop - start

    def sample(self, logits: torch.Tensor, params: SamplingBatch) -> DeviceSamples:
        return self._sampler.sample(logits, params, dependent=self._may_overlap())

    # linears

    def _linear(
        self, backend: Backend, x: torch.Tensor, norm: Norm | None, linear: Linear, out: Output, first_row: int = 0
    ) -> None:
        """x W into ``out``. A normalised x under act-order is normalised into the weight's order first; one that is not
        comes in that order already."""
        weight = self._weight(linear)
        normed = None if norm is None else self._normed_input(x, norm, first_row)
        channel_map = linear.fields.get("channel_map")
        if normed is not None and channel_map is not None:
            sorted_x = self._normed[: x.numel()].view(x.shape)
            rms_norm(backend, x, normed, sorted_x, channel_map=channel_map, dependent=self._may_overlap())
            x, normed = sorted_x, None
        if isinstance(weight, DenseWeight):
            self._dense(backend, x, normed, weight, out)
            return
        num_rows, n = x.shape[0], max(0, self._now.shape.num_decode_rows - first_row)
        if self._many is None or num_rows - n < self._crossover:
            n = num_rows
        if n:
            part = None if normed is None else normed.rows(0, n)
            multiply(
                *(backend, weight, x[:n], out.rows(0, n)),
                norm=part,
                scratch=self._few,
                dependent=self._may_overlap(),
            )
        if n < num_rows:
            part = None if normed is None else normed.rows(n, num_rows)
            multiply_many(backend, weight, x[n:], out.rows(n, num_rows), self._many, part)

    def _dense(
        self, backend: Backend, x: torch.Tensor, norm: NormedInput | None, weight: DenseWeight, out: Output
    ) -> None:
        width = weight.weight.shape[1]
        if x.shape[1] != width:  # the buffer's rows are padded with zeros
            x = torch.as_strided(x, (x.shape[0], width), x.stride())
        if self.target.arch < MIN_ARCH:
            self._dense_by_cublas(backend, x, norm, weight, out)
            return
        multiply_dense(backend, weight, x, out, norm=norm, dependent=self._may_overlap())

    def _dense_by_cublas(
        self, backend: Backend, x: torch.Tensor, norm: NormedInput | None, weight: DenseWeight, out: Output
    ) -> None:
        """The head, on GPUs without tensor cores. One row at a time: no row's bits depend on the others."""
        normed = self._normed[: x.numel()].view(x.shape)
        rms_norm(backend, x, norm, normed)
        for i in range(x.shape[0]):
            multiply_f32(normed[i : i + 1], weight.weight, out.y[i : i + 1])
        if weight.bias is not None:
            out.y.add_(weight.bias[: out.y.shape[1]])

    def _weight(self, linear: Linear) -> TiledWeight | DenseWeight:
        found = self._weights.get(id(linear))
        if found is None or found[0] is not linear:
            found = self._weights[id(linear)] = (linear, view_linear(linear.layout, linear.fields))
        return found[1]

    def _rows_sumsq(self, h: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Sums of squares of the rows of h, which begin at row ``first_row`` of the selected batch."""
        start = self._now.start + first_row
        return self._sumsq[start : start + h.shape[0]]

    def _normed_input(self, h: torch.Tensor, norm: Norm, first_row: int = 0) -> NormedInput:
        return NormedInput(self._rows_sumsq(h, first_row), norm.weight, norm.eps)


def _head_norms(spec: AttentionSpec) -> HeadNorms:
    q, k = spec.q_norm, spec.k_norm
    return HeadNorms(None if q is None else q.weight, None if k is None else k.weight, _head_eps(spec))


def _refuse_loras(loras: Loras) -> None:
    if loras:
        raise UnsupportedModelError(f"adapters: found {len(loras)}, expected none on a GPU")


def _head_eps(spec: AttentionSpec) -> float:
    """The epsilon that the norms of q and k share; 0 without norms."""
    q, k = spec.q_norm, spec.k_norm
    if q is not None and k is not None and q.eps != k.eps:
        raise UnsupportedModelError(f"norms of q and k: found epsilons {q.eps} and {k.eps}, expected the same on a GPU")
    norm = k if q is None else q
    return 0.0 if norm is None else norm.eps
