"""What is read of a peft folder, and what is refused, by name: found and expected."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl.adapters.choice import MAX_ADAPTERS, find_adapters
from exl.adapters.config import AdapterConfig
from exl.adapters.manifest import read_adapter
from exl.errors import CheckpointError, ConfigError, ExlError, UnsupportedModelError
from exl.layout.specs import Target
from exl.planning.from_headers import open_model
from exl.planning.options import EngineOptions, Reading

STORIES = Path(__file__).parents[2] / "data" / "stories260K"
TRAINED = Path(__file__).parents[2] / "data" / "adapter"
CONFIG = json.loads((TRAINED / "adapter_config.json").read_text())
TENSORS = load_file(TRAINED / "adapter_model.safetensors")
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def write(folder: Path, tensors=None, drop=(), **config) -> Path:
    """The trained adapter with changes."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    kept = {name: value for name, value in {**TENSORS, **(tensors or {})}.items() if name not in drop}
    save_file(kept, folder / "adapter_model.safetensors")
    return folder


def read(folder: Path):
    with open_model(STORIES) as files:
        return read_adapter("x", folder, files.manifest)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_terms_of_the_trained_adapter():
    adapter = read(TRAINED)
    assert len(adapter.layers) == 5
    for i, layer in enumerate(adapter.layers):
        q, v = layer["qkv"]
        assert (q.rank, q.start, q.width) == (2, 0, 64)
        assert (v.rank, v.start, v.width) == (3, 96, 32)  # behind q and k
        assert q.scale == pytest.approx((3 if i in (1, 2) else 6) / math.sqrt(2))
        assert v.scale == pytest.approx(6 / math.sqrt(3))
        assert layer.keys() == {"qkv"}
    layout = adapter.layout(Target("cpu"))
    assert layout.num_bytes >= sum(tensor.nbytes for tensor in TENSORS.values())


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({}, 8, 1.0),
        ({"r": 4, "lora_alpha": 32}, 4, 8.0),
        ({"r": 4, "lora_alpha": 32, "use_rslora": True}, 4, 16.0),
        ({"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2}}, 2, 3.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"_proj": 2, "proj": 3}}, 4, 2.0),  # an end behind a dot, or all
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {r"model\.layers\.3\..*": 2, "q_proj": 16}}, 2, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"layers\.[0-4]\.self_attn\.q_proj": 1}}, 4, 0.25),
    ],
)
def test_rank_and_factor(config, rank, scale):
    read = AdapterConfig.from_dict({"peft_type": "LORA", "target_modules": ["q_proj"], **config})
    module = "model.layers.3.self_attn.q_proj"
    assert read.rank_of(module) == rank
    assert read.scale_of(module) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["proj"]}, False),
        ({"target_modules": ["model.layers.3.self_attn.q_proj"]}, True),
        ({"target_modules": r".*\.q_proj"}, True),
        ({"target_modules": r"q_proj"}, False),  # of the whole name
        ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, False),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.3\..*"}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 3]}, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, True),
        ({"target_modules": ["model.layers.3.self_attn.q_proj"], "layers_to_transform": [1]}, True),
        ({"target_modules": r".*\.q_proj", "layers_to_transform": [1]}, True),
    ],
)
def test_which_modules_are_changed(config, changed):
    read = AdapterConfig.from_dict({"peft_type": "LORA", **config})
    assert read.changes("model.layers.3.self_attn.q_proj", 3) is changed


@pytest.mark.parametrize("prefix", ["model.language_model.layers", "language_model.model.layers"])
def test_layers_by_the_names_of_a_model_for_images(prefix, tmp_path):
    """As the adapter of such a model's text part has them; not both names of one module."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    theirs = {name.replace("model.layers", prefix): value for name, value in TENSORS.items()}
    save_file(theirs, tmp_path / "adapter_model.safetensors")
    usual = read(TRAINED)
    for layer, expected in zip(read(tmp_path).layers, usual.layers, strict=True):
        for term, other in zip(layer["qkv"], expected["qkv"], strict=True):
            assert replace(term, a=other.a, b=other.b) == other
            assert term.a.name == other.a.name.replace("model.layers", prefix)
    save_file({**theirs, A0: TENSORS[A0].clone()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj' and 'base_.*which are one module of the"):
        read(tmp_path)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_ways_to_begin_that_leave_the_model_alone(init, tmp_path):
    assert read(write(tmp_path, init_lora_weights=init)).layers


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type: found 'IA3', expected 'LORA'"),
        ({"peft_type": None}, r"peft_type: found None, expected 'LORA'"),
        ({"task_type": "SEQ_CLS"}, r"task_type: found 'SEQ_CLS', expected 'CAUSAL_LM'"),
        ({"use_dora": True}, r"use_dora: found True, expected none"),
        ({"use_qalora": True}, r"use_qalora: found True"),
        ({"bias": "lora_only"}, r"bias: found 'lora_only', expected 'none'"),
        ({"lora_bias": True}, r"lora_bias: found True"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out: found True, expected False"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: found \['lm_head'\], expected none"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights: found 'pissa_niter_4', expected True or False"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication: found \[\[0, 2\]\]"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices: found \[1\]"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, r"target_parameters: found"),
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens: found \[5\]"),
        ({"use_something_new": 1}, r"use_something_new: found 1, expected none: exl does not compute it"),
        ({"r": 0}, r"r: found 0, expected an integer from 1"),
        ({"lora_alpha": "many"}, r"lora_alpha: found 'many', expected a finite number"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern: q_proj: found 0"),
        ({"rank_pattern": {"(": 2}}, r"not a regular expression"),
        ({"target_modules": None}, r"target_modules: found None, expected names of modules"),
        ({"target_modules": 3}, r"target_modules: found 3, expected names of modules"),
        ({"layers_to_transform": ["a"]}, r"layers_to_transform: found \['a'\], expected numbers of layers"),
        (
            {"layers_to_transform": [0], "layers_pattern": "blocks"},
            r"layers_pattern: found 'blocks', expected 'layers'",
        ),
    ],
)
def test_configurations_that_exl_does_not_compute(config, message, tmp_path):
    with pytest.raises(ExlError, match=rf"adapter_config\.json: .*{message}"):
        read(write(tmp_path, **config))


A = torch.ones(2, 64)
A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "drop", "config", "error", "message"),
    [
        ({A0: torch.ones(2, 32)}, (), {}, CheckpointError, r"found shape \[2, 32\].*expected \[2, 64\]"),
        ({A0: torch.ones(4, 64)}, (), {}, CheckpointError, r"found shape \[4, 64\].*expected \[2, 64\]"),
        ({B0: torch.ones(32, 2)}, (), {}, CheckpointError, r"trained for stories260K.*expected \[64, 2\]"),
        ({A0: torch.ones(2, 64).int()}, (), {}, UnsupportedModelError, r"found dtype i32"),
        ({}, (B0,), {}, CheckpointError, r"lora_B'?\.weight is missing"),
        ({}, (A0, B0), {}, CheckpointError, r"lora_A\.weight is missing.*target_modules"),
        ({}, tuple(TENSORS), {"target_modules": ["x"]}, CheckpointError, r"found no tensors"),
        ({}, (), {"target_modules": ["q_proj"]}, CheckpointError, r"v_proj'?, which target_modules.*leave out"),
        ({}, (), {"layers_to_transform": [0, 1, 2]}, CheckpointError, r"layers\.3.*layers_to_transform.*leave out"),
        (
            {Q0.replace(".0.", ".5.") + ".lora_A.weight": A},
            (), {}, CheckpointError, r"found layer 5 of stories260K, the model has 5 layers",
        ),
        ({"base_model.model.lm_head.lora_A.weight": A}, (), {}, UnsupportedModelError, r"lm_head.*none of.*q_proj"),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": A},
            (), {}, UnsupportedModelError, r"a tensor that is of an embedding",
        ),
        ({f"{Q0}.lora_magnitude_vector": torch.ones(64)}, (), {}, UnsupportedModelError, r"of DoRA"),
        ({f"{Q0}.lora_B.bias": torch.ones(64)}, (), {}, UnsupportedModelError, r"a bias \(lora_bias\)"),
        (
            {"base_model.model.lm_head.modules_to_save.weight": A},
            (), {}, UnsupportedModelError, r"a weight of the model itself",
        ),
        ({A0.removeprefix("base_model.model."): A}, (), {}, CheckpointError, r"expected names such as base_"),
        ({f"{Q0}.lora_A.default.weight": A}, (), {}, CheckpointError, r"expected names such as base_model"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(tensors, drop, config, error, message, tmp_path):
    with pytest.raises(error, match=rf"adapter_model\.safetensors: .*{message}"):
        read(write(tmp_path, tensors, drop, **config))


def test_folders_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match=r"adapter_config\.json: cannot be read"):
        read(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: not there"):
        read(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"found adapter_model\.bin, expected .*safe_serialization"):
        read(tmp_path / "a")


def test_a_gpu_refuses_adapters_in_the_plan():
    import exl

    with pytest.raises(ConfigError, match=r"lora: found 'adapter', but adapters are computed on a CPU alone"):
        exl.plan(STORIES, vram="4GB", lora=TRAINED)
    with pytest.raises(ConfigError, match=r"lora: found .* with shape="):
        exl.plan(shape="llama-2-7b", lora=TRAINED)
    assert [line.note for line in exl.plan(STORIES, lora=TRAINED).lines if line.purpose == "adapters"] == ["adapter"]


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_of_adapters(tmp_path):
    other = write(tmp_path / "other")
    one = find_adapters(TRAINED)
    assert (dict(one.folders), one.default) == ({"adapter": TRAINED}, "adapter")
    assert find_adapters(str(other)).default == "other"
    several = find_adapters([TRAINED, other])
    assert (list(several.folders), several.default) == (["adapter", "other"], None)
    named = find_adapters({"b": other, "a": TRAINED})
    assert (dict(named.folders), named.default) == ({"b": other, "a": TRAINED}, None)
    assert find_adapters(None).folders == {}
    with open_model(STORIES, Reading(lora=named.folders)) as files:
        assert [adapter.name for adapter in files.adapters] == ["b", "a"]
    assert EngineOptions(lora=named.folders).reading.lora == named.folders


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (3, ConfigError, r"lora: found 3, expected the folder of an adapter, a list"),
        ([3], ConfigError, r"lora: found 3, expected the folder of an adapter"),
        ("", ConfigError, r"lora: found '', expected the folder"),
        ({"": TRAINED}, ConfigError, r"lora: found an adapter called ''"),
        ({3: TRAINED}, ConfigError, r"lora: found an adapter called 3"),
        ([TRAINED, TRAINED], ConfigError, r"lora: found two adapters called 'adapter'"),
        (
            {str(i): TRAINED for i in range(MAX_ADAPTERS + 1)},
            ConfigError,
            r"lora: found 101 adapters, expected at",
        ),
        ("no such/folder here", CheckpointError, r"no such folder here"),
    ],
)
def test_what_lora_may_not_be(asked, error, message):
    with pytest.raises(error, match=message):
        find_adapters(asked)
