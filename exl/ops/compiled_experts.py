"""Mixtures of experts as stages. Kernels read from memory which experts a row takes, so that a step with mixtures is
recorded like any other, and the host decides nothing between stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from exl.cpu_kernels.choose_experts import ChooseExperts, check_score
from exl.cpu_kernels.dense import dense_kernel
from exl.cpu_kernels.expert_rows import AddGatedRows, AddPairs, GatherPairs
from exl.cpu_kernels.for_items import ForItems
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.library import slots
from exl.cpu_kernels.linear import MOST_ROWS, ROW_BLOCK, best_kind
from exl.cpu_kernels.linear import linear as integer_kernel
from exl.cpu_kernels.linear_f32 import MOST_ROWS as MOST_F32_ROWS
from exl.cpu_kernels.linear_f32 import GatherRows, best_f32_kind
from exl.cpu_kernels.linear_f32 import linear_f32 as f32_kernel
from exl.cpu_kernels.plan_experts import ENTRY, PlanExperts
from exl.cpu_kernels.quantize import QuantizeRows, form_of
from exl.layout.cpu_steps import ARITHMETIC, Pairs, input_bytes, pairs_of
from exl.layout.fields import DTYPE_BYTES, Field
from exl.layout.layers import LinearLayout, column_layout
from exl.layout.steps import StepLimits
from exl.ops import compiled_rows
from exl.ops.base import ExpertSet, GatedMlp, Linear, RouteSpec
from exl.ops.compiled_linear import CHUNK_BYTES, DENSE_CHUNK_BYTES, LinearStages
from exl.ops.compiled_tape import Rows, Tape

_COLUMNS = 1024  # of one row, in one chunk
_RECORDS = 32  # quantized in one chunk


@dataclass(frozen=True)
class _Tables:
    """Where the tables of ``PlanExperts`` are."""

    pairs: Pairs
    places: int
    pair_entries: int
    item_entries: int

    @classmethod
    def at(cls, pairs: Pairs, address: int) -> _Tables:
        pair_entries = address
        item_entries = pair_entries + ENTRY * pairs.total
        return cls(pairs, item_entries + ENTRY * pairs.waves * pairs.items, pair_entries, item_entries)

    def wave(self, number: int) -> _Wave:
        first = number * self.pairs.at_once
        return _Wave(
            first,
            min(self.pairs.at_once, self.pairs.total - first),
            self.pair_entries + ENTRY * first,
            self.item_entries + ENTRY * number * self.pairs.items,
        )


@dataclass(frozen=True)
class _Wave:
    first: int
    count: int  # of pairs, at most
    pair_entries: int
    item_entries: int


class ExpertStages:
    def __init__(self, linears: LinearStages, limits: StepLimits, arithmetic: str, isa: str) -> None:
        self._linears, self._limits, self._isa = linears, limits, isa
        self._arithmetic, self._parts = arithmetic, ARITHMETIC[arithmetic]

    def choose(
        self,
        tape: Tape,
        x: Rows,
        router: Linear,
        bias: torch.Tensor | None,
        spec: RouteSpec,
        cached: NDArray[np.int32],
        ids: Rows,
        weights: Rows,
    ) -> None:
        """``cached`` i32 [T]: rows with -1 get no experts."""
        check_score(spec.score, router.N)
        logits = Rows(tape.memory.scratch("router", 4 * x.num_rows * router.N), router.N, x.num_rows, router.N)
        self._linears.multiply(tape, x, (router,), logits)
        kernel = ChooseExperts(spec.score, spec.normalize, spec.groups > 1)
        tape.add(
            kernel, x.num_rows,
            *(logits.address, bias, ids.address, weights.address, router.N, spec.per_token),
            *(float(spec.eps), float(spec.scaling), spec.groups, spec.top_groups, cached),
        )  # fmt: skip

    def add(
        self,
        tape: Tape,
        x: Rows,
        ids: Rows,
        weights: Rows,
        experts: ExpertSet,
        spec: GatedMlp,
        h: Rows,
        out: Rows,
    ) -> None:
        """out = h + the experts' sum; ``out`` may be h where stages run once."""
        work = _Work(self, tape, x, ids, weights, experts, spec)
        for number in range(work.pairs.waves):
            wave = work.tables.wave(number)
            work.results(wave)
            work.add(wave, h if number == 0 else out, out)

    def add_shared(self, tape: Tape, y: Rows, gate: Rows, h: Rows, out: Rows) -> None:
        """out = h + sigmoid(gate) * y."""
        chunks = -(-out.width // _COLUMNS)
        rows = (y.address, gate.address, h.address, h.stride, out.address, out.stride, out.width)
        tape.add(AddGatedRows(), out.num_rows * chunks, *rows, _COLUMNS, chunks)

    def item_rows(self, layouts: Mapping[str, tuple[LinearLayout, ...]], num_rows: int, mean: int) -> int:
        """The most rows of an item that all linears' kernels take. ``mean``: rows of an expert, about."""
        return min(self.kernel(layout, num_rows, mean)[1] for name in ("gate_up", "down") for layout in layouts[name])

    def kernel(self, layout: LinearLayout, num_rows: int, mean: int) -> tuple[KernelSpec, int, int]:
        """Of a linear of an expert: the kernel, how many rows it takes at once, and its columns or blocks a chunk."""
        spec = layout.spec
        if layout.kind == "dense":
            columns = self._linears.share(spec.N, spec.K * DTYPE_BYTES[spec.dtype], 16, DENSE_CHUNK_BYTES)
            rows = 1 if num_rows == 1 else min(max(2, mean), ROW_BLOCK)
            return dense_kernel(spec.dtype, rows, self._isa), 1 if num_rows == 1 else ROW_BLOCK, columns
        columns = column_layout(spec)
        if num_rows == 1:
            kind = "row"
        elif self._parts:
            kind = best_kind(self._isa, max(2, mean))
        else:
            kind = best_f32_kind(max(2, mean))
        most = {"row": 1, "rows": MOST_ROWS if self._parts else MOST_F32_ROWS, "panel": ROW_BLOCK}[kind]
        blocks = 1
        if kind != "panel":
            blocks = self._linears.share(columns.num_blocks, columns.num_records * columns.record_bytes, 1, CHUNK_BYTES)
        kernel = integer_kernel(columns, self._parts, kind) if self._parts else f32_kernel(columns, kind)
        return kernel, most, blocks


class _Work:
    """One mixture for the rows of a batch."""

    def __init__(
        self,
        stages: ExpertStages,
        tape: Tape,
        x: Rows,
        ids: Rows,
        weights: Rows,
        experts: ExpertSet,
        spec: GatedMlp,
    ) -> None:
        self.stages, self.tape, self.x, self.weights, self.spec = stages, tape, x, weights, spec
        self.experts, blob, limits = experts, experts.layout.blob, stages._limits
        self.blob, count, per_token = blob, experts.layout.count, ids.width
        self.mean = -(-x.num_rows * per_token // count)
        item_rows = stages.item_rows(blob.linears, x.num_rows, self.mean)
        self.pairs = pairs_of(limits, x.num_rows, count, item_rows)
        self.room = pairs_of(limits, x.num_rows, count)
        self.tables = _Tables.at(self.pairs, tape.memory.scratch("expert tables", self.room.table_bytes))
        tape.add(
            PlanExperts(), 1,
            *(ids.address, self.tables.item_entries, self.tables.pair_entries, self.tables.places),
            *(self.pairs.total, per_token, count, item_rows, self.pairs.at_once, self.pairs.items, self.pairs.waves),
        )  # fmt: skip

    def _rows(self, purpose: str, count: int, width: int) -> Rows:
        return Rows(self.tape.memory.scratch(purpose, 4 * count * width), width, count, width)

    def results(self, wave: _Wave) -> None:
        """The experts' rows, without their weights."""
        tape, count = self.tape, wave.count
        rows = self._rows("expert rows", count, self.x.width)
        tape.add(GatherPairs(), count, self.x.address, self.x.stride, wave.pair_entries, rows.address, rows.width)
        both = self._rows("expert gate and up", count, sum(x.spec.N for x in self.blob.linears["gate_up"]))
        self._multiply(wave, "gate_up", rows, both)
        products = self._rows("expert products", count, both.width // 2)
        compiled_rows.gated(tape, both, self.spec, products)
        self.y = self._rows("expert results", count, self.x.width)
        self._multiply(wave, "down", products, self.y)

    def add(self, wave: _Wave, h: Rows, out: Rows) -> None:
        chunks = -(-out.width // _COLUMNS)
        self.tape.add(
            AddPairs(), out.num_rows * chunks,
            *(self.y.address, self.tables.places, self.weights.address, h.address, h.stride, out.address, out.stride),
            *(out.width, self.weights.width, wave.first, wave.first + wave.count, _COLUMNS, chunks),
        )  # fmt: skip

    def _multiply(self, wave: _Wave, name: str, x: Rows, out: Rows) -> None:
        start = 0
        for i, layout in enumerate(self.blob.linears[name]):
            fields = self.blob.linear_fields(name, i)
            inputs, row_bytes, stride = self._inputs(wave, layout, fields, x)
            part = out.columns(start, layout.spec.N)
            self._linear(wave, layout, fields, (inputs, row_bytes, stride), part)
            start += layout.spec.N

    def _inputs(self, wave: _Wave, layout: LinearLayout, fields: Mapping[str, Field], x: Rows) -> tuple[int, int, int]:
        """The address of a linear's inputs, bytes of one row of them, and its elements if they are f32."""
        if layout.kind == "dense":
            return x.address, 4 * x.stride, x.stride
        columns, parts = column_layout(layout.spec), self.stages._parts
        source, row_bytes = fields.get("source"), input_bytes(layout, self.stages._arithmetic)
        if not parts and source is None:
            return x.address, 4 * x.stride, x.stride
        place = self.tape.memory.scratch("expert inputs", wave.count * row_bytes)
        if parts:
            args = (x.address, place, x.stride, columns.num_records, 0, None, _RECORDS, columns.K)
            kernel, pieces = (
                QuantizeRows(form_of(columns, parts), source is not None),
                -(-columns.num_records // _RECORDS),
            )
            moved, count_slot = {0: 4 * x.stride, 1: row_bytes}, 4
            weights = {} if source is None else {5: source}
        else:
            sizes = (columns.padded_K, columns.padded_K, 0, None, columns.padded_K)
            args = (x.address, None, place, *sizes, *(None,) * 5, x.stride)
            kernel, pieces, moved, count_slot, weights = (
                GatherRows(),
                1,
                {0: 4 * x.stride, 2: row_bytes},
                5,
                {1: source},
            )
        self._for_items(wave, kernel, args, weights, moved, count_slot, pieces, by_pair=True)
        return place, row_bytes, columns.padded_K

    def _linear(
        self,
        wave: _Wave,
        layout: LinearLayout,
        fields: Mapping[str, Field],
        inputs: tuple[int, int, int],
        out: Rows,
    ) -> None:
        address, row_bytes, stride = inputs
        kernel, _, share = self.stages.kernel(layout, self.x.num_rows, self.mean)
        spec = layout.spec
        if layout.kind == "dense":
            sizes, total, weight = (spec.K, 0, spec.N, share), spec.N, fields["weight"]
        else:
            columns = column_layout(spec)
            sizes, total, weight = (
                (columns.num_records, 0, spec.N, columns.num_blocks),
                columns.num_blocks,
                fields["records"],
            )
        args = (None, address, out.address, out.stride, *sizes, None, None, 0, 1.0, share, stride)
        weights = {0: weight} | ({8: fields["bias"]} if "bias" in fields else {})
        moved = {1: row_bytes, 2: 4 * out.stride}
        self._for_items(wave, kernel, args, weights, moved, 5, -(-total // share))

    def _for_items(
        self,
        wave: _Wave,
        kernel: KernelSpec,
        args: tuple[int | float | None, ...],
        weights: Mapping[int, Field],
        moved: Mapping[int, int],
        count: int,
        chunks: int,
        *,
        by_pair: bool = False,
    ) -> None:
        """``args``: the slots of ``kernel`` for the first pair; ``moved``: bytes of a pair by slot."""
        outer = ForItems(kernel, tuple(weights), tuple(moved), count, by_pair)
        number = wave.count if by_pair else self.pairs.items
        self.tape.add(
            outer, number * chunks,
            *(wave.item_entries, wave.pair_entries, slots(*args), chunks, self.experts.table, len(args)),
            *(field.offset for field in weights.values()),
            *moved.values(),
        )  # fmt: skip
