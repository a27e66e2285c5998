"""The tile layout, read back the way a kernel reads it: from a lane's words through the tensor core's own map."""

from __future__ import annotations

import numpy as np
import pytest
from reference.linear_twin import random_matrix

from exl.errors import KernelError
from exl.kernels.tile_layout import TileLayout, gated_rows, natural_rows
from exl.kernels.tile_pack import pack_matrix


def pair_of(words: list[int], bits: int, j: int, p: int) -> tuple[int, int]:
    """Codes of pair p of mma j from a lane's words for 64 inputs: the shifts and masks of dequant.cuh."""

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
    """Codes u8 [padded K, 16 * tiles] as the mma meets them."""
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
@pytest.mark.parametrize(("K", "N", "group_size"), [(512, 32, 128), (288, 20, 32), (96, 5, -1), (320, 16, 64)])
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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_and_zeros_of_rows_g_and_g_plus_8_lie_together(bits: int) -> None:
    matrix = random_matrix(np.random.default_rng(1), bits, 384, 24, 64)
    packed = pack_matrix([matrix])
    width = {2: 2, 3: 3, 4: 4}.get(bits)
    for n in range(24):
        tile, row = divmod(n, 16)
        g, high = row % 8, row // 8
        for group in range(6):
            assert packed.scales[tile, group, g, high] == matrix.scales[group, n]
            if bits == 8:
                assert packed.zeros[tile, group, g, high] == matrix.zeros[group, n]
            else:
                byte = int(packed.zeros[tile, group, g])
                assert byte >> width * high & (1 << bits) - 1 == matrix.zeros[group, n]
                assert bits != 2 or byte >> 4 == byte & 15
    assert not packed.scales[1, :, :, 1].any()  # rows past N


def test_symmetric_matrices_store_no_zeros() -> None:
    matrix = random_matrix(np.random.default_rng(2), 4, 128, 16, 64, symmetric=True)
    packed = pack_matrix([matrix])
    assert packed.layout.symmetric
    assert packed.zeros is None
    assert packed.layout.zeros_shape is None


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
        ((4, 256, 16, 96, True), "not a multiple of the group size"),
        ((4, 384, 16, 96, True), "group size 96"),
        ((4, 128, 0, 128, True), "at least one row"),
        ((4, 128, 16, 0, True), "group size 0"),
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
    with pytest.raises(KernelError, match="row order"):
        pack_matrix([random_matrix(rng, 4, 128, 16, 128)], natural_rows(17))
