"""The buffers of a step on a GPU: where each lies in one slab, from shapes alone.

The plan counts it, ``CudaOps`` uses it. Nothing of it grows: a larger step than ``StepLimits`` says is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from exl.layout import attention, samples
from exl.layout.fields import Field, FieldPacker, align_up
from exl.layout.layers import DENSE_STEP, LayerLayout, LinearLayout, tile_layout
from exl.layout.linear_config import MIN_ARCH, crossover_tokens, scratch_shapes
from exl.layout.panels import panel_scratch_shapes
from exl.layout.specs import Target
from exl.layout.steps import StepLimits
from exl.layout.tiles import ROWS

ARENA_ALIGN = 256  # as the driver aligns an allocation; at least what every kernel's vector loads need
TABLE_ALIGN = 4  # words: tables of a batch start at multiples of 16 bytes
_TABLES = 6  # tables per batch, besides two of angles for each RoPE
_SAMPLE_ROWS_EACH = 16
# Multiprocessors of the largest GPU of an architecture, for plans without that GPU (NVIDIA's data sheets): TITAN RTX,
# A100, RTX A6000, Orin, RTX 6000 Ada, H100, B200, Thor, RTX PRO 6000.
_MOST_MULTIPROCESSORS = {75: 72, 80: 108, 86: 84, 87: 16, 89: 142, 90: 132, 100: 148, 110: 20, 120: 188}


@dataclass(frozen=True)
class ArenaLayout:
    """Fields by purpose:

    - ``residual`` f32 [window rows, C], ``sums of squares`` f32 [window rows, C / 16]
    - ``qkv``, ``attn``, ``mlp``: 16 bits, [rows of a chunk, width]; mlp's rows are padded to eights
    - ``logits`` f32 [logit rows, V], ``samples`` i32 [draws]
    - ``tables`` i32: a window's ids, slots, pages and angles, copied from the host in one piece
    - ``normed`` 16 bits: normalised input, or q of a prefill chunk
    - ``fused`` 16 bits: gate and up, if they are two launches
    - ``branch`` f32 [rows of a chunk, C]: a block's output, if a norm comes between it and the residual
    - ``shared`` bytes: what linears of 9 to 64 tokens hand over, or a dequantized panel and its product, or what decode
      attention hands over: never two of them at once
    - ``linear arrived``, ``attention arrived`` i32: counters, zero between launches
    - ``embedding rows`` 16 bits [window rows, C]: only if the embedding is on the disk; a window's rows, each once
    - ``sampling tables`` u8: what the draws of a step ask for; ``sampling <name>``: what its blocks hand over
    """

    fields: Mapping[str, Field]
    num_bytes: int
    few: Mapping[str, Field]  # inside ``shared``: scratch of linears of 9 to 64 tokens
    many: Mapping[str, Field]  # inside ``shared``: panel and product; empty if no chunk is long enough for panels
    partial: Field  # inside ``shared``: scratch of decode attention

    @property
    def upload_bytes(self) -> int:
        """Bytes of page-locked buffers on the host: two for each table copied, and two for samples that come back."""
        tables = self.fields["tables"].num_bytes + self.fields["sampling tables"].num_bytes
        (draws,), (rows,) = self.fields["samples"].shape, self.fields["sampling arrived"].shape
        return 2 * (tables + sum(samples.found_bytes(draws, rows)))

    @property
    def row_upload_bytes(self) -> int:
        """The same for rows of an embedding on the disk."""
        return 2 * self.fields["embedding rows"].num_bytes if "embedding rows" in self.fields else 0

    def bytes_of(self, *names: str) -> int:
        return sum(align_up(self.fields[name].num_bytes, ARENA_ALIGN) for name in names if name in self.fields)


def arena_layout(
    limits: StepLimits, target: Target, layers: Sequence[LayerLayout], rows_of: LinearLayout | None = None
) -> ArenaLayout:
    """``layers``: all of them, with the head among them. ``rows_of``: an embedding on the disk, whose rows come to the
    device window by window. Pure."""
    specs = {segment.spec for layer in layers for segments in layer.linears.values() for segment in segments}
    tiles = {tile_layout(spec) for spec in specs if spec.quantized}
    few = FieldPacker(ARENA_ALIGN)
    most = target.num_multiprocessors or _most_multiprocessors(target.arch)
    shapes = scratch_shapes(tiles, target.arch, most) if tiles else {}
    for name in ("x", "x_scale", "partial"):
        dtype, count = shapes.get(name, ("f32", 0))
        few.add(name, dtype, (count,))
    many = FieldPacker(ARENA_ALIGN)
    if tiles and limits.max_rows >= crossover(target.arch):
        panels = panel_scratch_shapes(tiles, limits.max_rows)
        for name in ("panel", "product"):  # x is ``normed``
            dtype, count = panels[name]
            many.add(name, dtype, (count,))
    handed_over = attention.scratch_shapes(
        limits.max_sequences,
        attention_items(limits),
        limits.num_heads,
        limits.num_kv_heads,
        limits.head_dim,
        attention.MAX_NEW_TOKENS,
    )
    partial = Field(0, handed_over["partial"][1] * 4, "f32", (handed_over["partial"][1],))
    step = FieldPacker(ARENA_ALIGN)
    step.add("residual", "f32", (limits.window_rows, limits.hidden_size))
    step.add("sums of squares", "f32", (limits.window_rows, -(-limits.hidden_size // ROWS)))
    step.add("qkv", "f16", (limits.max_rows, limits.qkv_width))
    step.add("attn", "f16", (limits.max_rows, align_up(limits.attn_width, DENSE_STEP)))
    step.add("mlp", "f16", (limits.max_rows, align_up(limits.intermediate_size, DENSE_STEP)))
    step.add("logits", "f32", (limits.max_logit_rows, limits.vocab_size))
    step.add("samples", "i32", (max_draws(limits),))
    step.add("tables", "i32", (table_words(limits),))
    if rows_of is not None:
        table = rows_of.fields["weight"]
        vocab_size, width = table.shape
        step.add("embedding rows", table.dtype, (min(limits.window_rows, vocab_size), width))
    max_k = max(limits.hidden_size, limits.attn_width, limits.intermediate_size)
    step.add("normed", "f16", (limits.max_rows * max_k,))
    if any(len(layer.linears.get("gate_up", ())) > 1 for layer in layers):
        step.add("fused", "f16", (limits.max_rows * 2 * limits.intermediate_size,))
    if limits.post_norms:
        step.add("branch", "f32", (limits.max_rows, limits.hidden_size))
    shared = align_up(max(few.num_bytes, many.num_bytes, partial.num_bytes), ARENA_ALIGN)
    step.add("shared", "u8", (shared,))
    step.add("linear arrived", "i32", (shapes.get("arrived", ("i32", 0))[1],))
    dtype, count = handed_over["arrived"]
    step.add("attention arrived", dtype, (count,))
    rows = sample_rows(limits)
    step.add("sampling tables", "u8", (samples.table_bytes(rows, limits.vocab_size),))
    for name, (dtype, count) in samples.scratch_shapes(rows, limits.vocab_size).items():
        step.add(f"sampling {name}", dtype, (count,))
    return ArenaLayout(
        MappingProxyType(step.fields),
        align_up(step.num_bytes, ARENA_ALIGN),
        MappingProxyType(few.fields),
        MappingProxyType(many.fields),
        partial,
    )


def sample_rows(limits: StepLimits) -> int:
    """Rows of one launch of the sampler. A sequence may take several: verified drafts, log-probabilities."""
    return min(_SAMPLE_ROWS_EACH * limits.max_sequences, samples.MAX_ROWS)


def max_draws(limits: StepLimits) -> int:
    """Draws of one step, in as many launches as they take: several may read one row of logits."""
    return max(limits.max_logit_rows, samples.MAX_ROWS)


def attention_items(limits: StepLimits) -> int:
    """Items of one launch of decode attention: of a step whose sequences share no page. Others may take several."""
    num_tokens = max(limits.max_context, limits.cache_tokens)
    return attention.most_items(limits.max_sequences, num_tokens, limits.max_context)


def table_words(limits: StepLimits) -> int:
    """i32 and f32 words of the tables of a window: see ``exl/ops/cuda_batch.py``."""
    half = (limits.head_dim + 1) // 2
    sequences = limits.window_sequences
    more = limits.page_tables - 1  # each with slots of its own
    a_row, a_sequence = 2 + more + 2 * half * limits.num_ropes, limits.max_pages * (1 + more) + 3
    tables = _TABLES + 2 * limits.num_ropes + 2 * more
    return limits.window_rows * a_row + sequences * (a_sequence + 1 + tables * TABLE_ALIGN)


def crossover(arch: int) -> int:
    """Rows of a chunk from which on linears dequantize panels. Without tensor cores cuBLAS is ahead from 32 on."""
    return crossover_tokens(arch) if arch >= MIN_ARCH else 32


def _most_multiprocessors(arch: int) -> int:
    return _MOST_MULTIPROCESSORS[max((a for a in _MOST_MULTIPROCESSORS if a <= arch), default=75)]
