"""Configurations that call a text part's modules otherwise than the tensors are called: as transformers' classes do."""

from __future__ import annotations

import pytest

from exl.checkpoint.module_names import ModuleNames, other_spellings
from exl.checkpoint.module_pattern import ModulePattern
from exl.checkpoint.quant_config import parse_quant_config

NEW, OLD, QWEN = "model.language_model.layers.", "language_model.model.layers.", "model.layers."
SPELLINGS = (NEW, OLD, QWEN)
SOURCE = "config.json"


def test_other_spellings():
    assert other_spellings(f"{NEW}3.mlp.up_proj") == (f"{OLD}3.mlp.up_proj",)
    assert other_spellings(f"{OLD}3.mlp.up_proj") == (f"{NEW}3.mlp.up_proj",)
    assert other_spellings(f"{QWEN}3.mlp.up_proj") == (f"{NEW}3.mlp.up_proj", f"{OLD}3.mlp.up_proj")
    assert other_spellings("lm_head") == ("language_model.lm_head",)
    assert other_spellings("language_model.lm_head") == ()
    assert other_spellings("vision_tower.encoder.layers.0.mlp.fc1") == ()


def _configs(written: str, gptq: str):
    """Of each method: layer 0 has 8 bits and layer 1 is dense, called as ``written``; ``gptq``: as expressions."""
    base = {"bits": 4, "group_size": 64}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    eight = {**weights, "num_bits": 8}
    module = f"{written}{{}}.mlp.up_proj"
    compressed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {
        "gptq": {**base, "dynamic": {f"-:{gptq}1[.].*": {}, f"+:{gptq}0[.].*": {"bits": 8}}},
        "auto-round": {
            **{**base, "quant_method": "auto-round", "sym": True, "packing_format": "auto_round:auto_gptq"},
            "extra_config": {module.format(0): {"bits": 8}, module.format(1): {"bits": 16}},
        },
        "auto-round, expressions": {
            **{**base, "quant_method": "auto-round", "sym": True, "packing_format": "auto_round:auto_gptq"},
            "extra_config": {f"{gptq}0[.]mlp.*": {"bits": 8}, f"{gptq}1[.]mlp.*": {"bits": 16}},
            "block_name_to_quantize": written.removesuffix("."),
        },
        "compressed-tensors": {
            **compressed,
            "ignore": [module.format(1)],
            "config_groups": {
                "a": {"targets": ["Linear"], "weights": weights},
                "b": {"targets": [module.format(0)], "weights": eight},
            },
        },
        "compressed-tensors, expressions": {
            **compressed,
            "ignore": [f"re:{gptq}1[.].*"],
            "config_groups": {
                "a": {"targets": ["Linear"], "weights": weights},
                "b": {"targets": [f"re:{gptq}0[.].*"], "weights": eight},
            },
        },
    }


METHODS = tuple(_configs("", ""))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("written", [NEW, OLD])
@pytest.mark.parametrize("found", SPELLINGS)
def test_modules_have_what_the_file_says_of_them(found, written, method):
    config = parse_quant_config(_configs(written, written.replace(".", "[.]"))[method], SOURCE)
    bits = [config.for_module(f"{found}{layer}.mlp.up_proj") for layer in range(3)]
    assert [None if own is None else own.bits for own in bits] == [8, None, 4]


@pytest.mark.parametrize("found", SPELLINGS)
def test_lists_of_dense_modules(found):
    awq = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    for values in (awq, fp8):
        config = parse_quant_config({**values, "modules_to_not_convert": [f"{NEW}1.mlp"]}, SOURCE)
        assert config.for_module(f"{found}1.mlp.up_proj") is None
        assert config.for_module(f"{found}11.mlp.up_proj") is not None


def test_what_says_nothing_of_text_parts_means_the_names_in_the_file():
    """An expression for all but some names would fit every other spelling of those."""
    names = ModuleNames(f"{QWEN}0.mlp.up_proj", 1000)
    assert not names.matches(ModulePattern.parse(r"(?!model\.layers\.).*"))
    assert names.matches(ModulePattern.parse(r"(?!vision).*up_proj"))
    assert names.has("up_pr")
    assert names.is_in("layers.0")
    assert not names.is_in("ayers.0")
    assert not ModuleNames(f"{NEW}0.mlp.up_proj", 1000).is_called(f"{QWEN}0.mlp.up_proj")


def test_a_language_model_by_itself_is_as_it_was():
    config = parse_quant_config({"bits": 4, "group_size": 64, "dynamic": {r"-:(?!model\.layers\.).*": {}}}, SOURCE)
    assert config.for_module("model.layers.0.mlp.up_proj") is not None
    assert config.for_module("model.other.0.mlp.up_proj") is None
