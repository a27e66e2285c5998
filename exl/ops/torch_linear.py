"""Linears on the CPU through torch: packs weights into a ``LinearLayout``, and multiplies by them.

Decode rows are row-invariant: int4pack weights go through torch's bf16 kernel, in which a row's result does not depend
on the number of rows; all others are multiplied row by row. Prefill rows are multiplied by f32 panels of exactly
dequantized weights: ``(code - zero) * scale`` has at most 5 + 11 bits (9 + 11 for 8-bit codes; bf16 scales have 8),
which fit f32's 24, so ``code * scale - zero * scale`` does not round either. Scales in f32 meet the exact
``code - zero`` and round once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from exl.formats.matrix import FP4_VALUES, DenseMatrix, QuantizedMatrix
from exl.layout.layers import LinearLayout
from exl.layout.specs import Target
from exl.layout.steps import PACK_COLUMNS, PANEL_ELEMENTS
from exl.ops.base import Linear, view_field

_DECODE_PANEL_ELEMENTS = 1 << 18  # 1 MB, multiplied while still in cache; a quarter faster than 4 MB
_ALIGNED_ELEMENTS = 16  # of f32: 64 bytes, as torch allocates
_ROW_TILE = 16  # rows of a product that are shared out among threads as one
_PACK_WORDS = 1 << 18  # words repacked per step, so that intermediates stay in cache
_LOW_NIBBLES = np.uint32(0x0F0F0F0F)
_FP4_VALUES = torch.tensor(FP4_VALUES, dtype=torch.float32)
_INT4_ZERO = 8  # the code that means 0 to torch's kernel


# --- packing -----------------------------------------------------------------------------------------------------


def pack_linear(
    parts: Sequence[QuantizedMatrix | DenseMatrix], layout: LinearLayout, target: Target, out: torch.Tensor
) -> None:
    """Writes matrices that lie side by side along N into ``out``, u8 [layout.num_bytes], in blocks of rows."""
    fields = {name: view_field(out, field) for name, field in layout.fields.items()}
    if layout.kind == "dense":
        _pack_dense(parts, fields["weight"])
    else:
        _pack_quantized(parts, layout, target, fields)
    if "bias" in fields:
        start = 0
        for part in parts:
            bias = fields["bias"][start : start + part.N]
            bias.zero_() if part.bias is None else bias.copy_(_bias_f32(part))
            start += part.N
    if "order" in fields:
        fields["order"].copy_(torch.from_numpy(np.ascontiguousarray(parts[0].order)))


def _bias_f32(part: QuantizedMatrix | DenseMatrix) -> torch.Tensor:
    bias = torch.from_numpy(np.ascontiguousarray(part.bias))
    if isinstance(part, DenseMatrix) and part.bias_dtype == "bf16":
        bias = bias.view(torch.bfloat16)
    return bias.float()


def _pack_dense(parts: Sequence[DenseMatrix], weight: torch.Tensor) -> None:
    raw = weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight
    start = 0
    for part in parts:
        if part.read_into is not None:  # the file stores rows as the layout does
            part.read_into(weight[start : start + part.N].view(torch.uint8).view(-1).numpy())
            start += part.N
            continue
        for i in range(0, part.N, PACK_COLUMNS):
            rows = part.rows(i, min(part.N, i + PACK_COLUMNS))
            rows = rows.view(np.int16) if part.dtype == "bf16" else rows
            raw[start + i : start + i + len(rows)].copy_(torch.from_numpy(rows))
        start += part.N


def _pack_quantized(
    parts: Sequence[QuantizedMatrix], layout: LinearLayout, target: Target, fields: dict[str, torch.Tensor]
) -> None:
    scales = np.concatenate([part.scales for part in parts], axis=1)  # [G, N]
    zeros = np.concatenate([part.zeros for part in parts], axis=1)
    codes = fields["codes"].numpy()
    if layout.kind == "planes":
        fields["scales"].copy_(torch.from_numpy(scales.T))
        fields["zeros"].numpy()[:] = zeros.T
        for start, block in _blocks(parts):
            codes[start : start + block.shape[1]] = pack_planes(block.T, layout.spec.bits)
        return
    fields["scales"].copy_(torch.from_numpy(scales))
    fields["zeros"].numpy()[:] = zeros
    wide = scales.astype(np.float32)
    pair = np.stack([wide, (_INT4_ZERO - zeros.astype(np.float32)) * wide], axis=2)
    fields["scales_zeros"].copy_(torch.from_numpy(pair))
    order = target.int4pack or ""
    if order.startswith("split") and all(part.read_eights and part.N % target.int4pack_block == 0 for part in parts):
        start = 0
        for part in parts:
            stop = start + part.K * part.N // 2
            pack_int4_words(part.read_eights(), target.int4pack_block, codes[start:stop])
            start = stop
        return
    for start, block in _blocks(parts):
        packed = pack_int4(block, order)
        codes[start * layout.spec.K // 2 :][: packed.size] = packed


def _blocks(parts: Sequence[QuantizedMatrix]):
    """Yields (start, codes u8 [K, n]) of the fused matrix, in blocks of ``PACK_COLUMNS`` outputs."""
    starts = np.cumsum([0, *(part.N for part in parts)])
    total = int(starts[-1])
    for start in range(0, total, PACK_COLUMNS):
        stop = min(total, start + PACK_COLUMNS)
        pieces = [
            part.codes(max(0, start - int(first)), min(part.N, stop - int(first)))
            for part, first in zip(parts, starts, strict=False)
            if first < stop and first + part.N > start
        ]
        yield start, pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


def pack_planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes u8 [n, K] -> u8 [n, K * bits / 8], K a multiple of 8. Whole-row shifts and masks can unpack it.

    8 bits: unchanged. 4 bits: byte j holds codes j and j + K/2. 2 bits: byte j holds codes j + i * K/4, i = 0..3, from
    the low bits up. 3 bits: first the low two bits of all codes, as for 2 bits; then K/8 bytes, of which byte j holds
    the top bits of codes j + i * K/8, i = 0..7.
    """
    if bits == 8:
        return codes
    if bits == 3:
        return np.concatenate([pack_planes(codes & 3, 2), _pack_fields(codes >> 2, 1)], axis=1)
    return _pack_fields(codes, bits)


def _pack_fields(codes: np.ndarray, bits: int) -> np.ndarray:
    per_byte = 8 // bits
    fields = codes.reshape(codes.shape[0], per_byte, -1)
    packed = fields[:, 0].copy()
    for i in range(1, per_byte):
        packed |= fields[:, i] << (bits * i)
    return packed


def pack_int4(codes: np.ndarray, order: str) -> np.ndarray:
    """Codes u8 [K, n] -> bytes in the order of torch's ``_convert_weight_to_int4pack_for_cpu``.

    The order is: blocks of 64 (AVX-512) or 32 outputs; within a block, K rows. "split": byte i of a row holds outputs i
    and i + half. "pairs", and a last block that is not full: outputs 2i and 2i + 1.
    """
    block = int(order[-2:])
    pieces = []
    for start in range(0, codes.shape[1], block):
        part = codes[:, start : start + block]
        if part.shape[1] == block and order.startswith("split"):
            low, high = part[:, : block // 2], part[:, block // 2 :]
        else:
            low, high = part[:, 0::2], part[:, 1::2]
        pieces.append((low | high << 4).reshape(-1))
    return np.concatenate(pieces)


def pack_int4_words(words: np.ndarray, block: int, out: np.ndarray) -> None:
    """Words u32 [K / 8, N], each with 8 codes along K, N a multiple of ``block`` -> ``out`` u8 [K * N / 2]: the bytes
    of ``pack_int4`` in the "split" order, but ten times as fast, because codes are not unpacked.

    Byte j of a block's row k holds output j in its low bits and output j + half in its high bits. Of the 8 rows that
    come from a word, row 2m is the low nibble of the word's byte m, and row 2m + 1 is the high nibble.
    """
    half = block // 2
    num_words, N = words.shape
    step = max(1, _PACK_WORDS // N)
    shape = (step, N // block, half)
    even, odd, high = (np.empty(shape, np.uint32) for _ in range(3))
    row = np.empty(shape, np.uint8)
    # One element of ``rows``, [N / block, K / 8, m, even or odd], is all `half` bytes of one row of a block.
    rows = out.reshape(N // block, num_words, 4, 2, half).view(f"V{half}")[..., 0]
    for start in range(0, num_words, step):
        count = min(step, num_words - start)
        pairs = words[start : start + count].reshape(count, N // block, 2, half)
        e, o, h, r = even[:count], odd[:count], high[:count], row[:count]
        np.bitwise_and(pairs[:, :, 1], _LOW_NIBBLES, out=h)
        np.left_shift(h, 4, out=h)
        np.bitwise_and(pairs[:, :, 0], _LOW_NIBBLES, out=e)
        np.bitwise_or(e, h, out=e)
        np.right_shift(pairs[:, :, 0], 4, out=o)
        np.bitwise_and(o, _LOW_NIBBLES, out=o)
        np.bitwise_and(pairs[:, :, 1], ~_LOW_NIBBLES, out=h)
        np.bitwise_or(o, h, out=o)
        for parity, quads in enumerate((e, o)):
            for m in range(4):
                if m:
                    np.right_shift(quads, 8, out=quads)
                np.copyto(r, quads, casting="unsafe")  # keeps byte 0
                rows[:, start : start + count, m, parity] = r.view(f"V{half}")[..., 0].T


@lru_cache(maxsize=1)
def probe_int4pack() -> str | None:
    """The nibble order that this torch build uses on this processor; None if it has no such kernel.

    AVX-512, AVX2 and plain builds differ. A candidate must produce torch's bytes, for full and partial blocks, and
    torch's kernel must then give the right product.
    """
    rng = np.random.default_rng(0)
    K, N = 64, 80
    codes = rng.integers(0, 16, (K, N), dtype=np.uint8)
    x = torch.from_numpy(rng.integers(-4, 5, (2, K)).astype(np.float32))
    try:
        weight = torch.from_numpy(codes.T.astype(np.int32))
        expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight, 1).view(-1).numpy()
        for order in ("split64", "split32", "pairs32"):
            packed = pack_int4(codes, order)
            if not np.array_equal(packed, expected):
                continue
            ones = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(K // 32, N, 2).contiguous()
            y = int4pack_mm(x.bfloat16(), torch.from_numpy(packed).view(N, K // 2), 32, ones)
            exact = x @ torch.from_numpy(codes.astype(np.float32) - _INT4_ZERO)
            # Small integers: exact except for the output's rounding to bf16.
            return order if torch.equal(y, exact.bfloat16()) else None
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return None


def int4pack_mm(x: torch.Tensor, codes: torch.Tensor, group_size: int, scales_zeros: torch.Tensor) -> torch.Tensor:
    """x bf16 [M, K], codes u8 [N, K / 2] in packed order -> bf16 [M, N], accumulated in f32."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group_size, scales_zeros)


# --- multiplying -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scratch:
    """Buffers shared by all linears."""

    panel: torch.Tensor  # f32 [n]; a block of dequantized or converted weights
    codes: torch.Tensor  # u8 [n]; their unpacked codes
    sorted: torch.Tensor  # f32 [max_rows * max_k]; an input in the order of an act-order weight


def matmul(
    x: torch.Tensor,
    w: Linear,
    num_decode_rows: int,
    scratch: Scratch,
    out: torch.Tensor,
    *,
    by_tiles: bool = False,
) -> None:
    """out f32 [T, N] = x f32 [T, K] times the packed weight + its bias. ``out`` may be a slice of columns.

    ``by_tiles``: all products have one shape, 16 rows, so that a row is computed alike with few others and with many.
    """
    num_rows, split = x.shape[0], min(num_decode_rows, x.shape[0])
    if "order" in w.fields:
        sorted_x = scratch.sorted[: x.numel()].view(x.shape)
        torch.index_select(x, 1, w.fields["order"], out=sorted_x)
        x = sorted_x
    if split:
        _decode(x[:split], w, scratch, out[:split])
    if split < num_rows:
        _prefill(x[split:], w, scratch, out[split:], by_tiles)
    if "bias" in w.fields:
        out.add_(w.fields["bias"])


def _decode(x: torch.Tensor, w: Linear, scratch: Scratch, out: torch.Tensor) -> None:
    if w.layout.kind == "int4pack":
        spec = w.layout.spec
        codes = w.fields["codes"].view(spec.N, spec.K // 2)
        out.copy_(int4pack_mm(x.bfloat16(), codes, spec.group_size, w.fields["scales_zeros"]))
        return
    x = _aligned_rows(x)
    for start, stop, panel in _row_panels(w, scratch, _DECODE_PANEL_ELEMENTS):
        for row in range(x.shape[0]):
            torch.mv(panel, x[row], out=out[row, start:stop])


def _aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """x, whose first row is aligned, or a copy with all rows aligned: MKL sums a vector that is not in another order,
    and a row would have other bits than alone."""
    padding = -x.shape[1] % _ALIGNED_ELEMENTS
    return F.pad(x, (0, padding))[:, : x.shape[1]] if padding and x.shape[0] > 1 else x


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy, such that its first row is aligned as torch allocates: rows from the middle of a buffer may not
    be."""
    return x if x.data_ptr() % (4 * _ALIGNED_ELEMENTS) == 0 else x.clone()


def _prefill(x: torch.Tensor, w: Linear, scratch: Scratch, out: torch.Tensor, by_tiles: bool) -> None:
    """In multiples of 16 rows; the last ones are padded. MKL gives each thread some of the rows, and sums those of a
    share that is no multiple of its tile in another order: bits would depend on the number of threads."""
    whole = len(x) // _ROW_TILE * _ROW_TILE
    last = F.pad(x[whole:], (0, 0, 0, _ROW_TILE - (len(x) - whole))) if whole < len(x) else None
    step = _ROW_TILE if by_tiles else max(whole, 1)
    by_rows = w.layout.kind != "int4pack"
    for start, stop, panel in _row_panels(w, scratch, PANEL_ELEMENTS) if by_rows else _int4_panels(w, scratch):
        panel = panel.T if by_rows else panel
        for first in range(0, whole, step):
            torch.mm(x[first : first + step], panel, out=out[first : first + step, start:stop])
        if last is not None:
            out[whole:, start:stop] = torch.mm(last, panel)[: len(x) - whole]


def _row_panels(w: Linear, scratch: Scratch, elements: int):
    """Yields (start, stop, f32 [n, K]) over the outputs of a dense or planes weight; an f32 weight is one panel."""
    N, K = w.N, w.layout.spec.K
    dense = w.fields.get("weight")
    if dense is not None and dense.dtype == torch.float32:
        yield 0, N, dense
        return
    step = max(1, elements // K)
    for start in range(0, N, step):
        stop = min(N, start + step)
        panel = scratch.panel[: (stop - start) * K].view(stop - start, K)
        if dense is not None:
            panel.copy_(dense[start:stop])
        else:
            _dequantize_planes(w, start, stop, scratch, panel)
        yield start, stop, panel


def _dequantize_planes(w: Linear, start: int, stop: int, scratch: Scratch, panel: torch.Tensor) -> None:
    n, K = panel.shape
    bits = w.layout.spec.bits
    packed = w.fields["codes"][start:stop]
    if bits == 8:
        panel.copy_(packed)
    else:
        codes = scratch.codes[: n * K].view(n, K)
        _unpack_fields(packed[:, : K // 4] if bits == 3 else packed, 2 if bits == 3 else bits, codes)
        if bits == 3:
            for i in range(8):
                top = torch.bitwise_and(packed[:, K // 4 :] >> i, 1)
                codes[:, i * K // 8 : (i + 1) * K // 8].add_(top, alpha=4)
        panel.copy_(codes)
    scales, zeros = w.fields["scales"][start:stop], w.fields["zeros"][start:stop]
    group_size = w.layout.spec.group_size
    if w.layout.spec.code_kind == "fp4":  # whose groups are whole
        torch.index_select(_FP4_VALUES, 0, codes.view(-1).int(), out=panel.view(-1))
        panel.view(n, -1, group_size).mul_(scales[:, :, None].float())
        return
    even = K // group_size  # groups; what is left is a shorter one
    whole = panel[:, : even * group_size].view(n, even, group_size)
    _apply_qparams(whole, scales[:, :even, None], zeros[:, :even, None])
    if K % group_size:
        _apply_qparams(panel[:, even * group_size :], scales[:, even:], zeros[:, even:])


def _apply_qparams(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
    """codes f32 := (codes - zeros) * scales, in place."""
    if scales.dtype == torch.float32:  # code * scale would round, and the difference show it
        codes.sub_(zeros).mul_(scales)
        return
    scales = scales.float()
    torch.addcmul(zeros.float().mul_(scales).neg_(), codes, scales, out=codes)


def _unpack_fields(packed: torch.Tensor, bits: int, codes: torch.Tensor) -> None:
    width = packed.shape[1]
    for i in range(8 // bits):
        torch.bitwise_and(packed >> (bits * i), (1 << bits) - 1, out=codes[:, i * width : (i + 1) * width])


def _int4_panels(w: Linear, scratch: Scratch):
    """Yields (start, stop, f32 [K, n]) over the outputs of an int4pack weight: full blocks, then the partial one."""
    spec, order = w.layout.spec, probe_int4pack() or ""
    block, K = int(order[-2:]), spec.K
    step = max(1, PANEL_ELEMENTS // (K * block)) * block
    full = spec.N // block * block
    for start in range(0, full, step):
        stop = min(full, start + step)
        yield start, stop, _dequantize_int4(w, start, stop, block, order.startswith("split"), scratch)
    if full < spec.N:
        yield full, spec.N, _dequantize_int4(w, full, spec.N, spec.N - full, False, scratch)


def _dequantize_int4(w: Linear, start: int, stop: int, block: int, split: bool, scratch: Scratch) -> torch.Tensor:
    spec = w.layout.spec
    K, n, half = spec.K, stop - start, block // 2
    packed = w.fields["codes"][start * K // 2 : stop * K // 2].view(n // block, K, half)
    nibbles = scratch.codes[: packed.numel()].view(packed.shape)
    panel = scratch.panel[: K * n].view(K, n)
    blocks = panel.view(K, n // block, 2, half) if split else panel.view(K, n // block, half, 2).transpose(2, 3)
    torch.bitwise_and(packed, 15, out=nibbles)
    blocks[:, :, 0].copy_(nibbles.transpose(0, 1))
    torch.bitwise_right_shift(packed, 4, out=nibbles)
    blocks[:, :, 1].copy_(nibbles.transpose(0, 1))
    scales, zeros = (w.fields[name][:, None, start:stop] for name in ("scales", "zeros"))  # [G, 1, n]
    _apply_qparams(panel.view(spec.num_groups, spec.group_size, n), scales, zeros)
    return panel
