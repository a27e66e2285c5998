"""Models whose modules have settings of their own: written, read back, and equal to their weights in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import exl
from exl.checkpoint.quant_config import read_quant_config
from exl.errors import ConfigError
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize
from tests.model.cpu_targets import EXACT
from tests.model.test_quantize_model import DATA, dequantized, ids_of_text, twin

SOURCE = DATA / "stories260K"
QUICK = {"calibration": DATA / "calibration" / "stories260K.txt", "num_samples": 4, "seq_len": 64, "group_size": 32}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """stories260K cut to its first two layers, with an MLP whose width groups of 32 divide."""
    folder = tmp_path_factory.mktemp("tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.intermediate_size = 160
    for layer in model.model.layers:
        for name, cut in (("gate_proj", (slice(160),)), ("up_proj", (slice(160),)), ("down_proj", (..., slice(160)))):
            module = layer.mlp.get_submodule(name)
            module.weight.data = module.weight.data[cut].contiguous()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SOURCE / name, folder)
    return folder


def logits_of(folder: Path, ids: list[int]) -> torch.Tensor:
    with exl.load(folder, kv_cache="f32", **EXACT) as llm:
        return llm.logits(ids)


def test_modules_have_settings_of_their_own(tiny, tmp_path):
    overrides = (
        r".*\.v_proj=bits:8,group_size:16",
        r"model\.layers\.0\.mlp=dense",
        r"model\.layers\.1\.self_attn\.o_proj=dense",
        r".*mlp\.down_proj=bits:3,sym:true,group_size:-1",
    )
    quantize(tiny, tmp_path / "out", QuantizeOptions(**QUICK, overrides=overrides))
    quant_json = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert quant_json["dynamic"] == {
        r"-:model\.layers\.0\.mlp": {},
        r"-:model\.layers\.1\.self_attn\.o_proj": {},
        r"+:.*\.v_proj": {"bits": 8, "group_size": 16},
        r"+:.*mlp\.down_proj": {"bits": 3, "sym": True, "group_size": -1},
    }
    config_json = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config_json["quantization_config"] == quant_json
    assert config_json["intermediate_size"] == 160
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(tiny / "model.safetensors")
    shapes = {
        "model.layers.0.self_attn.q_proj": (8, 2),  # words of qweight, groups
        "model.layers.0.self_attn.v_proj": (16, 4),
        "model.layers.1.mlp.up_proj": (8, 2),
        "model.layers.1.mlp.down_proj": (15, 1),
    }
    for name, (words, groups) in shapes.items():
        assert tensors[f"{name}.qweight"].shape[0] == words
        assert tensors[f"{name}.scales"].shape[0] == groups
    for name in ("0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj", "1.self_attn.o_proj"):
        assert f"model.layers.{name}.qweight" not in tensors
        assert np.array_equal(tensors[f"model.layers.{name}.weight"], before[f"model.layers.{name}.weight"])
    quant = read_quant_config(tmp_path / "out", config_json)
    down = quant.for_module("model.layers.1.mlp.down_proj")
    assert (down.bits, down.group_size, down.sym) == (3, -1, True)
    assert quant.for_module("model.layers.0.mlp.down_proj") is None

    bits = {"v_proj": 8, "down_proj": 3}
    weights = dequantized(tmp_path / "out", lambda name: bits.get(name.rpartition(".")[2], 4))
    ids = ids_of_text()
    with torch.no_grad():
        expected = twin(tiny, weights, padded=False)(torch.tensor([ids])).logits[0]
    assert float((logits_of(tmp_path / "out", ids) - expected).abs().max()) <= 2e-4


def test_a_module_among_others_is_rounded_as_if_all_were_like_it(tiny, tmp_path):
    """k and v at 8 bits do not change q's codes: outputs are independent, and the Hessian is one."""
    quantize(tiny, tmp_path / "all", QuantizeOptions(**QUICK))
    quantize(tiny, tmp_path / "some", QuantizeOptions(**QUICK, overrides=[r".*\.[kv]_proj=bits:8"]))
    name = "model.layers.0.self_attn.q_proj"
    found, expected = (dequantized(tmp_path / x, lambda _: 4, name)[name] for x in ("some", "all"))
    # Products of fewer columns may differ in their last bits, by which single codes may change.
    assert float((found == expected).mean()) > 0.99


def test_the_mlp_of_a_model_that_is_padded(tmp_path):
    """172 inputs fill no whole words: dense modules are not padded, so the others cannot be."""
    with pytest.raises(ConfigError, match=r"0\.mlp\.down_proj: found 172 inputs, expected a multiple of 32.*leave it"):
        quantize(SOURCE, tmp_path / "out", QuantizeOptions(**QUICK, overrides=[r".*(gate|up)_proj=dense"]))
    quantize(SOURCE, tmp_path / "out", QuantizeOptions(**QUICK, overrides=[r".*mlp=dense"]))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 172
    assert logits_of(tmp_path / "out", ids_of_text()).isfinite().all()


def test_nothing_left_to_quantize_is_an_error(tiny, tmp_path):
    with pytest.raises(ConfigError, match="nothing is left to quantize"):
        quantize(tiny, tmp_path / "out", QuantizeOptions(**QUICK, overrides=["model=dense"]))
