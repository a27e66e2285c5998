"""Packing against a plain packer that works bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl.quantize.gptq import QuantizedWeight
from exl.quantize.overrides import Settings
from exl.quantize.pack import gptq_tensors, pack_codes, pack_zeros
from exl.quantize.plan import ModulePlan, PartPlan
from tests.reference.plain_packer import dequantize, pack_layer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_words_are_the_plain_packers(bits, checkpoint_format):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (96, 64), dtype=np.uint8)
    zeros = rng.integers(0, 2**bits, (3, 64), dtype=np.uint8)
    expected = pack_layer(codes, zeros, np.ones((3, 64)), bits, checkpoint_format)
    assert np.array_equal(pack_codes(codes, bits), expected["qweight"])
    assert np.array_equal(pack_zeros(zeros, bits, checkpoint_format), expected["qzeros"])


@pytest.mark.parametrize(("bits", "N"), [(2, 16), (4, 8), (8, 4), (4, 24)])
def test_zeros_of_narrow_matrices(bits, N):
    zeros = np.random.default_rng(0).integers(0, 2**bits, (2, N), dtype=np.uint8)
    expected = pack_layer(np.zeros((32, N), np.uint8), zeros, np.ones((2, N)), bits)["qzeros"]
    assert np.array_equal(pack_zeros(zeros, bits, "gptq"), expected)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_padded_outputs_are_exactly_zero(checkpoint_format):
    rng = np.random.default_rng(0)
    result = QuantizedWeight(
        codes=torch.from_numpy(rng.integers(0, 16, (64, 50), dtype=np.uint8)),
        scales=torch.from_numpy(rng.uniform(0.1, 1, (2, 50)).astype(np.float16)),
        zeros=torch.from_numpy(rng.integers(1, 16, (2, 50), dtype=np.uint8)),
        g_idx=torch.from_numpy(np.arange(64, dtype=np.int32) // 32),
    )
    part = PartPlan(30, np.arange(20), np.arange(20))
    settings = Settings(bits=4, group_size=32, sym=False)
    module = ModulePlan("m", K=64, N=20, out_K=64, out_N=32, has_bias=True, settings=settings, parts=(part,))
    tensors = gptq_tensors(module, result, module.columns, np.arange(20, dtype=np.float16), checkpoint_format)
    codes = np.pad(result.codes[:, 30:].numpy(), ((0, 0), (0, 12)), constant_values=8)
    zeros = np.pad(result.zeros[:, 30:].numpy(), ((0, 0), (0, 12)), constant_values=8)
    scales = tensors["m.scales"]
    expected = pack_layer(codes, zeros, scales, 4, checkpoint_format, result.g_idx.tolist())
    for key, value in expected.items():
        assert np.array_equal(tensors[f"m.{key}"], value), key
    assert [(f"m.{key}", tensors[f"m.{key}"].shape) for key in ("qweight", "qzeros", "scales", "g_idx", "bias")] == [
        (name, shape) for name, _, shape in module.entries()
    ]
    assert np.array_equal(dequantize(codes, zeros, scales, result.g_idx.tolist())[:, 20:], np.zeros((64, 12)))
    assert np.array_equal(tensors["m.bias"], np.pad(np.arange(20), (0, 12)))
