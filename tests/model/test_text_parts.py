"""Folders of models that take images, too: their text part's logits against transformers' for text alone."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import exl
from exl.checkpoint.checkpoint import Checkpoint
from exl.engine.build import load_engine
from exl.families.config import ModelConfig
from exl.planning.options import EngineOptions
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize
from tests.model.cpu_targets import EXACT
from tests.model.cuda_engines import all_logits, some_ids
from tests.model.hf_models import prefill_logits
from tests.model.test_quantize_model import dequantized

_TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_SIGLIP = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
_MROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
WHOLES = {
    "gemma3": (
        transformers.Gemma3Config,
        transformers.Gemma3ForConditionalGeneration,
        {"sliding_window": 16, "query_pre_attn_scalar": 20},
        {**_SIGLIP, "model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4},
    ),
    "mistral3": (
        transformers.Mistral3Config,
        transformers.Mistral3ForConditionalGeneration,
        {"model_type": "mistral"},
        {**_SIGLIP, "model_type": "pixtral", "head_dim": 16},
        {},
    ),
    "llava": (
        transformers.LlavaConfig,
        transformers.LlavaForConditionalGeneration,
        {"model_type": "llama"},
        {**_SIGLIP, "model_type": "clip_vision_model", "projection_dim": 16},
        {},
    ),
    "qwen2_5_vl": (
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLForConditionalGeneration,
        {"rope_parameters": _MROPE},
        _QWEN_VISION,
        {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=WHOLES)
def whole(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    config_class, model_class, text, vision, options = copy.deepcopy(WHOLES[request.param])
    torch.manual_seed(0)
    config = config_class(text_config={**_TEXT, **text}, vision_config=vision, tie_word_embeddings=False, **options)
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "proj" in name:
                parameter.mul_(5.0)
            else:
                parameter.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return model, folder


def _logits(folder: Path, ids: list[int]) -> torch.Tensor:
    engine = load_engine(folder, EngineOptions(device="cpu", kv_cache="f32", context=128))
    return all_logits(engine, ids)


def test_text_alone_is_read_as_by_the_whole(whole):
    model, folder = whole
    ids = some_ids(90, seed=1)
    expected = prefill_logits(model, ids)
    assert expected.std() > 0.5
    assert (_logits(folder, ids) - expected).abs().max() <= 2e-4


def _renamed(name: str, style: str) -> str:
    """A tensor's name as transformers has written it since 4.52, or before; as Qwen2-VL's files have it."""
    inner = re.sub(r"^(model\.language_model|language_model\.model|model)\.(?=layers|embed_tokens|norm)", "", name)
    if inner != name:
        return {"new": "model.language_model.", "old": "language_model.model.", "qwen": "model."}[style] + inner
    if "lm_head" in name:
        return "language_model.lm_head.weight" if style == "old" else "lm_head.weight"
    return name


@pytest.mark.parametrize("style", ["new", "old", "qwen"])
def test_names_of_tensors(style, whole, tmp_path):
    model, folder = whole
    tensors = {_renamed(name, style): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    ids = some_ids(40, seed=2)
    assert (_logits(tmp_path, ids) - prefill_logits(model, ids)).abs().max() <= 2e-4


def test_the_text_part_is_quantized_and_the_rest_is_copied(whole, tmp_path):
    """The padded width of the MLP stands in the text part's own config, and other tensors are as they were."""
    model, folder = copy.deepcopy(whole[0]), whole[1]
    quantize(folder, tmp_path / "out", QuantizeOptions(method="rtn", group_size=64))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["intermediate_size"] == 192
    assert config.get("intermediate_size") is None
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    weights = dequantized(tmp_path / "out")
    assert len(weights) == 14  # two layers
    kept = {name for name in before if name.rpartition(".")[0] not in weights}
    assert kept == {name for name in after if name.rpartition(".")[0] not in weights}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    for name, weight in weights.items():
        module = model.model.language_model.layers.get_submodule(name.partition("layers.")[2])
        N, K = module.weight.shape
        module.weight.data = torch.from_numpy(weight[:N, :K].copy()).float()
        if module.bias is not None:
            module.bias.data = after[f"{name}.bias"].float()
    ids = some_ids(60, seed=3)
    engine = load_engine(tmp_path / "out", EngineOptions(kv_cache="f32", context=128, **EXACT))
    assert (all_logits(engine, ids) - prefill_logits(model, ids)).abs().max() <= 2e-4


@pytest.mark.parametrize("style", ["new", "old", "qwen"])
def test_a_configuration_names_modules_as_the_class_does(style, whole, tmp_path):
    """Files whose tensors transformers has renamed: 8 bits in one layer, under another name than its tensors have."""
    folder = tmp_path / "out"
    quantize(whole[1], folder, QuantizeOptions(method="rtn", group_size=64, overrides=(r".*layers\.1\..*=bits:8",)))
    ids = some_ids(40, seed=4)
    expected = _logits(folder, ids)
    tensors = {_renamed(name, style): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    named = {r"+:model\.language_model\.layers\.1\..*": {"bits": 8}}
    for path in (folder / "config.json", folder / "quantize_config.json"):
        values = json.loads(path.read_text())
        values.get("quantization_config", values)["dynamic"] = named
        path.write_text(json.dumps(values))
    assert torch.equal(_logits(folder, ids), expected)


def test_a_plan_says_that_images_are_not_read(whole):
    plan = exl.plan(whole[1])
    assert any("images are not read" in note.text for note in plan.notes)


def test_a_missing_tensor_of_the_text_part_is_still_an_error(whole, tmp_path):
    _, folder = whole
    with Checkpoint.open(folder) as checkpoint:
        name = next(name for name in checkpoint.tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    tensors = load_file(folder / "model.safetensors")
    foreign = name.replace("down_proj", "other_proj")
    save_file(
        {foreign if key == name else key: value for key, value in tensors.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(exl.CheckpointError, match="down_proj"):
        exl.plan(tmp_path)


def test_a_whole_that_reads_text_in_another_way_is_refused_by_name():
    values = {"model_type": "paligemma", "text_config": {**_TEXT, "model_type": "gemma2"}}
    with pytest.raises(exl.UnsupportedModelError, match="model_type: found 'paligemma', a model with a text part; exl"):
        ModelConfig.from_dict(values)


def test_a_whole_with_another_head_is_refused_by_name(whole):
    values = json.loads((whole[1] / "config.json").read_text())
    values["architectures"] = [values["architectures"][0].replace("ConditionalGeneration", "SequenceClassification")]
    with pytest.raises(
        exl.UnsupportedModelError, match=r"architectures: found '.*ForSequenceClassification', expected"
    ):
        ModelConfig.from_dict(values)


def test_an_unknown_text_part_is_refused_by_its_own_name(whole):
    values = json.loads((whole[1] / "config.json").read_text())
    values["text_config"]["model_type"] = "mamba"
    with pytest.raises(exl.UnsupportedModelError, match="text_config: model_type: found 'mamba', exl has"):
        ModelConfig.from_dict(values)


def test_old_flat_configs_of_qwen2_vl():
    values = {**_TEXT, "model_type": "qwen2_vl", "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    config = ModelConfig.from_dict({**values, "architectures": ["Qwen2VLForConditionalGeneration"]})
    assert (config.family, config.rope.kind, config.is_text_part) == ("qwen2", "default", True)
