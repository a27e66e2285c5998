"""Sources in FP8: the same files as from a dense source whose weights are what the FP8 tensors stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl.engine.build import load_engine
from exl.errors import ConfigError
from exl.planning.options import EngineOptions
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize
from tests.model.cpu_targets import EXACT
from tests.model.cuda_engines import all_logits, some_ids
from tests.model.hf_models import prefill_logits
from tests.model.test_formats_model import CASES, make

OPTIONS = QuantizeOptions(method="rtn", group_size=32)


@pytest.fixture(scope="module", params=["fp8 blocks", "fp8 channels"])
def source(request, tmp_path_factory):
    """An FP8 folder, and transformers' model of the weights that it stands for."""
    folder = tmp_path_factory.mktemp("fp8")
    quant, layer = CASES[request.param]
    return folder, make(folder, quant, layer)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has no tokenizer: sequences instead of a text."""
    sequences = [torch.tensor(some_ids(40, seed=seed), dtype=torch.int32).numpy() for seed in range(6)]
    monkeypatch.setattr("exl.quantize.run._Run._read_sequences", lambda run: sequences)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_result_is_that_of_the_dense_weights(source, method, tmp_path, monkeypatch):
    folder, model = source
    _calibrate(monkeypatch)
    options = QuantizeOptions(method=method, group_size=32, calibration="text" if method == "gptq" else None)
    model.save_pretrained(tmp_path / "dense")
    quantize(folder, tmp_path / "from_fp8", options)
    quantize(tmp_path / "dense", tmp_path / "from_dense", options)
    found, expected = _tensors(tmp_path / "from_fp8"), _tensors(tmp_path / "from_dense")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "from_fp8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"


def test_eight_bits_are_near_the_source(source, tmp_path):
    folder, model = source
    quantize(folder, tmp_path / "out", QuantizeOptions(method="rtn", group_size=32, bits=8))
    ids = some_ids(50, seed=9)
    engine = load_engine(tmp_path / "out", EngineOptions(kv_cache="f32", context=128, **EXACT))
    exact = prefill_logits(model, ids)
    error = (all_logits(engine, ids) - exact).norm() / exact.norm()
    assert 0 < error < 0.02


def test_a_linear_that_stays_fp8_is_refused_by_name(source, tmp_path):
    """Nothing is written; a module of another type may stay dense."""
    folder, _ = source
    leave = QuantizeOptions(method="rtn", group_size=32, overrides=(r".*\.0\.self_attn\.o_proj=dense",))
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.o_proj\.weight: found f8_e4m3, .* no FP8"):
        quantize(folder, tmp_path / "out", leave)
    assert not (tmp_path / "out").exists()


def test_integers_are_refused(tmp_path):
    quant, layer = CASES["int8"]
    make(tmp_path, quant, layer)
    with pytest.raises(
        ConfigError, match=r"already quantized \(compressed-tensors\), expected a dense model, or one of"
    ):
        quantize(tmp_path, tmp_path / "out", OPTIONS)


def test_a_configuration_in_the_text_part_is_not_kept(source, tmp_path):
    """The output says of itself what it is, and nothing else."""
    folder, _ = source
    text = json.loads((folder / "config.json").read_text())
    text["model_type"] = "llama"
    whole = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(whole))
    names = {
        name: ("model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name)
        for name in _tensors(folder)
    }
    save_file({names[name]: tensor for name, tensor in _tensors(folder).items()}, tmp_path / "model.safetensors")
    quantize(tmp_path, tmp_path / "out", OPTIONS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert "quantization_config" not in config["text_config"]
    load_engine(tmp_path / "out", EngineOptions(kv_cache="f32", context=64, device="cpu")).close()
