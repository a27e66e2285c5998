"""The operations on a GPU: exl's own kernels, every buffer a view of one arena.

A decode step of up to 8 rows is five launches a layer: qkv, attention (with the append), o, gate and up, down. Under
act-order each of qkv and gate/up is preceded by one that normalises into its order; the same launch is there where a
layer has LayerNorm, or none. A norm of what o or down adds is a launch after it.

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
from exl.kernels.blob import pack_linear
from exl.kernels.embed import embed
from exl.kernels.gated_product import gated_product
from exl.kernels.launch import Backend
from exl.kernels.linear import LinearScratch
from exl.kernels.linear_io import ACTIVATIONS, Output
from exl.kernels.linear_many import PanelScratch
from exl.kernels.norms import RowNorm, norm_add, row_norm
from exl.kernels.params import Bindings
from exl.kernels.program import Programs, place
from exl.kernels.scale_logits import scale_logits
from exl.layout.arena import ArenaLayout
from exl.layout.fields import Field
from exl.layout.kv import DeviceKVLayout
from exl.layout.layers import LinearLayout
from exl.layout.linear_config import MIN_ARCH
from exl.layout.pages import PageLayout
from exl.layout.specs import Target
from exl.layout.steps import StepLimits
from exl.memory.device import device_tensor
from exl.ops.base import (
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
from exl.ops.cuda_linear import LinearBuffers, Linears, Residual
from exl.ops.cuda_mixtures import WithoutMixtures
from exl.ops.cuda_sampling import DeviceSamples, Sampler

MAX_BINDINGS = 8192  # remembered: one per layer and operation


class CudaOps(WithoutMixtures):
    """See ``exl.ops.base.Ops``. Owns the arena; weights and cache are the caller's."""

    threads = None

    def __init__(
        self,
        backend: Backend,
        target: Target,
        kv_layout: DeviceKVLayout,
        limits: StepLimits,
        arena: ArenaLayout,
        ropes: Sequence[RopeConfig],
        num_pages: int,
        *,
        num_window_pages: int = 0,
        act_dtype: torch.dtype = torch.float16,
        dependent: bool = True,
    ) -> None:
        """``ropes``: those of all layers, each once; ``limits.num_ropes`` of them. ``num_pages``, ``num_window_pages``:
        of the cache, see ``Staging``. ``act_dtype``: f16, or bf16 for models whose values leave f16's range.
        ``dependent``: launches start before their predecessors have ended, where the GPU can do that. A plain
        attribute, read at every launch: False from here on makes every launch wait for those before it, and changes no
        result. Graphs stay as they were captured.
        """
        self.backend, self.target, self.kv_layout, self.limits = backend, target, kv_layout, limits
        self.device, self.act_dtype = backend.device, act_dtype
        self.captures = limits.decode_rows
        self.dependent = dependent
        self._fenced = False
        self._slab = device_tensor(arena.num_bytes, self.device, "buffers of a step")
        self._arena = arena
        self._pages = PageLayout(kv_layout.kind, kv_layout.head_dim)
        shared = arena.fields["shared"].offset
        few = LinearScratch(
            **{name: self._view(field, shared) for name, field in arena.few.items()},
            arrived=self._view(arena.fields["linear arrived"]),
        )
        many, normed = None, self._view(arena.fields["normed"])
        if arena.many:
            many = PanelScratch(x=normed, **{name: self._view(field, shared) for name, field in arena.many.items()})
        self._linears = Linears(target.arch, LinearBuffers(few, many, normed), self._may_overlap)
        partial = self._view(arena.partial, shared)
        self._attention = DecodeScratch(partial, self._view(arena.fields["attention arrived"]))
        self._sumsq = self._view(arena.fields["sums of squares"])
        self._normed = normed
        self._samples = self._view(arena.fields["samples"])
        if len(ropes) != limits.num_ropes:
            raise KernelError(f"RoPEs: found {len(ropes)}, but the tables of a window are made for {limits.num_ropes}")
        self._ropes = tuple(ropes)  # in the order of the angles that each batch brings
        self._owned = ExitStack()
        tables = self._view(arena.fields["tables"])
        self._staging = Staging(backend, tables, limits, ropes, num_pages, self._owned, num_window_pages)
        self._programs = Programs(backend)
        self._bound: dict[tuple[int, ...], tuple[Sequence, Bindings]] = {}
        fields = {name: self._view(field) for name, field in arena.fields.items()}
        self._row_staging = None
        if "embedding rows" in fields:
            self._row_staging = RowStaging(backend, fields["embedding rows"], self._owned)
        self.runs_ahead = self._row_staging is None  # rows from the disk are read by the host, which must know the ids
        self._sampler = Sampler(self._programs, limits, fields, self._owned)
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
                    forms.append((linear.N, linear.layout.kind, self._linears.weight(linear).form, *names))
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
        return self._linears.invariant_rows

    @property
    def step_key(self) -> BatchShape:
        return self._now.shape

    def embed(self, table: Linear, h: torch.Tensor, spec: EmbedSpec) -> None:
        def record(backend: Backend) -> None:
            embed(
                *(backend, table.fields["weight"], self._now.ids, h, self._rows_sumsq(h)),
                scale=spec.scale,
                samples=self._samples,
                dependent=self._may_overlap(),
            )

        self._run(("embed", place(h), spec.scale), self._bind((table,)), record)

    def project(self, h: torch.Tensor, norm: Norm | None, w: Segments, out: torch.Tensor, loras: Loras = ()) -> None:
        _refuse_loras(loras)
        key = "project", place(h), place(out), _numbers(norm)
        self._run(
            key, self._bind(w, _weight(norm)), lambda backend: self._store(backend, self._residual(h, norm), w, out)
        )

    def _store(self, backend: Backend, x: torch.Tensor | Residual, w: Segments, out: torch.Tensor) -> None:
        self._linears.store(backend, x, w, out, self._now.shape.num_decode_rows)

    def attend(
        self,
        qkv: torch.Tensor,
        spec: AttentionSpec,
        layer_idx: int,
        kv: KVCache,
        out: torch.Tensor,
        consumer: Segments = (),
    ) -> None:
        rope = self._rope_number(spec.rope, layer_idx)
        pages = kv.layer(layer_idx)
        key = (
            *("attend", place(qkv), place(out), spec.num_heads, spec.head_dim, spec.scale, spec.window, spec.softcap),
            *(_numbers(spec.q_norm), _numbers(spec.k_norm), spec.norm_rows, kv.windowed, rope),
        )
        norms = (None if norm is None else norm.weight for norm in (spec.q_norm, spec.k_norm))
        self._run(
            key,
            self._bind(pages, *norms, spec.sinks, consumer),
            lambda backend: self._attend(backend, qkv, spec, rope, kv.windowed, pages, out, consumer),
        )

    def _attend(
        self,
        backend: Backend,
        qkv: torch.Tensor,
        spec: AttentionSpec,
        rope: int,
        windowed: bool,
        pages: torch.Tensor,
        out: torch.Tensor,
        consumer: Segments,
    ) -> None:
        batch = self._now
        T, n = batch.shape.num_rows, batch.shape.num_decode_rows
        if spec.norm_rows:
            _norm_rows(backend, qkv, spec, self._may_overlap())
        rows = QkvRows(qkv, *batch.angles[rope], _head_norms(spec))
        params = AttentionParams(spec.scale, spec.window, spec.softcap, spec.sinks)
        channel_map = consumer[0].fields.get("channel_map") if consumer else None
        for tables in batch.decode_tables(self._staging.most_items, windowed):
            attention_decode(
                *(backend, self._pages, rows.rows(0, n), tables, pages, out[:n], self._attention, params),
                channel_map=channel_map,
                dependent=self._may_overlap(),
            )
        if n < T:
            q = self._normed[: T * spec.num_heads * spec.head_dim].view(T, spec.num_heads, spec.head_dim)
            slots, _ = batch.places(windowed)
            append_kv(
                *(backend, self._pages, rows.rows(n, T), slots[n:], pages, q[n:]),
                dependent=self._may_overlap(),
            )
            attention_prefill(
                *(backend, self._pages, q, batch.prefill_tables(windowed), pages, out, params),
                channel_map=channel_map,
                dependent=self._may_overlap(),
            )

    def _rope_number(self, rope: RopeConfig, layer_idx: int) -> int:
        """Of the angles that a batch brings."""
        for i, known in enumerate(self._ropes):
            if rope is known or rope == known:
                return i
        known = "; ".join(map(str, self._ropes))
        raise UnsupportedModelError(f"RoPE of layer {layer_idx}: found {rope}, expected one of the model's: {known}")

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
        _refuse_loras(loras)
        if spec.activation not in ACTIVATIONS:
            names = " or ".join(ACTIVATIONS)
            raise UnsupportedModelError(f"activation of the gated MLP: found {spec.activation!r}, expected {names}")
        key = "gated_mlp", place(h), place(out), _numbers(norm), spec.activation
        self._run(
            key,
            self._bind(w, _weight(norm), consumer),
            lambda backend: self._gated_mlp(backend, self._residual(h, norm), w, spec.activation, out, consumer),
        )

    def _gated_mlp(
        self, backend: Backend, x: Residual, w: Segments, activation: str, out: torch.Tensor, consumer: Segments
    ) -> None:
        if len(w) == 1:  # its rows are packed in the order that ``consumer`` wants
            self._linears.run(backend, x, w[0], Output.gated(out, activation), self._now.shape.num_decode_rows)
            return
        T, width = out.shape
        both = self._view(self._arena.fields["fused"])[: T * 2 * width].view(self.act_dtype).view(T, 2 * width)
        self._store(backend, x, w, both)
        channel_map = consumer[0].fields.get("channel_map") if consumer else None
        gated_product(
            *(backend, both[:, :width], both[:, width:], out, activation),
            channel_map=channel_map,
            dependent=self._may_overlap(),
        )

    def add_projection(
        self, x: torch.Tensor, w: Segments, h: torch.Tensor, branch: Branch = PLAIN_BRANCH, loras: Loras = ()
    ) -> None:
        _refuse_loras(loras)
        norm = branch.post_norm
        key = "add_projection", place(x), place(h), branch.scale, _numbers(norm)
        self._run(key, self._bind(w, _weight(norm)), lambda backend: self._add_projection(backend, x, w, h, branch))

    def _add_projection(self, backend: Backend, x: torch.Tensor, w: Segments, h: torch.Tensor, branch: Branch) -> None:
        norm, sumsq = branch.post_norm, self._rows_sumsq(h)
        if norm is None:
            for linear in w:
                target = Output.residual(h, sumsq, branch.scale)
                self._linears.run(backend, x, linear, target, self._now.shape.num_decode_rows)
            return
        if "branch" not in self._arena.fields:
            raise KernelError("norm of a block's output: found one, but the buffers of a step are made for none")
        y = self._view(self._arena.fields["branch"])[: len(h)]
        self._store(backend, x, w, y)
        post = RowNorm(norm.weight, norm.eps, norm.kind)
        norm_add(backend, y, post, h, sumsq, branch.scale, dependent=self._may_overlap())

    def logits(self, h: torch.Tensor, norm: Norm, head: Linear, spec: LogitsSpec, out: torch.Tensor) -> torch.Tensor:
        done = sum(stop - start for start, stop in self._now.shape.logit_runs)
        if head.layout.kind == "dense" and self.target.arch < MIN_ARCH:
            self._logits(self.backend, h, norm, head, spec, out)  # cuBLAS is handed the weight: nothing to record
        else:
            self._run(
                ("logits", place(h), place(out), _numbers(norm), spec),
                self._bind((head,), norm.weight),
                lambda backend: self._logits(backend, h, norm, head, spec, out),
            )
        return out[:done]

    def _logits(
        self, backend: Backend, h: torch.Tensor, norm: Norm, head: Linear, spec: LogitsSpec, out: torch.Tensor
    ) -> None:
        done, most = 0, self.invariant_rows - 1
        for first, last in self._now.shape.logit_runs:
            for start in range(first, last, most):
                stop = min(start + most, last)
                part = Output.store(out[done : done + stop - start])
                x = self._residual(h[start:stop], norm, first_row=start)
                self._linears.run(backend, x, head, part, self._now.shape.num_decode_rows - start)
                done += stop - start
        if done and spec != LogitsSpec():
            scale_logits(backend, out[:done], spec.scale, spec.softcap, dependent=self._may_overlap())

    def sample(self, logits: torch.Tensor, params: SamplingBatch) -> DeviceSamples:
        return self._sampler.sample(logits, params, dependent=self._may_overlap())

    def _rows_sumsq(self, h: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Sums of squares of the rows of h, which begin at row ``first_row`` of the selected batch."""
        start = self._now.start + first_row
        return self._sumsq[start : start + h.shape[0]]

    def _residual(self, h: torch.Tensor, norm: Norm | None, first_row: int = 0) -> Residual:
        return Residual(h, self._rows_sumsq(h, first_row), norm)


def _numbers(norm: Norm | None) -> tuple[float, str] | None:
    """All that launches depend on besides the weight."""
    return None if norm is None else (norm.eps, norm.kind)


def _weight(norm: Norm | None) -> torch.Tensor | None:
    return None if norm is None else norm.weight


def _norm_rows(backend: Backend, qkv: torch.Tensor, spec: AttentionSpec, dependent: bool) -> None:
    """q and k of ``qkv`` normalised in place, each over the channels of all heads."""
    width = spec.num_heads * spec.head_dim
    q, k = (None if norm is None else RowNorm(norm.weight, norm.eps, norm.kind) for norm in (spec.q_norm, spec.k_norm))
    parts = qkv[:, :width], qkv[:, width : width + spec.num_kv_heads * spec.head_dim]
    if q is not None and k is not None:
        both = qkv[:, : width + spec.num_kv_heads * spec.head_dim]
        row_norm(backend, both, q, both, k, dependent=dependent)
        return
    for x, norm in zip(parts, (q, k), strict=True):
        if norm is not None:
            row_norm(backend, x, norm, x, dependent=dependent)


def _head_norms(spec: AttentionSpec) -> HeadNorms:
    """What attention's own kernels normalise."""
    q, k = (None, None) if spec.norm_rows else (spec.q_norm, spec.k_norm)
    return HeadNorms(None if q is None else q.weight, None if k is None else k.weight, _head_eps(spec))


def _refuse_loras(loras: Loras) -> None:
    if loras:
        raise UnsupportedModelError(f"adapters: found {len(loras)}, expected none on a GPU")


def _head_eps(spec: AttentionSpec) -> float:
    """The epsilon that the norms of q and k share; 0 without norms."""
    q, k = spec.q_norm, spec.k_norm
    if q is not None and k is not None and q.eps != k.eps:
        raise UnsupportedModelError(f"norms of q and k: found epsilons {q.eps} and {k.eps}, expected the same on a GPU")
    if any(norm is not None and norm.kind != "rms" and not spec.norm_rows for norm in (q, k)):
        raise UnsupportedModelError("norms of q and k: found LayerNorm of each head, expected RMSNorm on a GPU")
    norm = k if q is None else q
    return 0.0 if norm is None else norm.eps
