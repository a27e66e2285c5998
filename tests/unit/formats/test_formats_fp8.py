"""FP8 weights with their scales -> dense f32: against the type's definition, one weight at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl.checkpoint.quant.fp8 import Fp8Config
from exl.checkpoint.quant_config import parse_quant_config
from exl.errors import CheckpointError, ConfigError, ExlWarning, UnsupportedModelError
from exl.formats.load import load_matrix, matrix_spec, tensors_of
from exl.formats.settle_quant import settle_quant
from tests.reference.plain_formats import dequantize_fp8, e4m3
from tests.unit.formats.layer_files import NAME, dense_values, open_layer

BASE = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
BLOCKS = BASE | {"weight_block_size": [16, 32]}


def random_bytes(N: int, K: int) -> np.ndarray:
    raw = np.random.default_rng([N, K]).integers(0, 256, (N, K), dtype=np.uint8)
    return np.where(raw & 127 == 127, np.uint8(0), raw)


def as_fp8(raw: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(raw).view(torch.float8_e4m3fn)


def quant(values=BASE) -> Fp8Config:
    return parse_quant_config(values, "config.json")


def test_every_byte_is_the_number_that_it_stands_for(tmp_path):
    raw = np.array([byte for byte in range(256) if byte & 127 != 127], np.uint8).reshape(2, 127)
    with open_layer(tmp_path, {"weight": as_fp8(raw), "weight_scale": torch.ones(1)}) as checkpoint:
        found = dense_values(load_matrix(checkpoint, NAME, quant()))
    assert found.reshape(-1).tolist() == [e4m3(int(byte)) for byte in raw.reshape(-1)]
    np.testing.assert_array_equal(found, as_fp8(raw).float().numpy())  # and so says torch
    assert (found.max(), np.abs(found[found != 0]).min()) == (448, 2.0**-9)


@pytest.mark.parametrize("scale_type", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("N", "K", "rows", "columns", "shape", "values", "ending"),
    [
        (48, 64, 48, 64, (1,), BASE, "weight_scale"),
        (48, 64, 48, 64, (), BASE, "weight_scale"),
        (48, 64, 1, 64, (48, 1), BASE, "weight_scale"),
        (48, 64, 1, 64, (48,), BASE, "weight_scale"),
        (48, 64, 16, 32, (3, 2), BLOCKS, "weight_scale_inv"),
        (40, 72, 16, 32, (3, 3), BLOCKS, "weight_scale_inv"),  # smaller blocks at both ends
        (40, 72, 16, 32, (3, 3), BLOCKS, "weight_scale"),
    ],
)
def test_scales_of_every_shape(tmp_path, N, K, rows, columns, shape, values, ending, scale_type):
    raw = random_bytes(N, K)
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(0)).add(0.01).to(scale_type)
    exact = dequantize_fp8(raw, scales.double().numpy().reshape(-(-N // rows), -(-K // columns)), rows, columns)
    with open_layer(tmp_path, {"weight": as_fp8(raw), ending: scales}) as checkpoint:
        own = quant(values)
        spec, matrix = matrix_spec(checkpoint, NAME, own), load_matrix(checkpoint, NAME, own)
        assert (spec.K, spec.N, spec.dtype, spec.bits, spec.quantized) == (K, N, "f32", 32, False)
        found = dense_values(matrix).astype(np.float64)
        # A product of 4 and 24 bits is rounded once; of 4 and 8 or 11 bits not at all.
        np.testing.assert_array_equal(found, exact.astype(np.float32))
        if scale_type != torch.float32:
            np.testing.assert_array_equal(found, exact)
        np.testing.assert_array_equal(matrix.rows(15, 18), found[15:18])
        assert tensors_of(checkpoint, NAME) == {f"{NAME}.weight", f"{NAME}.{ending}"}


@pytest.mark.parametrize(
    ("weights", "shape"),
    [
        ({"strategy": "tensor"}, (1,)),
        ({"strategy": "channel"}, (48, 1)),
        ({"strategy": "block", "block_structure": [16, 32]}, (3, 2)),
        ({"strategy": "group", "group_size": 32}, (48, 2)),
    ],
)
def test_files_of_compressed_tensors(tmp_path, weights, shape):
    raw, scales = random_bytes(48, 64), torch.rand(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True} | weights}
    group["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    own = parse_quant_config(
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}, "x"
    )
    rows, columns = {1: (48, 64), 48: (1, 64 // shape[-1]), 3: (16, 32)}[shape[0]]
    exact = dequantize_fp8(raw, scales.double().numpy().reshape(-(-48 // rows), -1), rows, columns)
    tensors = {"weight": as_fp8(raw), "weight_scale": scales, "input_scale": torch.ones(1), "bias": torch.ones(48)}
    with open_layer(tmp_path, tensors) as checkpoint:
        matrix = load_matrix(checkpoint, NAME, own)
        np.testing.assert_array_equal(dense_values(matrix).astype(np.float64), exact)
        assert matrix.bias.tolist() == [1] * 48
        assert len(tensors_of(checkpoint, NAME)) == 4


def test_groups_of_compressed_tensors_need_a_size():
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "group"}}
    with pytest.raises(ConfigError, match="config_groups: 'group_0': weights: group_size: found None, expected"):
        parse_quant_config({"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}, "x")


def test_activations_are_left_out_and_that_is_said(tmp_path):
    with (
        open_layer(tmp_path, {"weight": torch.zeros(16, 64)}) as checkpoint,
        pytest.warns(ExlWarning, match=r"config\.json: asks for quantized activations .* exl computes with more exact"),
    ):
        settle_quant(checkpoint, quant())


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_modules_that_are_dense(key):
    config = quant(BASE | {key: ["lm_head", "model.layers.0"]})
    names = {"lm_head": True, "model.layers.0.mlp.up_proj": True, "model.layers.01.mlp.up_proj": False, "a": False}
    assert {name: config.for_module(name) is None for name in names} == names


@pytest.mark.parametrize(
    ("changes", "values", "message"),
    [
        (
            {"weight_scale": torch.ones(3, 2)},
            BASE,
            r"weight_scale: found shape \[3, 2\], expected one scale or \[48, 1\]",
        ),
        (
            {"weight_scale": torch.ones(48, 1)},
            BLOCKS,
            r"weight_scale: found shape \[48, 1\], expected \[3, 2\] for blocks",
        ),
        ({"weight_scale": torch.ones(1).int()}, BASE, r"weight_scale: found dtype i32, expected f32 or f16 or bf16"),
        ({"weight_scale": torch.tensor([float("inf")])}, BASE, r"weight_scale: found inf at \[0\] \(1 such"),
        ({"weight_scale": None}, BASE, r"weight: found no scales, expected one of weight_scale and weight_scale_inv"),
        ({"weight_scale_inv": torch.ones(1)}, BASE, r"weight: found .*weight_scale and .*, expected one of"),
        ({"weight": as_fp8(np.full((48, 64), 255, np.uint8))}, BASE, r"weight: found nan in rows 0 to 47"),
        ({"bias": torch.ones(47)}, BASE, r"bias: found shape \[47\], expected \[48\]"),
    ],
)
def test_damaged_modules_say_what_was_found_and_expected(tmp_path, changes, values, message):
    tensors = {"weight": as_fp8(random_bytes(48, 64)), "weight_scale": torch.ones(1)} | changes
    tensors = {ending: tensor for ending, tensor in tensors.items() if tensor is not None}
    with (
        open_layer(tmp_path, tensors) as checkpoint,
        pytest.raises(CheckpointError, match=rf"model\.safetensors: {NAME}\.{message}"),
    ):
        load_matrix(checkpoint, NAME, quant(values)).rows(0, 48)


def test_another_float8_is_refused(tmp_path):
    weight = torch.zeros(16, 32).to(torch.float8_e5m2)
    with (
        open_layer(tmp_path, {"weight": weight, "weight_scale": torch.ones(1)}) as checkpoint,
        pytest.raises(UnsupportedModelError, match=r"weight: found dtype f8_e5m2"),
    ):
        matrix_spec(checkpoint, NAME, quant())


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"fmt": "e5m2"}, UnsupportedModelError, r"fmt: found 'e5m2', exl reads e4m3"),
        ({"weight_block_size": [128]}, ConfigError, r"weight_block_size: found \[128\], expected two numbers"),
        ({"weight_block_size": 128}, ConfigError, r"weight_block_size: found 128"),
        ({"weight_block_size": [0, 128]}, ConfigError, r"weight_block_size: found \[0, 128\]"),
        ({"weight_block_size": [True, 128]}, ConfigError, r"weight_block_size: found \[True, 128\]"),
        ({"ignored_layers": "lm_head"}, ConfigError, r"ignored_layers: found 'lm_head', expected a list"),
        ({"activation_scheme": 1}, ConfigError, r"activation_scheme: found 1, expected a string"),
    ],
)
def test_values_that_make_no_sense_name_file_and_key(values, error, message):
    with pytest.raises(error, match=rf"^config\.json: {message}"):
        quant(BASE | values)
