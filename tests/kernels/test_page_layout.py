"""A page's bytes: each belongs to one token, codes equal those of the CPU's cache, and loads give mma operands."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl.errors import KernelError
from exl.layout.kv import DeviceKVLayout
from exl.layout.pages import (
    KINDS,
    PageLayout,
    hadamard,
    k_code_places,
    k_scale_places,
    pack_pages,
    unpack_pages,
    v_code_places,
    v_scale_places,
)
from exl.ops import torch_kv

HEAD_DIMS = (8, 16, 24, 40, 48, 64, 72, 80, 96, 112, 120, 128, 248, 256)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_byte_belongs_to_one_token_and_every_bit_to_one_channel(kind: str, D: int) -> None:
    layout = PageLayout(kind, D)
    owner = np.full(layout.num_bytes, -1)
    bits = np.zeros(layout.num_bytes, int)
    tokens = np.arange(64)[:, None]

    def claim(byte: np.ndarray, width: int) -> None:
        assert ((owner[byte] == -1) | (owner[byte] == tokens)).all()
        owner[byte] = tokens
        np.add.at(bits, byte, width)

    for places, width in ((k_code_places(layout), layout.k_bits), (v_code_places(layout), layout.v_bits)):
        for byte in (places[0], places[0] + 1) if width == 16 else (places[0],):
            claim(byte, min(width, 8))
    if layout.quantized:
        for at in (k_scale_places(layout), v_scale_places(layout)):
            claim(at, 8)
            claim(at + 1, 8)
    assert (bits == 8).all()
    assert layout.num_bytes == DeviceKVLayout(kind, 1, 1, D).head_page_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [8, 40, 64, 80, 96, 120, 128, 256])
def test_values_are_the_cpu_caches_bit_for_bit(kind: str, D: int) -> None:
    rng = np.random.default_rng(D)
    k, v = (rng.standard_normal((100, 2, D)).astype(np.float32) * 3 for _ in range(2))
    k[3], v[5], k[7, :, 1:] = 0, 0, 0
    k[9, 0, 0] = 3e6  # its scale saturates
    layout = PageLayout(kind, D)
    found = unpack_pages(layout, pack_pages(layout, k, v))
    for values, bits, unpacked in zip((k, v), (layout.k_bits, layout.v_bits), found, strict=True):
        rows = torch.from_numpy(values.copy())
        if bits == 16:
            expected = torch_kv.as_stored(rows, torch.float16).float()
        else:
            torch_kv.hadamard(rows, layout.hadamard_size)
            np.testing.assert_array_equal(hadamard(values, layout.hadamard_size), rows.numpy())
            expected = torch_kv.dequantize_rows(*torch_kv.quantize_rows(rows, bits), D)
        np.testing.assert_array_equal(unpacked[:100], expected.numpy())
        assert not np.isnan(unpacked).any()


def test_the_examples_of_the_documentation() -> None:
    byte, bit = k_code_places(PageLayout("q4", 128))
    assert (byte[21, 77], bit[21, 77]) == (1875, 0)
    layout = PageLayout("q4", 40)
    byte, bit = v_code_places(layout)
    assert (byte[27, 37] - layout.offsets.v_codes, bit[27, 37]) == (1111, 4)


def fragment_rows_and_columns() -> tuple[np.ndarray, np.ndarray]:
    """Per lane, row and column of each of the two halves in operand A's four registers: the PTX ISA's table."""
    lane, register, half = np.meshgrid(np.arange(32), np.arange(4), np.arange(2), indexing="ij")
    return lane // 4 + 8 * (register % 2), lane % 4 * 2 + half + 8 * (register // 2)


def test_an_f16_plane_of_v_is_a_fragment() -> None:
    layout = PageLayout("f16", 32)
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((64, 1, 32)).astype(np.float16) for _ in range(2))
    page = pack_pages(layout, k, v)[0, 0]
    row, column = fragment_rows_and_columns()
    for tile in range(2):
        for j in range(4):
            start = layout.offsets.v_codes + tile * 2048 + j * 512
            plane = page[start : start + 512].view(np.float16).reshape(32, 4, 2)
            np.testing.assert_array_equal(plane, v[16 * j + column, 0, 16 * tile + row])


def test_eight_channels_of_v_at_the_end_are_half_a_fragment() -> None:
    """f16: two words of each of four mma, rows 0 to 7 of operand A."""
    layout = PageLayout("f16", 24)
    v = np.random.default_rng(0).standard_normal((64, 1, 24)).astype(np.float16)
    page = pack_pages(layout, v, v)[0, 0]
    planes = (
        page[layout.offsets.v_codes + 2048 :].view(np.float16).reshape(2, 32, 2, 2, 2)
    )  # plane, lane, j % 2, word, half
    row, column = (x[:, ::2] for x in fragment_rows_and_columns())  # registers of rows g
    for j in range(4):
        np.testing.assert_array_equal(planes[j // 2, :, j % 2], v[16 * j + column, 0, 16 + row])


@pytest.mark.parametrize("kind", ["f16", "q8", "q4"])
def test_one_load_of_k_feeds_two_mma(kind: str) -> None:
    """Lane 4g + t's 16-byte load has rows g and g + 8 (f16: one of them) of channels 8t..8t+7."""
    layout = PageLayout(kind, 128)
    byte, _ = k_code_places(layout)
    tokens, channels = np.meshgrid(np.arange(64), np.arange(128), indexing="ij")
    lane = byte % 512 // 16
    np.testing.assert_array_equal(lane // 4, tokens % 8)
    np.testing.assert_array_equal(lane % 4, channels // 8 % 4)


@pytest.mark.parametrize(("kind", "D", "message"), [("f32", 64, "'f32'"), ("q4", 68, "68"), ("q8", 264, "264")])
def test_refuses_what_no_kernel_reads(kind: str, D: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        PageLayout(kind, D)
