"""AutoRound's own files: GPTQ's and AWQ's layouts under another configuration, with values for single modules."""

from __future__ import annotations

import pytest

from exl.checkpoint.quant.auto_round import AutoRoundConfig
from exl.checkpoint.quant.awq import AwqConfig
from exl.checkpoint.quant.gptq import GptqConfig
from exl.checkpoint.quant_config import parse_quant_config
from exl.errors import ConfigError, UnsupportedModelError
from exl.formats.load import load_matrix, matrix_spec
from tests.reference.plain_formats import borrowed_zeros, pack_awq_gemm
from tests.reference.plain_packer import pack_layer
from tests.unit.formats.layer_files import NAME, expect_matrix, open_layer, random_layer

BASE = {
    **{"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int", "iters": 200},
    **{"autoround_version": "0.16.1", "batch_size": 8, "seqlen": 2048},
}


def quant(**values) -> AutoRoundConfig:
    return parse_quant_config(BASE | values, "config.json")


@pytest.mark.parametrize(
    ("packing", "packed"),
    [
        ("auto_round:auto_gptq", "v1"),
        ("auto_round:gptq", "v1"),
        (None, "v1"),
        ("auto_round", "v2"),
        ("auto_round:gptqmodel", "v2"),
        ("auto_round:exllamav2", "v2"),
        ("auto_round:tritonv2", "v2"),
        ("auto_round:auto_awq", "awq"),
        ("auto_round:awq", "awq"),
    ],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_packing_is_read_as_what_it_is(tmp_path, bits, packing, packed):
    codes, zeros, scales = random_layer((bits, packed), 64, 32, 32, bits)
    values = {"bits": bits} | ({} if packing is None else {"packing_format": packing})
    if packed == "awq" and bits != 4:
        with pytest.raises(UnsupportedModelError, match=rf"bits: found {bits}, exl has \(4,\)"):
            quant(**values)
        return
    if packed == "awq":
        tensors = pack_awq_gemm(codes, zeros, scales)
    else:
        tensors = pack_layer(codes, zeros, scales, bits, "gptq" if packed == "v1" else "gptq_v2")
        if packed == "v1" and bits != 3:
            tensors["qzeros"] = borrowed_zeros(zeros, bits)
    with open_layer(tmp_path, tensors) as checkpoint:
        own = quant(**values)
        expect_matrix(load_matrix(checkpoint, NAME, own), codes, zeros, scales)
        assert (own.method, own.layout) == ("auto-round", packing or "auto_round:auto_gptq")


def test_a_name_goes_before_patterns_and_the_first_pattern_before_others(tmp_path):
    config = quant(
        extra_config={
            r".*mlp\.up_.*": {"bits": 8, "group_size": 64},
            r"layers\.0\..*": {"bits": 2, "sym": True},
            "model.layers.0.mlp.up_proj": {"bits": 3},
            "model.layers.2.mlp.down_proj": {"bits": 16, "act_bits": 16},
            "model.layers.3.mlp.gate": {"bits": 8},
            r"model\.layers\.4": {},
        }
    )
    found = {
        name: (own.bits, own.group_size, own.sym) if (own := config.for_module(f"model.layers.{name}_proj")) else None
        for name in ("0.mlp.up", "1.mlp.up", "0.mlp.down", "1.mlp.down", "2.mlp.down", "3.mlp.gate", "4.mlp.down")
    }
    assert found == {
        "0.mlp.up": (3, 32, False),
        "1.mlp.up": (8, 64, False),
        "0.mlp.down": (2, 32, True),
        "1.mlp.down": (4, 32, False),
        "2.mlp.down": None,
        "3.mlp.gate": (4, 32, False),  # the router's name is not a part of the gate projection's
        "4.mlp.down": (4, 32, False),
    }


def test_modules_outside_of_the_blocks_are_dense_unless_named():
    for blocks in ("model.layers", ["model.layers"], [["model.layers.0", "model.layers.1"]], "model.layers, vision.x"):
        config = quant(block_name_to_quantize=blocks)
        assert config.for_module("model.layers.1.mlp.up_proj").bits == 4
        assert config.for_module("lm_head") is None
        assert config.for_quantized("lm_head").bits == 4
    config = quant(block_name_to_quantize="model.layers", extra_config={"lm_head": {"bits": 8, "group_size": 128}})
    assert (config.for_module("lm_head").bits, config.for_module("lm_head").group_size) == (8, 128)


def test_a_module_with_bits_of_its_own_is_read_with_them(tmp_path):
    codes, zeros, scales = random_layer("own", 64, 32, 64, 8, zeros=128)
    with open_layer(tmp_path, pack_layer(codes, zeros, scales, 8)) as checkpoint:
        config = quant(sym=True, extra_config={NAME: {"bits": 8, "group_size": 64}})
        expect_matrix(load_matrix(checkpoint, NAME, config), codes, zeros, scales)
        assert matrix_spec(checkpoint, NAME, config).symmetric


def test_modules_have_parameters_of_the_format_of_their_tensors():
    assert isinstance(quant().for_module("a"), GptqConfig)
    assert quant().for_module("a").borrowed
    assert not quant(packing_format="auto_round").for_module("a").borrowed
    assert isinstance(quant(packing_format="auto_round:auto_awq").for_module("a"), AwqConfig)
    assert quant(packing_format="auto_round:auto_awq", sym=True).for_module("a").zero_point is False


def test_what_autoround_exports_for_others_is_read_as_what_it_says(tmp_path):
    """Also zeros as its packer for AutoGPTQ writes them."""
    codes, zeros, scales = random_layer("exported", 64, 32, 32, 4)
    tensors = pack_layer(codes, zeros, scales, 4) | {"qzeros": borrowed_zeros(zeros, 4)}
    values = {"quant_method": "gptq", "provider": "auto-round", "bits": 4, "group_size": 32, "sym": False}
    with open_layer(tmp_path, tensors) as checkpoint:
        expect_matrix(load_matrix(checkpoint, NAME, parse_quant_config(values, "x")), codes, zeros, scales)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"packing_format": "auto_round:fp8_static"}, UnsupportedModelError, r"packing_format: found 'auto"),
        ({"packing_format": "auto_round:llm_compressor"}, UnsupportedModelError, r"packing_format: found 'auto_ro"),
        ({"packing_format": "gguf"}, UnsupportedModelError, r"packing_format: found 'gguf'"),
        ({"data_type": "mx_fp"}, UnsupportedModelError, r"data_type: found 'mx_fp', exl reads int"),
        ({"bits": 5}, UnsupportedModelError, r"bits: found 5"),
        ({"rotation_config": {"a": 1}}, UnsupportedModelError, r"rotation_config: found"),
        ({"extra_config": {"a": {"bits": 6}}}, UnsupportedModelError, r"extra_config: 'a': bits: found 6"),
        ({"extra_config": {"a": {"data_type": "nv_fp"}}}, UnsupportedModelError, r"extra_config: 'a': data_type"),
        ({"extra_config": {"a": 8}}, ConfigError, r"extra_config: 'a': found 8, expected an object"),
        ({"extra_config": {"(": {"bits": 8}}}, ConfigError, r"extra_config: '\(': not a regular expression"),
        ({"extra_config": [1]}, ConfigError, r"extra_config: found \[1\], expected an object"),
        ({"block_name_to_quantize": 3}, ConfigError, r"block_name_to_quantize: found 3, expected names"),
        ({"group_size": 0}, ConfigError, r"group_size: found 0"),
        ({"bits": None}, ConfigError, r"found no bits, which an AutoRound checkpoint needs"),
    ],
)
def test_values_that_make_no_sense_name_file_and_key(values, error, message):
    with pytest.raises(error, match=rf"^config\.json: {message}"):
        quant(**values)


def test_patterns_that_take_too_long_name_file_and_key():
    with pytest.raises(ConfigError, match=r"config\.json: extra_config: patterns that take too many steps"):
        quant(extra_config={f"(?=(?:a?){{9}}[xy]{{{i + 1}}})z?": {"bits": 8} for i in range(1200)}).for_module("a" * 60)
