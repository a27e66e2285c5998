"""compressed-tensors' integers -> codes, zeros, scales and order: against a plain packer, in both layouts of bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl.checkpoint.quant.compressed_tensors import CompressedTensorsConfig, IntConfig, PackedConfig
from exl.checkpoint.quant.fp8 import ACTIVATIONS, Fp8Config
from exl.checkpoint.quant_config import parse_quant_config
from exl.errors import CheckpointError, ConfigError, ExlWarning, UnsupportedModelError
from exl.formats.load import load_matrix, load_part, matrix_spec, table_spec, tensors_of
from exl.formats.settle_quant import settle_quant
from tests.reference.plain_formats import pack_compressed
from tests.reference.plain_packer import dequantize
from tests.unit.formats.layer_files import NAME, dense_values, expect_matrix, open_layer, random_layer

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}


def values(weights=(), group=(), **top):
    """A configuration with one group of all linears."""
    own = {"targets": ["Linear"], "weights": WEIGHTS | dict(weights), "input_activations": None} | dict(group)
    return {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": own}},
        **{"ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"},
        **top,
    }


def quant(weights=(), group=(), **top) -> CompressedTensorsConfig:
    return parse_quant_config(values(weights, group, **top), "config.json")


@pytest.mark.parametrize("order", [False, True], ids=["sequential", "by group"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dense", [True, False], ids=["from 0.17.0", "before"])
@pytest.mark.parametrize(
    ("bits", "K", "N", "group_size"),
    [(2, 128, 32, 64), (3, 96, 16, 32), (3, 160, 40, -1), (4, 160, 24, 64), (4, 64, 9, -1), (8, 96, 5, 32)],
)
def test_codes_zeros_scales_and_order_are_exact(tmp_path, bits, K, N, group_size, dense, symmetric, order):
    size = K if group_size == -1 else group_size
    codes, zeros, scales = random_layer(
        (bits, K, symmetric), K, N, size, bits, zeros=2 ** (bits - 1) if symmetric else None
    )
    g_idx = np.random.default_rng(K).permutation(np.arange(K) // size) if order else None
    tensors = pack_compressed(codes, None if symmetric else zeros, scales, bits, dense=dense, g_idx=g_idx)
    weights = {"num_bits": bits, "symmetric": symmetric, "actorder": "group" if order else "static"}
    weights |= {"strategy": "channel", "group_size": None} if group_size == -1 else {"group_size": group_size}
    with open_layer(tmp_path, tensors) as checkpoint:
        own = quant(weights)
        matrix, spec = load_matrix(checkpoint, NAME, own), matrix_spec(checkpoint, NAME, own)
        expect_matrix(matrix, codes, zeros, scales, g_idx if size < K else None)
        assert (spec.K, spec.N, spec.bits, spec.group_size, spec.symmetric) == (K, N, bits, size, symmetric)
        assert (spec.order_key is None) == (matrix.order is None)
        assert (matrix.read_words is None) == (bits == 3 and not dense)
        assert tensors_of(checkpoint, NAME) == {f"{NAME}.{ending}" for ending in tensors}


@pytest.mark.parametrize("scale_type", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", ["group", "channel", "channel without an axis", "tensor", "number"])
def test_scales_of_every_type_and_shape(tmp_path, scale_type, shape):
    codes, zeros, scales = random_layer("scales", 64, 16, 32 if shape == "group" else 64, 4, zeros=8)
    scales = torch.from_numpy(scales.copy()).to(scale_type)
    if shape in ("tensor", "number"):
        scales[:] = scales[0, 0].clone()
    tensors = pack_compressed(codes, None, scales.float().numpy(), 4)
    stored = {"group": scales.T, "channel": scales.T, "channel without an axis": scales[0]}
    tensors["weight_scale"] = stored.get(shape, scales[0, :1] if shape == "tensor" else scales[0, 0]).contiguous()
    with open_layer(tmp_path, tensors) as checkpoint:
        own = quant({} if shape == "group" else {"strategy": shape.split()[0], "group_size": None})
        expect_matrix(load_matrix(checkpoint, NAME, own), codes, zeros, scales.double().numpy())
        assert matrix_spec(checkpoint, NAME, own).scale_dtype == {2: "f16"}.get(
            2 if scale_type == torch.float16 else 0, "bf16" if scale_type == torch.bfloat16 else "f32"
        )


@pytest.mark.parametrize("stored", ["bytes", "words"])
def test_zeros_that_a_symmetric_file_has_all_the_same(tmp_path, stored):
    codes, zeros, scales = random_layer("zeros", 64, 16, 32, 4, zeros=8)
    tensors = pack_compressed(codes, zeros, scales, 4)
    wrong = pack_compressed(codes, zeros + 1, scales, 4)["weight_zero_point"]
    if stored == "bytes":
        tensors["weight_zero_point"], wrong = np.zeros((16, 2), np.int8), np.full((16, 2), 1, np.int8)
    with open_layer(tmp_path, tensors) as checkpoint:
        expect_matrix(load_matrix(checkpoint, NAME, quant()), codes, zeros, scales)
    with (
        open_layer(tmp_path, tensors | {"weight_zero_point": wrong}) as checkpoint,
        pytest.raises(CheckpointError, match=r"weight_zero_point: found 1, expected 0: config\.json says"),
    ):
        load_matrix(checkpoint, NAME, quant())


@pytest.mark.parametrize("filler", [0, -1])
def test_an_order_that_nobody_filled_in_is_none(tmp_path, filler):
    codes, zeros, scales = random_layer("order", 64, 16, 32, 4, zeros=8)
    tensors = pack_compressed(codes, None, scales, 4, g_idx=[filler] * 64)
    with open_layer(tmp_path, tensors) as checkpoint:
        expect_matrix(load_matrix(checkpoint, NAME, quant({"actorder": "group"})), codes, zeros, scales)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "strategy"), [(8, "channel"), (8, "group"), (4, "channel"), (8, "tensor")])
def test_integers_in_bytes(tmp_path, bits, strategy, symmetric):
    """W8A8's weights, without its activations."""
    size, middle = 32 if strategy == "group" else 96, 2 ** (bits - 1)
    codes, zeros, scales = random_layer((bits, strategy), 96, 16, size, bits, zeros=middle if symmetric else None)
    if strategy == "tensor":
        zeros, scales = np.full_like(zeros, zeros[0, 0]), np.full_like(scales, scales[0, 0])
    tensors = {"weight": (codes.T.astype(int) - middle).astype(np.int8), "weight_scale": scales.T}
    if not symmetric:
        tensors["weight_zero_point"] = (zeros.T.astype(int) - middle).astype(np.int8)
    if strategy == "tensor":
        tensors |= {key: tensor[:1, 0] for key, tensor in tensors.items() if key != "weight"}
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": 32}
    activations = {"input_activations": {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}}
    with open_layer(tmp_path, tensors) as checkpoint:
        for stated in ("int-quantized", "naive-quantized", "mixed-precision"):
            own = quant(weights, activations, format=stated)
            expect_matrix(load_matrix(checkpoint, NAME, own), codes, zeros, scales)
        assert matrix_spec(checkpoint, NAME, own).symmetric == symmetric


def test_bytes_beyond_their_bits(tmp_path):
    weight = np.zeros((16, 64), np.int8)
    weight[3, 7] = -9
    own = quant({"strategy": "channel", "group_size": None}, format="int-quantized")
    with open_layer(tmp_path, {"weight": weight, "weight_scale": np.ones((16, 1), np.float16)}) as checkpoint:
        matrix = load_matrix(checkpoint, NAME, own)
        assert (matrix.codes(0, 3) == 8).all()
        with pytest.raises(CheckpointError, match=r"weight: found -9, expected -8 to 7: 4 bits"):
            matrix.codes(0, 16)


def test_an_embedding_is_packed_as_a_head_is(tmp_path):
    codes, zeros, scales = random_layer("embed", 64, 40, 32, 4)
    g_idx = np.arange(64) // 32
    own = quant({"symmetric": False}, {"targets": ["Embedding"]})
    name = "model.embed_tokens"
    with open_layer(tmp_path, pack_compressed(codes, zeros, scales, 4), name) as checkpoint:
        spec = table_spec(checkpoint, name, own)
        assert (spec.K, spec.N, spec.dtype) == (64, 40, "f32")
        table = load_part(checkpoint, spec, own)
        expected = dequantize(codes, zeros, scales, g_idx).T
        np.testing.assert_array_equal(dense_values(table).astype(np.float64), expected)
        np.testing.assert_array_equal(table.rows(7, 9), expected[7:9])


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({"weight_packed": np.zeros((16, 8), np.int16)}, {}, r"weight_packed: found dtype i16, expected i32"),
        (
            {"weight_packed": np.zeros((16, 9), np.int32)},
            {},
            r"weight_packed: found shape \[16, 9\], expected \[16, 8\]",
        ),
        ({"weight_shape": np.array([15, 64])}, {}, r"weight_packed: found shape \[16, 8\], expected \[15, 8\]"),
        ({"weight_shape": np.array([16, 48])}, {}, r"weight_packed: found shape \[16, 8\], expected \[16, 6\]"),
        ({}, {"num_bits": 3}, r"weight_packed: found shape \[16, 8\], expected \[16, 6\] or, padded, \[16, 7\]"),
        ({}, {"num_bits": 8}, r"weight_packed: found shape \[16, 8\], expected \[16, 16\]"),
        ({}, {"group_size": 16}, r"weight_scale: found f16 \[16, 2\], expected f32 or f16 or bf16 \[16, 4\]"),
        ({"weight_scale": np.zeros((16, 2), np.int32)}, {}, r"weight_scale: found i32 \[16, 2\]"),
        ({"weight_scale": np.full((16, 2), np.nan, np.float16)}, {}, r"weight_scale: found nan at \[0, 0\] \(32 such"),
        ({"weight_zero_point": np.zeros((3, 2), np.int32)}, {"symmetric": False}, r"zero_point: found shape \[3, 2\]"),
        ({"weight_g_idx": np.zeros(63, np.int32)}, {}, r"weight_g_idx: found shape \[63\], expected \[64\]"),
        ({"weight_g_idx": np.array([0, 1] * 31 + [1, 1], np.int32)}, {}, r"weight_g_idx: found 31 inputs in group 0"),
        ({"bias": np.zeros(15, np.float16)}, {}, r"bias: found shape \[15\], expected \[16\]"),
    ],
)
def test_damaged_layers_say_what_was_found_and_expected(tmp_path, changes, weights, message):
    codes, _, scales = random_layer("damaged", 64, 16, 32, 4)
    with (
        open_layer(tmp_path, pack_compressed(codes, None, scales, 4) | changes) as checkpoint,
        pytest.raises(CheckpointError, match=rf"model\.safetensors: {NAME}\.(weight_)?{message}"),
    ):
        load_matrix(checkpoint, NAME, quant(weights))


def test_missing_tensors_are_named(tmp_path):
    codes, zeros, scales = random_layer("missing", 64, 16, 32, 4)
    for ending in ("weight_scale", "weight_shape", "weight_zero_point"):
        tensors = pack_compressed(codes, zeros, scales, 4)
        del tensors[ending]
        with (
            open_layer(tmp_path, tensors) as checkpoint,
            pytest.raises(CheckpointError, match=rf"no tensor '{NAME}\.{ending}'"),
        ):
            load_matrix(checkpoint, NAME, quant({"symmetric": False}))


# --- configuration: which group a module belongs to ----------------------------------------------------------------


def groups(*found, **top) -> CompressedTensorsConfig:
    """Of (targets, changes of weights, format)."""
    own = {
        f"group_{i}": {"targets": targets, "weights": WEIGHTS | weights, "format": stated}
        for i, (targets, weights, stated) in enumerate(found)
    }
    return parse_quant_config(values() | {"config_groups": own, "format": "mixed-precision"} | top, "config.json")


def test_names_go_before_patterns_and_those_before_classes():
    config = groups(
        (["Linear"], {"num_bits": 4}, "pack-quantized"),
        ([r"re:.*mlp\.down_proj$"], {"num_bits": 8, "strategy": "channel"}, "int-quantized"),
        (["model.layers.1.mlp.down_proj"], {"num_bits": 8}, "pack-quantized"),
        (
            [r"re:.*self_attn.*"],
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 64]},
            None,
        ),
        ignore=["lm_head", r"re:.*\.mlp\.gate$"],
    )
    found = {
        name: None if (own := config.for_module(name)) is None else (type(own), own.bits)
        for name in (
            *("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"),
            *("model.layers.0.self_attn.q_proj", "lm_head", "model.layers.3.mlp.gate", "model.embed_tokens"),
        )
    }
    assert found == {
        "model.layers.0.mlp.up_proj": (PackedConfig, 4),
        "model.layers.0.mlp.down_proj": (IntConfig, 8),
        "model.layers.1.mlp.down_proj": (PackedConfig, 8),
        "model.layers.0.self_attn.q_proj": (Fp8Config, 8),
        "lm_head": None,
        "model.layers.3.mlp.gate": None,
        "model.embed_tokens": None,
    }
    assert config.for_module("model.layers.0.self_attn.q_proj").block == (128, 64)
    assert config.layout == "pack-quantized and int-quantized and e4m3 in blocks of 128 x 64"


def test_tensors_go_before_the_configuration(tmp_path):
    codes, zeros, scales = random_layer("ignored", 64, 16, 32, 4, zeros=8)
    with open_layer(tmp_path, pack_compressed(codes, None, scales, 4), "lm_head") as checkpoint:
        expect_matrix(load_matrix(checkpoint, "lm_head", quant()), codes, zeros, scales)
        several = groups((["Linear"], {}, "pack-quantized"), (["re:a"], {"num_bits": 8}, "pack-quantized"))
        with pytest.raises(ConfigError, match=r"lm_head is quantized in the file, but no target .* there are 2 groups"):
            matrix_spec(checkpoint, "lm_head", several)
    with open_layer(tmp_path, {"weight": torch.zeros(16, 64)}) as checkpoint:
        assert not matrix_spec(checkpoint, NAME, quant()).quantized
    with (
        open_layer(tmp_path, pack_compressed(codes, None, scales, 4)) as checkpoint,
        pytest.raises(CheckpointError, match=r"up_proj: found weight_packed, expected weight: config\.json describes"),
    ):
        matrix_spec(checkpoint, NAME, quant(format="int-quantized"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, False),
        ({"group": {"input_activations": {"num_bits": 8, "type": "int"}}, "format": "int-quantized"}, True),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, True),
    ],
)
def test_quantized_activations_are_left_out_and_that_is_said(tmp_path, changes, says, recwarn):
    with open_layer(tmp_path, {"weight": torch.zeros(16, 64)}) as checkpoint:
        settle_quant(checkpoint, quant(**changes))
    assert [str(w.message) for w in recwarn if w.category is ExlWarning] == [
        f"{tmp_path}: config.json: {ACTIVATIONS}"
    ] * says


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (values(format="nvfp4-pack-quantized"), UnsupportedModelError, r"weights: found format 'nvfp4-pack-quantized'"),
        (values(format="marlin-24"), UnsupportedModelError, r"weights: found format 'marlin-24' of type 'int', exl"),
        (
            values({"type": "float", "num_bits": 4}, format="mixed-precision"),
            UnsupportedModelError,
            r"num_bits: found 4",
        ),
        (values({"strategy": "tensor_group"}), UnsupportedModelError, r"found type 'int', strategy 'tensor_group'"),
        (values({"strategy": "block"}), UnsupportedModelError, r"strategy: found 'block', exl reads blocks of float"),
        (values({"num_bits": 5}), UnsupportedModelError, r"num_bits: found 5"),
        (values({"num_bits": "4"}), ConfigError, r"num_bits: found '4'"),
        (values({"group_size": 0}), ConfigError, r"group_size: found 0"),
        (values({"symmetric": "yes"}), ConfigError, r"symmetric: found 'yes', expected true or false"),
        (values(group={"targets": "Linear"}), ConfigError, r"targets: found 'Linear', expected a list"),
        (values(group={"targets": ["re:("]}), ConfigError, r"targets: 're:\(': not a regular expression"),
        (values(group={"weights": None}), UnsupportedModelError, r"found no weights"),
        (values(ignore=["re:*"]), ConfigError, r"ignore: 're:\*': not a regular expression"),
        (
            values(config_groups={"W4A16": ["Linear"]}),
            UnsupportedModelError,
            r"config_groups: 'W4A16': found \['Linear'\]",
        ),
        (values(config_groups={}), ConfigError, r"found no config_groups"),
        (values(config_groups=[1]), ConfigError, r"config_groups: found \[1\], expected an object"),
        (values(sparsity_config={"format": "sparse-24-bitmask"}), UnsupportedModelError, r"sparsity_config: found"),
        (values(transform_config={"config_groups": {"u": {}}}), UnsupportedModelError, r"transform_config: found"),
    ],
)
def test_values_that_make_no_sense_name_file_and_key(changed, error, message):
    with pytest.raises(error, match=rf"^config\.json: (config_groups: 'group_0': )?(weights: )?{message}"):
        parse_quant_config(changed, "config.json")


def test_patterns_that_take_too_long_name_the_file():
    config = quant(ignore=[f"re:(?:a?){{30}}(?:a?){{30}}[xy]{{{i + 1}}}" for i in range(1200)])
    with pytest.raises(ConfigError, match=r"^config\.json: patterns that take too many steps"):
        config.for_module("a" * 60)
