"""Sizes of the memory that the CPU's own kernels compute in, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from exl.layout.columns import activation_bytes
from exl.layout.fields import FIELD_ALIGN, align_up
from exl.layout.layers import ExpertLayout, LayerLayout, LinearLayout, column_layout
from exl.layout.steps import StepLimits

# Signed bytes of a quantized activation, by the name of the arithmetic; f32 activations are not quantized.
ARITHMETIC = {"int16": 2, "int8": 1, "f32": 0}
DEFAULT_ARITHMETIC = "int16"
RECORDED_ROWS = 64  # of the largest step that is recorded
FEW_ROWS = 8  # rows of a sequence that attend as decode does, and the most that one pass over a linear's words takes
SPLIT = 256  # tokens that one piece of attention covers
_ARENA_BYTES = 8 << 20  # at which the rows of an arena stop: at 16 MB, two of a small model's would double its plan
_PAIR_BYTES = 32 << 20  # of rows of experts that are computed at once, about
PAIR_ITEM = 4  # numbers of an entry of ``exl.cpu_kernels.plan_experts``
_LINEARS = ("qkv", "o", "gate_up", "down", "shared_gate_up", "shared_down")
_PARTIAL_BYTES = 16 << 20  # of attention's pieces that are computed before they are merged: enough for many threads


@dataclass(frozen=True)
class CompiledSizes:
    """What the operations own: bytes of scratch by purpose, of each of two arenas, and rows of the largest step that
    an arena has room for."""

    scratch: dict[str, int]
    arena: int = 0
    arena_rows: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(self.scratch.values()) + 2 * self.arena


def input_bytes(layout: LinearLayout, arithmetic: str) -> int:
    """Bytes that one row of a linear's input takes in the form in which the linear reads it; 0: as it is."""
    if layout.kind != "columns":
        return 0
    columns, parts = column_layout(layout.spec), ARITHMETIC[arithmetic]
    if parts:
        return columns.num_records * activation_bytes(columns.rows, parts)
    return 4 * columns.padded_K if "source" in layout.fields else 0


def a_partial_bytes(limits: StepLimits) -> int:
    """Of a row's result in one split before it is merged: maximum, sum and weighted values, for each query head."""
    return limits.num_heads * (align_up(limits.head_dim, 16) + 2) * 4


def step_partials(limits: StepLimits, num_rows: int) -> int:
    """Of a step of so many sequences, results in splits that a recorded one has room for. There are no more where
    sequences share no pages: a sequence has one for each whole split of its tokens, and one for the rest."""
    return min(num_rows * -(-limits.max_context // SPLIT), -(-limits.cache_tokens // SPLIT) + num_rows)


def scratch_partials(limits: StepLimits) -> int:
    """The same for batches that are not recorded, which are computed in groups of sequences if they have more: at
    least as many as one sequence may have."""
    splits = -(-limits.max_context // SPLIT)
    some = min(step_partials(limits, limits.max_sequences), _PARTIAL_BYTES // a_partial_bytes(limits))
    return min(limits.max_rows * splits, max(FEW_ROWS * splits, some))


def angle_bytes(limits: StepLimits, num_rows: int) -> int:
    """cos and sin of one RoPE."""
    return _rows(num_rows, 4 * limits.head_dim)


@dataclass(frozen=True)
class Pairs:
    """Rows and their experts, of a batch: pairs, of which so many are computed at once, in waves, in the order of the
    experts. An expert's pairs of a wave are in items of up to ``item_rows``."""

    total: int
    at_once: int
    experts: int
    item_rows: int

    @property
    def waves(self) -> int:
        return -(-self.total // self.at_once)

    @property
    def items(self) -> int:
        """Of a wave, at most."""
        return min(self.at_once, self.experts + self.at_once // self.item_rows)

    @property
    def table_bytes(self) -> int:
        """Of ``exl.cpu_kernels.plan_experts``."""
        return 4 * (PAIR_ITEM * self.waves * self.items + (PAIR_ITEM + 1) * self.total)


def pairs_of(limits: StepLimits, num_rows: int, count: int, item_rows: int = FEW_ROWS) -> Pairs:
    """``count``: experts of the layer. ``item_rows``: the smallest that a kernel for several rows takes."""
    found = limits.experts
    total = num_rows * found.per_token
    width = 2 * limits.hidden_size + 3 * found.width
    most = max(RECORDED_ROWS * found.per_token, _PAIR_BYTES // (4 * width))
    return Pairs(total, min(total, most), count, item_rows)


def expert_bytes(
    layout: ExpertLayout, limits: StepLimits, arithmetic: str, num_rows: int, *, apart: bool = False
) -> dict[str, int]:
    """Bytes of the buffers of one mixture, by purpose. ``apart``: inputs of each linear have a place of their own, as
    in an arena."""
    pairs, hidden = pairs_of(limits, num_rows, layout.count), limits.hidden_size
    gate_up, down = (layout.blob.linears[name] for name in ("gate_up", "down"))
    both = sum(linear.spec.N for linear in gate_up)
    inputs = [input_bytes(linear, arithmetic) for linear in (*gate_up, *down)]
    return {
        "router": _rows(num_rows, 4 * layout.count),
        "expert tables": align_up(pairs.table_bytes, FIELD_ALIGN),
        "expert rows": _rows(pairs.at_once, 4 * hidden),
        "expert inputs": _rows(pairs.at_once, sum(inputs) if apart else max(inputs)),
        "expert gate and up": _rows(pairs.at_once, 4 * both),
        "expert products": _rows(pairs.at_once, 2 * both),
        "expert results": _rows(pairs.at_once, 4 * hidden),
    }


def _linears(layers: Iterable[LayerLayout], *names: str) -> list[LinearLayout]:
    return [linear for layer in layers for name in names for linear in layer.linears.get(name, ())]


def _rows(num_rows: int, num_bytes: int) -> int:
    return align_up(num_rows * num_bytes, FIELD_ALIGN)


def scratch_sizes(
    layers: Sequence[LayerLayout],
    limits: StepLimits,
    arithmetic: str,
    experts: Sequence[ExpertLayout | None] = (),
) -> dict[str, int]:
    """Bytes of the buffers that operations share, by purpose."""
    T, head = limits.max_rows, max(limits.max_rows, limits.max_logit_rows)
    linears = _linears(layers, *_LINEARS, "head", "embed")
    of_experts: dict[str, int] = {}
    if limits.experts is not None and limits.experts.shared_width:
        of_experts = {"shared products": _rows(T, 4 * limits.experts.shared_width), "shared gate": _rows(T, 4)}
    for layout in experts:
        if layout is not None:
            sizes = expert_bytes(layout, limits, arithmetic, T)
            of_experts |= {name: max(size, of_experts.get(name, 0)) for name, size in sizes.items()}
    return of_experts | {
        "normed": _rows(head, 4 * limits.hidden_size),
        "inputs": _rows(head, max((input_bytes(linear, arithmetic) for linear in linears), default=0)),
        "gate and up": _rows(T, 8 * limits.intermediate_size),
        "branch": _rows(T, 4 * limits.hidden_size),
        "queries": _rows(T, 4 * limits.attn_width),
        "row factors": _rows(T, 8),
        "partials": align_up(scratch_partials(limits) * a_partial_bytes(limits), FIELD_ALIGN),
        "adapters' inner rows": _rows(T, 4 * limits.lora_rank),
        "samples": 8 * limits.max_logit_rows,
    }


def compiled_sizes(
    layers: Sequence[LayerLayout],
    limits: StepLimits,
    arithmetic: str,
    head: LayerLayout,
    experts: Sequence[ExpertLayout | None] = (),
) -> CompiledSizes:
    """``head``: the blob of the head, or of the embedding if that is the head. ``experts``: by layer.

    An arena has room for a step of all sequences, or of the largest power of two with which it stays small; of one,
    however large it is."""
    rows = min(RECORDED_ROWS, limits.max_sequences)
    while rows > 1 and arena_bytes(layers, limits, arithmetic, head, rows, experts) > _ARENA_BYTES:
        rows = 1 << (rows - 1).bit_length() - 1
    scratch = scratch_sizes((*layers, head), limits, arithmetic, experts)
    return CompiledSizes(scratch, arena_bytes(layers, limits, arithmetic, head, rows, experts), rows)


def arena_bytes(
    layers: Sequence[LayerLayout],
    limits: StepLimits,
    arithmetic: str,
    head: LayerLayout,
    num_rows: int,
    experts: Sequence[ExpertLayout | None] = (),
) -> int:
    """Of one of the two arenas of recorded steps of ``num_rows`` rows at most: every value in memory of its own."""
    T, hidden = num_rows, 4 * limits.hidden_size
    widths = (limits.qkv_width, 2 * limits.attn_width, 3 * limits.intermediate_size)  # with queries; gate, up, product
    a_layer = sum(_rows(T, 4 * width) for width in widths) + 8 * FIELD_ALIGN
    a_layer += 6 * _rows(T, hidden)  # two norms, two branches, the residual stream twice
    a_layer += _rows(T, 8)  # factors of norms of q and k over all heads
    a_layer += align_up(step_partials(limits, T) * a_partial_bytes(limits), FIELD_ALIGN)
    total = 2 * _rows(T, hidden) + 2 * _rows(T, 4 * limits.vocab_size) + limits.num_ropes * angle_bytes(limits, T)
    for layer in layers:
        linears = _linears([layer], *_LINEARS)
        total += a_layer + sum(_rows(T, input_bytes(linear, arithmetic)) for linear in linears)
    for layout in experts:
        if layout is not None:
            total += sum(expert_bytes(layout, limits, arithmetic, T, apart=True).values()) + 4 * FIELD_ALIGN
            # Routed rows, the stream after the experts and after the shared one, what that gives, and its gate.
            total += 4 * _rows(T, hidden) + 2 * _rows(T, 4 * limits.experts.per_token) + _rows(T, 4)
    heads = _linears([head], "head", "embed")
    return total + max(_rows(T, input_bytes(linear, arithmetic)) for linear in heads)
