"""The pages of the KV cache on a GPU: where every byte of one (layer, page, kv head) lies, from shapes alone.

A page is ``[K codes | K scales | V codes | V scales]`` of 64 tokens. Codes lie in the order in which a warp's lanes
feed them to the tensor cores' m16n8k16 as operand A; lane ``l = 4 g + t`` (g 0..7, t 0..3) holds rows g and g + 8.

**K** (S = K Q^T): [4 token tiles of 16][channel tiles of 64]. Rows are tokens. Of every 32 channels lane t owns
``8t .. 8t+7``, a *unit*; the first of two mma takes its first four channels, so one 16-byte load of q feeds two mma. A
lane has four units in a tile: run h (of 32 channels) by row r (g, g + 8)::

    16 bits  plane 2h + r                bytes 2i                       of channel i of the unit
     8 bits  plane h, bytes 8r ..        byte i
     4 bits  one plane, bytes 8h + 4r    a word: channel i at bits 4 (i // 2) + 16 (i % 2)

where a plane is [32 lanes][16 bytes]. A last tile of fewer channels has its units side by side instead: [unit][g][r].

**V** (O = V^T P): [channel tiles of 16][64 tokens]. Rows are channels. mma j takes tokens ``16 j .. 16 j + 15``, of
which lane t has ``2t, 2t+1, 2t+8, 2t+9``: places 0 to 3::

    16 bits  plane j, word r + 2 (place // 2), half place % 2
     8 bits  word 2j + r (plane word // 4), byte place
     4 bits  word j, byte (0, 2, 1, 3)[place]; row g in its low half, row g + 8 in its high half

A head size of 8 mod 16 ends with a tile of eight channels: rows g alone::

    16 bits  word 2j + place // 2 (plane word // 4), half place % 2
     8 bits  word j, byte place
     4 bits  word j of lane 4 (g % 4) + t, byte (0, 2, 1, 3)[place]; rows 0..3 in its low half, 4..7 in its high half

**Scales**, f16, one per token and 32 channels: K [token tile][g][group][g, g + 8], V [group][t][j][place].

Every byte belongs to one token, so a token is appended by plain stores. 8-bit codes are stored plus 128 and 4-bit codes
plus 8; what they mean is in ``docs/memory.md``.

Example: 4 bits, head size 128, K of token 21, channel 77. Token tile 1, row 5: g = 5, r = 0. Channel tile 1, h = 0,
t = 1, i = 5: lane 21, byte 1024 + 512 + 21 * 16 + (4 * 2 + 16) // 8 = 1875, low half.

Example: 4 bits, head size 40, V of token 27, channel 37. Tile 2 has eight channels, row 5; j = 1, t = 1, place 3: lane
4 * (5 % 4) + 1, byte 2 * 512 + 5 * 16 + 1 * 4 + 3 = 1111 of V's codes, high half.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exl.batch import PAGE_SIZE
from exl.errors import KernelError
from exl.layout.kv import KV_BITS, KV_GROUP, PageOffsets, page_offsets

KINDS = ("f16", "q8", "k8v4", "q4")
HEAD_DIM_STEP, MAX_HEAD_DIM = 8, 256
_F16_MAX = np.float32(65504)
_Places = tuple[NDArray[np.int64], NDArray[np.int64]]  # byte and lowest bit in it, each [64 tokens, D]


def is_head_dim(head_dim: int) -> bool:
    """Whether kernels take this head size."""
    return head_dim % HEAD_DIM_STEP == 0 and 0 < head_dim <= MAX_HEAD_DIM


@dataclass(frozen=True)
class PageLayout:
    """Sizes and offsets of one page of one kv head. Raises ``KernelError`` for what no kernel reads."""

    kind: str
    head_dim: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise KernelError(f"KV cache type {self.kind!r}: kernels have {', '.join(KINDS)}")
        if not is_head_dim(self.head_dim):
            raise KernelError(f"head size {self.head_dim}: kernels take multiples of {HEAD_DIM_STEP} to {MAX_HEAD_DIM}")

    @property
    def k_bits(self) -> int:
        return KV_BITS[self.kind][0]

    @property
    def v_bits(self) -> int:
        return KV_BITS[self.kind][1]

    @property
    def quantized(self) -> bool:
        return self.k_bits < 16

    @property
    def hadamard_size(self) -> int:
        """Channels of a Hadamard block: the largest power of two that divides the head size; f16: 1."""
        return self.head_dim & -self.head_dim if self.quantized else 1

    @property
    def num_groups(self) -> int:
        """Scales per token."""
        return -(-self.head_dim // KV_GROUP) if self.quantized else 0

    @property
    def offsets(self) -> PageOffsets:
        """``k_scales``, ``v_codes``, ``v_scales``, and ``num_bytes`` of the page."""
        return page_offsets(self.kind, self.head_dim)

    @property
    def num_bytes(self) -> int:
        return self.offsets.num_bytes


# ---- places ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def k_code_places(layout: PageLayout) -> _Places:
    """Where K's codes lie, from the page's first byte on."""
    bits, D = layout.k_bits, layout.head_dim
    token, channel = np.meshgrid(np.arange(PAGE_SIZE), np.arange(D), indexing="ij")
    g, r = token % 8, token // 8 % 2
    tile, h, t, i = channel // 64, channel // 32 % 2, channel // 8 % 4, channel % 8
    unit_bytes = bits  # 8 channels
    in_lane = (2 * h + r) * unit_bytes
    whole = in_lane // 16 * 512 + (4 * g + t) * 16 + in_lane % 16
    short = ((channel % 64 // 8 * 8 + g) * 2 + r) * unit_bytes
    at = token // 16 * (16 * D * bits // 8) + tile * (16 * 64 * bits // 8) + np.where(tile < D // 64, whole, short)
    bit = 4 * (i // 2) + 16 * (i % 2) if bits == 4 else i * bits
    return at + bit // 8, bit % 8


@functools.lru_cache(maxsize=64)
def v_code_places(layout: PageLayout) -> _Places:
    """Where V's codes lie, from the page's first byte on."""
    bits, D = layout.v_bits, layout.head_dim
    token, channel = np.meshgrid(np.arange(PAGE_SIZE), np.arange(D), indexing="ij")
    lane, r = 4 * (channel % 8) + token // 2 % 4, channel // 8 % 2
    j, place = token // 16, token % 2 + 2 * (token // 8 % 2)
    if bits == 16:
        word, bit = 4 * j + r + 2 * (place // 2), place % 2 * 16
    elif bits == 8:
        word, bit = 2 * j + r, place * 8
    else:
        word, bit = j, np.array([0, 2, 1, 3])[place] * 8 + 4 * r
    if D % 16:  # the last tile has eight channels
        last = channel >= D - 8
        if bits == 16:
            word = np.where(last, 2 * j + place // 2, word)
        elif bits == 8:
            word = np.where(last, j, word)
        else:
            lane = np.where(last, lane % 16, lane)
            bit = np.where(last, np.array([0, 2, 1, 3])[place] * 8 + channel // 4 % 2 * 4, bit)
    at = layout.offsets.v_codes + channel // 16 * (16 * PAGE_SIZE * bits // 8)
    return at + word // 4 * 512 + lane * 16 + word % 4 * 4 + bit // 8, bit % 8


def k_scale_places(layout: PageLayout) -> NDArray[np.int64]:
    """Bytes of K's scales, [64 tokens, groups]."""
    token, group = np.meshgrid(np.arange(PAGE_SIZE), np.arange(layout.num_groups), indexing="ij")
    return layout.offsets.k_scales + 2 * (
        ((token // 16 * 8 + token % 8) * layout.num_groups + group) * 2 + token // 8 % 2
    )


def v_scale_places(layout: PageLayout) -> NDArray[np.int64]:
    """Bytes of V's scales, [64 tokens, groups]."""
    token, group = np.meshgrid(np.arange(PAGE_SIZE), np.arange(layout.num_groups), indexing="ij")
    place = token % 2 + 2 * (token // 8 % 2)
    return layout.offsets.v_scales + 2 * (((group * 4 + token // 2 % 4) * 4 + token // 16) * 4 + place)


# ---- values ---------------------------------------------------------------------------------------------------------


def hadamard(x: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Orthonormal Walsh-Hadamard transform of every run of ``size`` channels; additions in the kernels' order."""
    runs = np.array(x, np.float32).reshape(-1, size)
    half = 1
    while half < size:
        pairs = runs.reshape(-1, 2, half)
        runs = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        half *= 2
    return (runs.reshape(x.shape) * np.float32(size**-0.5)).astype(np.float32)


def quantize(x: NDArray[np.float32], bits: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """x f32 [..., D] -> signed codes [..., D] and scales f16 [..., ceil(D / 32)]: ``docs/memory.md`` defines them."""
    D = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-D // KV_GROUP) * KV_GROUP), np.float32)
    padded[..., :D] = x
    groups = padded.reshape(*x.shape[:-1], -1, KV_GROUP)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    scales = np.abs(extreme) / np.float32(127) if bits == 8 else extreme / np.float32(-8)
    scales = np.clip(scales, -_F16_MAX, _F16_MAX).astype(np.float16)
    wide = scales.astype(np.float32)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    ratio = np.divide(groups, wide, out=np.zeros_like(groups), where=wide != 0)
    codes = np.clip(np.rint(ratio), low, high).astype(np.int8)
    return codes.reshape(padded.shape)[..., :D], scales[..., 0]


def pack_pages(layout: PageLayout, k: NDArray, v: NDArray) -> NDArray[np.uint8]:
    """k and v f16 or f32 [tokens, kv heads, D], not rotated yet -> u8 [ceil(tokens / 64), kv heads, bytes of a page].

    Values beyond f16's range saturate. Bytes of tokens beyond the last are zero.
    """
    num_tokens, num_heads, D = k.shape
    if layout.head_dim != D or v.shape != k.shape:
        raise KernelError(f"k {k.shape} and v {v.shape}: expected two of [tokens, kv heads, {layout.head_dim}]")
    num_pages = -(-num_tokens // PAGE_SIZE)
    pages = np.zeros((num_pages, num_heads, layout.num_bytes), np.uint8)
    _store(layout, pages, k, layout.k_bits, k_code_places(layout), k_scale_places(layout))
    _store(layout, pages, v, layout.v_bits, v_code_places(layout), v_scale_places(layout))
    return pages


def replace_keys(layout: PageLayout, pages: NDArray[np.uint8], k: NDArray) -> NDArray[np.uint8]:
    """Whole pages, as ``pack_pages`` makes them, with other keys: f16 or f32 [64 * pages, kv heads, D]."""
    pages = pages.copy()
    pages[:, :, : layout.offsets.v_codes] = 0
    _store(layout, pages, k, layout.k_bits, k_code_places(layout), k_scale_places(layout))
    return pages


def _store(
    layout: PageLayout, pages: NDArray[np.uint8], values: NDArray, bits: int, places: _Places, scale_places: NDArray
) -> None:
    """Keys, or values, into pages whose bytes for them are zero."""
    byte, bit = places
    if bits == 16:
        halves = _by_page(np.clip(values, -_F16_MAX, _F16_MAX).astype(np.float16), len(pages)).view(np.uint8)
        pages[:, :, byte], pages[:, :, byte + 1] = halves[..., ::2], halves[..., 1::2]
        return
    codes, scales = quantize(hadamard(values.astype(np.float32), layout.hadamard_size), bits)
    stored = _by_page((codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8), len(pages))
    for shift in np.unique(bit):
        pages[:, :, byte[bit == shift]] |= stored[..., bit == shift] << np.uint8(shift)
    halves = _by_page(scales, len(pages)).view(np.uint8)
    pages[:, :, scale_places], pages[:, :, scale_places + 1] = halves[..., ::2], halves[..., 1::2]


def _by_page(values: NDArray, num_pages: int) -> NDArray:
    """[tokens, kv heads, n] -> [pages, kv heads, 64, n], zeros at the end."""
    num_tokens, num_heads, n = values.shape
    padded = np.zeros((num_pages * PAGE_SIZE, num_heads, n), values.dtype)
    padded[:num_tokens] = values
    return np.ascontiguousarray(padded.reshape(num_pages, PAGE_SIZE, num_heads, n).swapaxes(1, 2))


def unpack_pages(layout: PageLayout, pages: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """u8 [pages, kv heads, bytes] -> k and v f32 [64 * pages, kv heads, D], exact, rotated as they are stored."""
    if pages.ndim != 3 or pages.shape[-1] != layout.num_bytes:
        raise KernelError(f"pages {pages.shape}: expected [pages, kv heads, {layout.num_bytes}]")

    def halves(at: NDArray) -> NDArray:
        return np.stack([pages[:, :, at], pages[:, :, at + 1]], -1).view(np.float16)[..., 0].astype(np.float32)

    def values(bits: int, code_places: _Places, scale_places: NDArray) -> NDArray[np.float32]:
        byte, bit = code_places
        if bits == 16:
            found = halves(byte)
        else:
            codes = ((pages[:, :, byte] >> bit) & ((1 << bits) - 1)).astype(np.float32) - (1 << (bits - 1))
            found = codes * np.repeat(halves(scale_places), KV_GROUP, axis=-1)[..., : layout.head_dim]
        return found.swapaxes(1, 2).reshape(-1, pages.shape[1], layout.head_dim)

    return (
        values(layout.k_bits, k_code_places(layout), k_scale_places(layout)),
        values(layout.v_bits, v_code_places(layout), v_scale_places(layout)),
    )
