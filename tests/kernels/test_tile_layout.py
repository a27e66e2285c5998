"""The tile layout, read back as a kernel reads it: from a lane's words, through the tensor core's lane map."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from reference.linear_twin import random_matrix

from exl.errors import KernelError
from exl.formats.matrix import QuantizedMatrix
from exl.kernels.tile_pack import matrix_layout, pack_codes, pack_matrix
from exl.layout.tiles import TileLayout, gated_rows, natural_rows


def pair_of(words: list[int], bits: int, j: int, p: int) -> tuple[int, int]:
    """Codes of pair p of mma j, from a lane's words of 64 inputs, by the shifts and masks of dequant.cuh."""

    def halves(word: int, shift: int, mask: int) -> tuple[int, int]:
        return (word >> shift) & mask, (word >> (shift + 16)) & mask

    if bits == 4:
        return halves(words[j], 4 * p, 15)
    if bits == 8:
        word = words[2 * j + p // 2] >> 16 * (p % 2)
        return word & 255, (word >> 8) & 255
    if bits == 2:
        return halves(words[j // 2], 8 * (j % 2) + 2 * p, 3)
    q = 4 * j + p
    if q < 15:
        return halves(words[q // 5], 3 * (q % 5), 7)
    pairs = [halves(words[b], 15, 1) for b in range(3)]
    return sum(lo << b for b, (lo, _) in enumerate(pairs)), sum(hi << b for b, (_, hi) in enumerate(pairs))


def read_back(codes: np.ndarray, layout: TileLayout) -> np.ndarray:
    """Codes u8 [padded K, 16 * tiles] as the mma's operands hold them."""
    out = np.full((layout.num_stages * layout.stage_inputs, layout.num_tiles * 16), 255, np.uint8)
    raw = codes.reshape(-1)
    for tile in range(layout.num_tiles):
        for stage in range(layout.num_stages):
            base = (tile * layout.num_stages + stage) * layout.planes * 128
            for lane in range(32):
                g, t = divmod(lane, 4)
                # a lane's 16 bytes of each plane
                words = [
                    int(raw[base + plane * 128 + lane * 4 + i]) for plane in range(layout.planes) for i in range(4)
                ]
                for block in range(layout.stage_inputs // 64):
                    for j in range(4):
                        for p in range(4):
                            pair = pair_of(words[block * layout.bits :], layout.bits, j, p)
                            for second in range(2):
                                # register p of the A operand: row g + 8 (p % 2), columns 2t + second, + 8 for p >= 2;
                                # column c of 16 is input 8 (c % 8 // 2) + 4 (j % 2) + 2 (c // 8) + c % 2 of 32
                                column = 2 * t + second + 8 * (p // 2)
                                k = 8 * (column % 8 // 2) + 4 * (j % 2) + 2 * (column // 8) + column % 2
                                k += stage * layout.stage_inputs + block * 64 + 32 * (j // 2)
                                out[k, tile * 16 + g + 8 * (p % 2)] = pair[second]
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("K", "N", "group_size"), [(512, 32, 128), (288, 20, 32), (96, 5, -1), (352, 16, 64)])
def test_codes_come_back_through_the_lane_map(bits: int, K: int, N: int, group_size: int) -> None:
    matrix = random_matrix(np.random.default_rng(bits + K), bits, K, N, group_size)
    packed = pack_matrix([matrix])
    assert packed.codes.nbytes == packed.layout.codes_bytes
    codes = read_back(packed.codes, packed.layout)
    np.testing.assert_array_equal(codes[:K, :N], matrix.codes(0, N))
    assert not codes[K:].any()
    assert not codes[:, N:].any()


def test_the_documented_example() -> None:
    codes = np.zeros((128, 16), np.uint8)
    codes[37, 3] = 15
    rng = np.random.default_rng(0)
    matrix = random_matrix(rng, 4, 128, 16, 128)
    object.__setattr__(matrix, "read_codes", lambda start, stop: codes[:, start:stop])
    packed = pack_matrix([matrix])
    assert packed.codes[0, 0, 0, 12, 3] == 15 << 16
    assert np.count_nonzero(packed.codes) == 1


SCALE_TYPES = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}


def scale_and_zero(block: np.ndarray, layout: TileLayout, unit: int, row: int) -> tuple[float, int | None]:
    """Scale and zero point of one row and unit of a block, at the byte offsets of the layout's description."""
    g, high = row % 8, row // 8
    units, width = len(block) // layout_bytes_a_unit(layout), SCALE_TYPES[layout.scale_dtype]().nbytes
    start = (g * units + unit) * 2 * width + high * width
    value = block[start : start + width].view(SCALE_TYPES[layout.scale_dtype])[0]
    scale = (
        float((np.uint32(value) << np.uint32(16)).view(np.float32)) if layout.scale_dtype == "bf16" else float(value)
    )
    if layout.symmetric:
        return scale, None
    zeros, at = block[8 * units * 2 * width :], g * units + unit
    if layout.bits == 8:
        return scale, int(zeros[2 * at + high])
    assert layout.bits != 2 or zeros[at] >> 4 == zeros[at] & 15
    return scale, int(zeros[at]) >> layout.bits * high & (1 << layout.bits) - 1


def layout_bytes_a_unit(layout: TileLayout) -> int:
    """Per unit of 16 rows: per row two or four bytes of scale, and half a byte of zero point (8 bits: one byte)."""
    return 16 * SCALE_TYPES[layout.scale_dtype]().nbytes + (0 if layout.symmetric else 16 if layout.bits == 8 else 8)


@pytest.mark.parametrize(("scale_dtype", "symmetric"), [("f16", False), ("bf16", False), ("f32", False), ("f16", True)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("K", "group_size"), [(384, 32), (352, 64), (704, 128), (704, 256), (704, 384), (96, -1)])
def test_scales_and_zeros_of_a_stage_lie_together(
    K: int, group_size: int, bits: int, scale_dtype: str, symmetric: bool
) -> None:
    matrix = random_matrix(np.random.default_rng(1), bits, K, 24, group_size, symmetric, scale_dtype=scale_dtype)
    packed = pack_matrix([matrix])
    layout, qparams = packed.layout, packed.qparams
    assert qparams.nbytes == layout.qparams_bytes
    assert (layout.symmetric, layout.scale_dtype) == (symmetric, scale_dtype)
    stage = {2: 256, 3: 256}.get(bits, 128)
    for k in range(0, K, 32):
        group = k // matrix.group_size
        short = matrix.group_size in (32, 64, 128)
        block, unit = (k // stage, k % stage // matrix.group_size) if short else (group, 0)
        for n in range(24):
            scale, zero = scale_and_zero(qparams[n // 16, block], layout, unit, n % 16)
            assert scale == matrix.scales[group, n]
            assert zero == (None if symmetric else matrix.zeros[group, n])
    assert not any(scale_and_zero(block, layout, 0, 12)[0] for block in qparams[1])  # rows past N
    # Nothing beyond the padding of K: a group's scales and zeros are stored once.
    stored = -(-K // stage) * stage // matrix.group_size if short else -(-(-(-K // stage) * stage) // matrix.group_size)
    assert qparams.nbytes == 2 * stored * layout_bytes_a_unit(layout)


@pytest.mark.parametrize(("scale_dtype", "value"), [("f16", 0.1), ("bf16", 1 + 2.0**-8), ("f16", 1e6)])
def test_no_scale_is_rounded(scale_dtype: str, value: float) -> None:
    matrix = random_matrix(np.random.default_rng(2), 4, 128, 16, 128, scale_dtype="f32")
    matrix.scales[0, 3] = value
    with pytest.raises(KernelError, match=rf"scale .*: {scale_dtype} does not hold it exactly"):
        pack_matrix([dataclasses.replace(matrix, scale_dtype=scale_dtype)])


@pytest.mark.parametrize("K", [32, 96, 256])
@pytest.mark.parametrize("gated", [False, True])
def test_words_of_the_file_become_the_words_of_the_tiles(K: int, gated: bool) -> None:
    """Packing code by code, by the lanes' bit positions (``lane_words``), and word by word gives the same tiles."""
    rng = np.random.default_rng(K)
    plain = [random_matrix(rng, 4, K, 40, 32) for _ in range(2)]

    def with_words(matrix: QuantizedMatrix) -> QuantizedMatrix:
        codes = matrix.codes(0, matrix.N).astype(np.uint32).reshape(K // 8, 8, matrix.N)
        words = np.bitwise_or.reduce(codes << 4 * np.arange(8, dtype=np.uint32)[None, :, None], axis=1)
        return dataclasses.replace(matrix, read_words=lambda: words)

    rows = gated_rows(40, rng.permutation(40)) if gated else natural_rows(80)
    layout = matrix_layout(plain, rows)
    codes = np.concatenate([matrix.codes(0, 40) for matrix in plain], axis=1)
    expected = pack_codes(np.where(rows >= 0, codes[:, rows], 0).astype(np.uint8), layout)
    for parts in (plain, [with_words(matrix) for matrix in plain]):
        np.testing.assert_array_equal(pack_matrix(parts, rows).codes, expected)


def test_gate_and_up_share_a_tile_in_the_order_of_down() -> None:
    rng = np.random.default_rng(3)
    F = 20
    gate, up = (random_matrix(rng, 4, 128, F, 128, bias=True) for _ in range(2))
    order = rng.permutation(F)
    rows = gated_rows(F, order)
    packed = pack_matrix([gate, up], rows)
    codes = read_back(packed.codes, packed.layout)
    for i, channel in enumerate(order):
        tile, g = divmod(i, 8)
        np.testing.assert_array_equal(codes[:128, tile * 16 + g], gate.codes(channel, channel + 1)[:, 0])
        np.testing.assert_array_equal(codes[:128, tile * 16 + 8 + g], up.codes(channel, channel + 1)[:, 0])
        assert packed.bias[tile * 16 + g] == gate.bias[channel]
        assert packed.bias[tile * 16 + 8 + g] == up.bias[channel]
    assert (rows.reshape(-1, 16)[2, 4:8] == -1).all()
    assert (rows.reshape(-1, 16)[2, 12:] == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 128, 16, 128, True), "5 bits"),
        ((4, 100, 16, 100, True), "multiple of 32"),
        ((4, 256, 16, 96, True), "group size 96"),
        ((4, 384, 16, 96, True), "group size 96"),
        ((4, 128, 0, 128, True), "at least one row"),
        ((4, 128, 16, 0, True), "group size 0"),
        ((4, 128, 16, 256, True), "group size 256"),
        ((4, 128, 16, 128, True, "f64"), "scales of f64"),
    ],
)
def test_shapes_that_no_kernel_takes(arguments: tuple, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        TileLayout(*arguments)


def test_packing_refuses_what_it_cannot_hold() -> None:
    rng = np.random.default_rng(4)
    matrix = random_matrix(rng, 4, 128, 16, 128)
    matrix.zeros[0, 3] = 16
    with pytest.raises(KernelError, match="zero point 16: expected less than 16"):
        pack_matrix([matrix])
    with pytest.raises(KernelError, match="must agree"):
        pack_matrix([random_matrix(rng, 4, 128, 16, 128), random_matrix(rng, 4, 128, 16, 64)])
    with pytest.raises(KernelError, match="must agree"):
        pack_matrix([random_matrix(rng, 4, 128, 16, 128, scale_dtype=dtype) for dtype in ("f16", "f32")])
    with pytest.raises(KernelError, match="row order"):
        pack_matrix([random_matrix(rng, 4, 128, 16, 128)], natural_rows(17))
