"""Attention as stages: new keys and values into the cache, then every row over what it sees."""

from __future__ import annotations

import torch

from exl.checkpoint.rope_config import RopeConfig
from exl.cpu_kernels.append_kv import AppendKV
from exl.cpu_kernels.attention import DecodeAttention, PrefillAttention, partial_bytes
from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.merge import MergeAttention
from exl.cpu_kernels.norm import RowFactors
from exl.cpu_kernels.rope_tables import RopeTables
from exl.errors import UnsupportedModelError
from exl.layout.kv import DeviceKVLayout
from exl.ops.base import AttentionSpec
from exl.ops.compiled_batch import BatchTables, Places
from exl.ops.compiled_tape import RecordForm, Records, Rows, Tape
from exl.ops.rope import depends_on_length
from exl.ops.rope_tables import num_angles

_ANGLE_ROWS = 16  # in one chunk


class AttentionStages:
    def __init__(self, library: Library, kv_layout: DeviceKVLayout) -> None:
        self._library, self._kv_layout = library, kv_layout

    def attend(
        self,
        tape: Tape,
        qkv: Rows,
        spec: AttentionSpec,
        batch: BatchTables,
        pages: torch.Tensor,
        out: Rows,
        form: RecordForm | None = None,
        windowed: bool = False,
    ) -> Records | None:
        """qkv [T, W] -> out [T, A]. Returns out in the ``form`` of the linear that reads it where one pass gives both;
        else None. ``pages``: the layer's, u8 [page, kv head, bytes]; ``windowed``: it has a window and
        pages of its own."""
        places = batch.places(windowed)
        queries = tape.memory.scratch("queries", 4 * qkv.num_rows * spec.num_heads * spec.head_dim)
        self._append(tape, qkv, spec, batch, places, pages, queries)
        records = None
        if form is not None and batch.num_few == batch.num_sequences and _whole_records(spec, form):
            records = Records(tape.memory.scratch("inputs", form.num_bytes(out.num_rows)), out.num_rows)
        if batch.num_few:
            self._few(tape, spec, batch, places, pages, queries, out, form, records)
        if batch.num_few < batch.num_sequences:
            table = batch.blocks(spec.num_heads // spec.num_kv_heads, spec.head_dim)
            tape.add(
                PrefillAttention(self._kv_layout.kind, spec.head_dim, spec.softcap is not None, spec.sinks is not None),
                len(table) * spec.num_kv_heads,
                *(queries, pages, places.page_table, places.page_table.shape[1], table, out.address),
                *(*_parameters(spec), spec.sinks),
            )
        return records

    def _append(
        self,
        tape: Tape,
        qkv: Rows,
        spec: AttentionSpec,
        batch: BatchTables,
        places: Places,
        pages: torch.Tensor,
        queries: int,
    ) -> None:
        half = num_angles(spec.rope, spec.head_dim)
        cos, sin = self._angles(tape, spec.rope, spec.head_dim, half, batch)
        there = [norm for norm in (spec.q_norm, spec.k_norm) if norm is not None]
        if any(norm.kind != "rms" for norm in there):
            raise UnsupportedModelError("norms of q and k: found LayerNorm, the CPU's kernels have RMSNorm")
        has_norms = spec.q_norm is not None, spec.k_norm is not None
        scales = batch.query_scales(spec.rope) if spec.rope.query_beta else None
        by_row = spec.norm_rows and bool(there), scales is not None
        kernel = AppendKV(self._kv_layout.kind, spec.head_dim, half, *has_norms, *by_row)
        norms = [(None, 0.0) if norm is None else (norm.weight, norm.eps) for norm in (spec.q_norm, spec.k_norm)]
        factors = None
        if kernel.row_norms:
            factors, widths = tape.memory.scratch("row factors", 8 * qkv.num_rows), (spec.num_heads, spec.num_kv_heads)
            sizes, eps = (n * spec.head_dim for n in widths), (float(norm[1]) for norm in norms)
            tape.add(RowFactors(), qkv.num_rows, qkv.address, qkv.stride, factors, *sizes, *eps)
        tape.add(
            kernel,
            qkv.num_rows * spec.num_kv_heads,
            *(qkv.address, qkv.stride, queries, pages, places.slots, cos, sin, spec.num_heads, spec.num_kv_heads),
            *(*norms[0], *norms[1], factors, scales),
        )

    def _few(
        self,
        tape: Tape,
        spec: AttentionSpec,
        batch: BatchTables,
        places: Places,
        pages: torch.Tensor,
        queries: int,
        out: Rows,
        form: RecordForm | None,
        records: Records | None,
    ) -> None:
        """Sequences with few rows: a chunk for each split of tokens, and then the results of the splits together; some
        sequences after others if there is not room for the results of all."""
        a_partial = spec.num_heads * partial_bytes(spec.head_dim)
        kind, capped = self._kv_layout.kind, spec.softcap is not None
        attend = DecodeAttention(kind, spec.head_dim, capped)
        merge = MergeAttention(kind, spec.head_dim, None if records is None else form.form, spec.sinks is not None)
        for pieces in batch.splits(spec.window):
            items, rows = pieces.items, pieces.rows
            partials = tape.memory.scratch("partials", pieces.num_partials * a_partial)
            tape.add_changing(
                attend, ("splits", spec.window), (items.count, items.most), spec.num_kv_heads,
                *(queries, pages, places.page_table, places.page_table.shape[1], items.array, partials),
                *_parameters(spec),
            )  # fmt: skip
            tape.add_changing(
                merge, ("rows", spec.window), (rows.count, rows.most), spec.num_kv_heads,
                *(partials, rows.array, out.address, spec.num_heads, spec.num_kv_heads),
                *((None, None) if records is None else (records.address, records.num_rows)),
                spec.sinks,
            )  # fmt: skip

    def _angles(self, tape: Tape, rope: RopeConfig, head_dim: int, half: int, batch: BatchTables) -> tuple[int, int]:
        """Addresses of cos and sin f32 [T, half]. A recorded step computes them each time; else they are kept with the
        batch."""
        num_bytes = 4 * batch.num_rows * half
        chosen = batch.row_sequences if depends_on_length(rope) else None
        kernel, chunks = RopeTables(chosen is not None), -(-batch.num_rows // _ANGLE_ROWS)

        def arguments(place: int) -> tuple:
            frequencies, factor = batch.frequencies(rope, head_dim)
            sizes = (half, factor, batch.num_rows, _ANGLE_ROWS)
            return (batch.positions, frequencies, place, place + num_bytes, *sizes, chosen)

        if tape.recorded:
            place = tape.once(
                ("angles", rope, head_dim), "angles", 2 * num_bytes,
                lambda place: tape.add(kernel, chunks, *arguments(place)),
            )  # fmt: skip
            return place, place + num_bytes
        kept = batch.angles.get((rope, head_dim))
        if kept is None:
            kept = batch.angles[rope, head_dim] = torch.empty(2 * num_bytes, dtype=torch.uint8)
            self._library.call(kernel, slots(*arguments(kept.data_ptr())), chunks)
        return kept.data_ptr(), kept.data_ptr() + num_bytes


def _whole_records(spec: AttentionSpec, form: RecordForm) -> bool:
    """Whether the query heads that share a head of K and V fill whole records, in the order in which they come."""
    return form.source is None and spec.num_heads // spec.num_kv_heads * spec.head_dim % form.form.rows == 0


def _parameters(spec: AttentionSpec) -> tuple[int | float, ...]:
    """Slots 6 to 10 of attention's kernels."""
    softcap = 0.0 if spec.softcap is None else float(spec.softcap)
    return spec.num_heads, spec.num_kv_heads, float(spec.scale), spec.window or 0, softcap
