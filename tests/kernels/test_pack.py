"""Packing on the device equals the CPU's packer, bit for bit, from tensors that an independent packer wrote."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from reference.linear_twin import random_matrix
from reference.plain_packer import pack_layer

from exl.errors import KernelError
from exl.formats.matrix import QuantizedMatrix
from exl.kernels.launch import Backend
from exl.kernels.linear import TiledWeight
from exl.kernels.pack import AwqTensors, GptqTensors, pack
from exl.kernels.tile_layout import gated_rows, natural_rows
from exl.kernels.tile_pack import PackedMatrix, matrix_layout, pack_codes, pack_matrix

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word, lowest bits first: AutoAWQ's packing_utils


def empty_weight(packed: PackedMatrix, device: torch.device) -> TiledWeight:
    """Memory for a packed matrix, full of what must not stay."""
    weight = TiledWeight.from_packed(packed, device)
    zeros = None if weight.zeros is None else torch.full_like(weight.zeros, 99)
    codes, scales = torch.full_like(weight.codes, 0x5A5A5A5A), torch.full_like(weight.scales, float("nan"))
    return TiledWeight(weight.layout, codes, scales, zeros, None)


def assert_same(found: TiledWeight, expected: PackedMatrix) -> None:
    np.testing.assert_array_equal(found.codes.cpu().numpy().view(np.uint32), expected.codes)
    np.testing.assert_array_equal(found.scales.cpu().numpy(), expected.scales)
    assert (found.zeros is None) == (expected.zeros is None)
    if found.zeros is not None:
        np.testing.assert_array_equal(found.zeros.cpu().numpy(), expected.zeros)


def gptq(matrix: QuantizedMatrix, version: str, order: np.ndarray | None, device: torch.device) -> GptqTensors:
    codes = np.empty((matrix.K, matrix.N), np.uint8)
    codes[np.arange(matrix.K) if order is None else order] = matrix.codes(0, matrix.N)
    tensors = pack_layer(codes, matrix.zeros, matrix.scales, matrix.bits, version)
    parts = (torch.from_numpy(tensors[name]).to(device) for name in ("qweight", "qzeros", "scales"))
    return GptqTensors(*parts, zero_offset=int(version == "gptq"))


def awq(matrix: QuantizedMatrix, device: torch.device) -> AwqTensors:
    def words(values: np.ndarray) -> torch.Tensor:
        packed = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for place, column in enumerate(AWQ_COLUMNS):
            packed |= values[:, column::8].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(packed.view(np.int32)).to(device)

    scales = torch.from_numpy(matrix.scales).to(device)
    return AwqTensors(words(matrix.codes(0, matrix.N)), words(matrix.zeros), scales)


def row_order(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(rows.astype(np.int32)).to(device)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("K", "N", "group_size", "symmetric"), [(384, 32, 128, False), (96, 32, -1, True), (320, 96, 64, False)]
)
def test_gptq(backend: Backend, bits: int, version: str, K: int, N: int, group_size: int, symmetric: bool) -> None:
    rng = np.random.default_rng(bits + K)
    matrix = random_matrix(rng, bits, K, N, group_size, symmetric)
    order = rng.permutation(K) if version == "gptq" else None
    packed = pack_matrix([matrix])
    weight = empty_weight(packed, backend.device)
    device_order = None if order is None else row_order(order, backend.device)
    pack(
        backend,
        [gptq(matrix, version, order, backend.device)],
        row_order(natural_rows(N), backend.device),
        weight,
        device_order,
    )
    assert_same(weight, packed)


def test_q_k_and_v_of_unlike_widths(backend: Backend) -> None:
    rng = np.random.default_rng(1)
    parts = [random_matrix(rng, 4, 256, N, 32) for N in (40, 8, 16)]  # borders inside of tiles
    packed = pack_matrix(parts)
    weight = empty_weight(packed, backend.device)
    pack(
        backend,
        [gptq(part, "gptq", None, backend.device) for part in parts],
        row_order(natural_rows(64), backend.device),
        weight,
    )
    assert_same(weight, packed)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gate_and_up_in_the_order_of_down(backend: Backend, kind: str) -> None:
    rng = np.random.default_rng(2)
    parts = [random_matrix(rng, 4, 160, 40, 32) for _ in range(2)]
    rows = gated_rows(40, rng.permutation(40))
    packed = pack_matrix(parts, rows)
    weight = empty_weight(packed, backend.device)
    tensors = [awq(p, backend.device) if kind == "awq" else gptq(p, "gptq", None, backend.device) for p in parts]
    pack(backend, tensors, row_order(rows, backend.device), weight)
    assert_same(weight, packed)


class NeverLaunches:
    device = torch.device("cpu")
    arch = 86
    num_multiprocessors = 4

    def load(self, spec):
        pytest.fail(f"{spec} was loaded in spite of its arguments")


def refused(
    message: str, parts: list | None = None, rows: torch.Tensor | None = None, order: torch.Tensor | None = None
) -> None:
    matrix = random_matrix(np.random.default_rng(3), 4, 128, 16, 64)
    backend = NeverLaunches()
    good = gptq(matrix, "gptq", None, backend.device)
    parts = [good] if parts is None else [dataclasses.replace(good, **changes) for changes in parts]
    rows = row_order(natural_rows(16), backend.device) if rows is None else rows
    with pytest.raises(KernelError, match=message):
        pack(backend, parts, rows, empty_weight(pack_matrix([matrix]), backend.device), order)


def test_refused_before_any_launch() -> None:
    refused("4 matrices: expected one to 3", [{}] * 4)
    refused("zero offsets", [{"zero_offset": 2}])
    refused("zero offsets", [{"zero_offset": 0}, {"zero_offset": 1}])
    refused(r"qweight has shape \(8, 16\): expected \(16, 16\)", [{"qweight": torch.zeros(8, 16, dtype=torch.int32)}])
    refused("qweight is torch.int64", [{"qweight": torch.zeros(16, 16, dtype=torch.int64)}])
    refused("qweight has strides", [{"qweight": torch.zeros(16, 16, dtype=torch.int32).T}])
    refused(r"qzeros has shape \(2, 4\)", [{"qzeros": torch.zeros(2, 4, dtype=torch.int32)}])
    refused("scales is torch.float32", [{"scales": torch.zeros(2, 16)}])
    refused(r"scales has shape \(1, 16\): expected \(2, 16\)", [{"scales": torch.zeros(1, 16, dtype=torch.float16)}])
    refused("N 12: the file packs 4-bit values", [{"scales": torch.zeros(2, 12, dtype=torch.float16)}])
    refused("rows has shape", rows=torch.zeros(8, dtype=torch.int32))
    refused("rows is torch.int64", rows=torch.zeros(16, dtype=torch.int64))
    refused("order has shape", order=torch.zeros(64, dtype=torch.int32))


def test_awq_has_neither_an_order_nor_other_widths() -> None:
    backend = NeverLaunches()
    matrix = random_matrix(np.random.default_rng(4), 4, 128, 16, 64)
    weight = empty_weight(pack_matrix([matrix]), backend.device)
    parts, rows = [awq(matrix, backend.device)], row_order(natural_rows(16), backend.device)
    with pytest.raises(KernelError, match="AWQ has 4 bits and no order"):
        pack(backend, parts, rows, weight, torch.arange(128, dtype=torch.int32))


@pytest.mark.parametrize("K", [32, 96, 256])
@pytest.mark.parametrize("gated", [False, True])
def test_words_of_the_file_become_the_words_of_the_tiles(K: int, gated: bool) -> None:
    """Code by code through the lanes' bit positions (``lane_words``), and word by word: the same tiles."""
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
