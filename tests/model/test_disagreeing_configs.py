"""quantize_config.json, quant_config.json and config.json that disagree: logits are transformers' or an error says so.

Models are packed by ``tests/reference/plain_packer.py``, which knows the format from its description alone.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from exl.checkpoint.quant.gptq import GptqConfig
from exl.engine.build import load_engine
from exl.errors import CheckpointError, ConfigError, ExlWarning, UnsupportedModelError
from exl.ops.cpu_target import cpu_target
from exl.planning.from_headers import open_model
from exl.planning.options import EngineOptions
from tests.model.cuda_engines import all_logits, some_ids
from tests.model.hf_models import prefill_logits
from tests.model.test_quantized import make

TOLERANCE = 2e-4
IDS = some_ids(24)
CONFIG, QUANTIZE, QUANT = "config.json", "quantize_config.json", "quant_config.json"
SOURCES = {
    CONFIG: r"config\.json: quantization_config",
    QUANTIZE: r"quantize_config\.json",
    QUANT: r"quant_config\.json",
}

MODELS = {
    "v1": {"bits": 4, "group_size": 32},
    "v1-sym": {"bits": 4, "group_size": 32, "sym": True},
    "v2-sym": {"bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"},
    "v2": {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    "order": {"bits": 4, "group_size": 32, "order": "shared"},
    "8-bit-one-group": {"bits": 8, "group_size": -1},
    "3-bit": {"bits": 3, "group_size": 32},
    "dynamic": {"bits": 4, "group_size": 32, "dynamic": {"+:.*down_proj": {"bits": 8}}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function: name -> (folder, what its config.json says of the quantization, transformers' logits)."""
    made = {}

    def get(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = make(folder, **MODELS[name])
            stated = json.loads((folder / CONFIG).read_text())["quantization_config"]
            made[name] = folder, stated, prefill_logits(model, IDS)
        return made[name]

    return get


def with_configs(source: Path, folder: Path, said: dict[str, dict]) -> Path:
    """The same weights; ``said``: what each file says of the quantization."""
    folder.mkdir()
    shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    config = json.loads((source / CONFIG).read_text())
    del config["quantization_config"]
    for name, values in said.items():
        if name == CONFIG:
            config["quantization_config"] = values
        else:
            (folder / name).write_text(json.dumps(values))
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def logits(folder: Path) -> torch.Tensor:
    arithmetic = "f32" if cpu_target().compiled else None
    engine = load_engine(folder, EngineOptions(kv_cache="f32", context=64, arithmetic=arithmetic))
    found = all_logits(engine, IDS)
    engine.close()
    return found


def quant_of(folder: Path) -> GptqConfig:
    with open_model(folder) as files:
        return files.quant


PLACES = [(QUANTIZE, CONFIG), (CONFIG, QUANTIZE), (QUANT, CONFIG), (QUANTIZE, QUANT)]


@pytest.mark.parametrize(("wrong", "right"), PLACES)
@pytest.mark.parametrize(
    ("model", "lie"),
    [
        ("v1", {"bits": 8}),
        ("v1", {"bits": 3}),
        ("8-bit-one-group", {"bits": 4}),
        ("3-bit", {"bits": 4}),
        ("v1", {"group_size": 16}),
        ("v1", {"group_size": -1}),
        ("v1", {"group_size": 128}),
        ("8-bit-one-group", {"group_size": 32}),
        ("v1", {"bits": 2, "group_size": 64}),
        ("v1-sym", {"checkpoint_format": "gptq_v2"}),
        ("v2-sym", {"checkpoint_format": "gptq"}),
        ("v1", {"sym": True}),
        ("v1-sym", {"sym": False}),
        ("v2-sym", {"sym": False}),
        ("v2-sym", {"sym": False, "checkpoint_format": "gptq", "bits": 8}),
        ("dynamic", {"dynamic": {"+:.*up_proj": {"bits": 8}}}),
        ("dynamic", {"dynamic": {"+:.*down_proj": {"bits": 4}}}),
    ],
    ids=str,
)
def test_the_tensors_decide(models, tmp_path, model, lie, wrong, right):
    source, stated, expected = models(model)
    folder = with_configs(source, tmp_path / "model", {wrong: stated | lie, right: stated})
    fields = "|".join(lie)
    message = rf"files disagree .*going by the tensors: .*({fields}): found .* in {SOURCES[wrong]}"
    with pytest.warns(ExlWarning, match=message) as caught:
        found = logits(folder)
    assert len(caught) == 1
    assert (found - expected).abs().max() <= TOLERANCE
    with pytest.warns(ExlWarning, match=message):
        quant = quant_of(folder)
    assert quant.others == ()
    for key in lie.keys() - {"dynamic"}:
        assert getattr(quant, key) == stated[key]


@pytest.mark.parametrize(("wrong", "right"), PLACES[:2])
@pytest.mark.parametrize(
    ("model", "lie"), [("order", {"desc_act": False}), ("v1", {"desc_act": True}), ("v1", {"lm_head": True})], ids=str
)
def test_what_the_tensors_always_decide_is_no_disagreement(models, tmp_path, model, lie, wrong, right):
    source, stated, expected = models(model)
    folder = with_configs(source, tmp_path / "model", {wrong: stated | lie, right: stated})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (logits(folder) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("one", "other"), PLACES[:2])
@pytest.mark.parametrize("left_out", ["checkpoint_format", "sym", "dynamic", "bits", "group_size"])
@pytest.mark.parametrize("model", ["v2", "dynamic"])
def test_what_one_file_leaves_out_another_says(models, tmp_path, model, left_out, one, other):
    source, stated, expected = models(model)
    partial = {key: value for key, value in stated.items() if key != left_out}
    folder = with_configs(source, tmp_path / "model", {one: partial, other: stated})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (logits(folder) - expected).abs().max() <= TOLERANCE


def test_values_that_are_right_in_different_files(models, tmp_path):
    source, stated, expected = models("v1")
    said = {QUANTIZE: stated | {"bits": 8}, CONFIG: stated | {"group_size": 16}, QUANT: stated | {"sym": True}}
    with pytest.warns(ExlWarning, match=r"bits: found 8 in .*, taking 4; group_size: .*, taking 32; sym: .*false"):
        found = logits(with_configs(source, tmp_path / "model", said))
    assert (found - expected).abs().max() <= TOLERANCE


# --- what cannot be decided ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said", "message"),
    [
        (
            "v1",
            [{}, {"checkpoint_format": "gptq_v2"}],
            r"checkpoint_format: found gptq in quantize_config\.json and gptq_v2 in config\.json: quantization_config; "
            r"the zeros are not symmetric, so that they cannot tell",
        ),
        (
            "v2",
            [{"checkpoint_format": "gptq"}, {}],
            r"checkpoint_format: found gptq in .* and gptq_v2 in .*cannot tell",
        ),
        (
            "v1",
            [{"bits": 8}, {"bits": 2}],
            r"bits: found 8 in quantize_config\.json and 2 in config\.json: quantization_config; "
            r"the tensors of model\.layers\.0\.mlp\.down_proj have 4 bits and 96 inputs in 3 groups$",
        ),
        (
            "v1",
            [{"group_size": 16}, {"group_size": 64}],
            r"group_size: found 16 in quantize_config\.json and 64 in config\.json: .* 96 inputs in 3 groups$",
        ),
    ],
)
@pytest.mark.parametrize("first", [QUANTIZE, QUANT])
def test_one_error_names_both_files_the_field_and_both_values(models, tmp_path, model, said, message, first):
    source, stated, _ = models(model)
    folder = with_configs(source, tmp_path / "model", {first: stated | said[0], CONFIG: stated | said[1]})
    with pytest.raises(ConfigError, match=message.replace(SOURCES[QUANTIZE], SOURCES[first])) as caught:
        quant_of(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lie", "error", "message"),
    [
        (
            {"quant_method": "hqq"},
            UnsupportedModelError,
            r"quant_method: found 'hqq'.*; quantize_config\.json beside it",
        ),
        (
            {"quant_method": "awq", "checkpoint_format": None, "version": "gemm", "zero_point": True},
            ConfigError,
            r"gptq.*awq|awq.*gptq",
        ),
        ({"checkpoint_format": "marlin"}, UnsupportedModelError, r"found 'marlin'.*; quantize_config\.json beside it"),
        ({"bits": "four"}, ConfigError, r"quantization_config: bits: found 'four'.*; quantize_config\.json beside it"),
    ],
)
def test_a_file_that_exl_does_not_read_beside_one_that_it_does(models, tmp_path, lie, error, message):
    source, stated, _ = models("v1")
    folder = with_configs(source, tmp_path / "model", {QUANTIZE: stated, CONFIG: stated | lie})
    with pytest.raises(error, match=message):
        quant_of(folder)


# --- one file alone that the tensors contradict ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, QUANTIZE, QUANT])
@pytest.mark.parametrize(
    ("model", "lie", "message"),
    [
        ("v1", {"bits": 8}, r"at 8 bits|and 8 bits"),
        ("v1", {"bits": 2}, r"and 2 bits"),
        ("v1", {"bits": 3}, r"at 3 bits"),
        ("8-bit-one-group", {"bits": 4}, r"and 4 bits"),
        ("v1", {"group_size": 16}, r"group size 16 and"),
        ("v1", {"group_size": -1}, r"group size -1 and"),
        ("v1", {"group_size": 64}, r"group size 64 and"),
    ],
)
def test_one_file_that_the_shapes_contradict_is_named(models, tmp_path, name, model, lie, message):
    source, stated, _ = models(model)
    folder = with_configs(source, tmp_path / "model", {name: stated | lie})
    true = {"v1": r"4 bits and 64 inputs in 2 groups", "8-bit-one-group": r"8 bits and 64 inputs in 1 group"}[model]
    with pytest.raises(CheckpointError, match=rf"({message}).*\({SOURCES[name]}\); the shapes of all.* {true}"):
        quant_of(folder)


def test_one_file_whose_group_size_g_idx_contradicts(tmp_path):
    """64 inputs in groups of 48 or 32 are two groups each: g_idx has 32 in the first."""
    make(tmp_path / "model", 4, 32, order="shared")
    config = json.loads((tmp_path / "model" / CONFIG).read_text())
    config["quantization_config"]["group_size"] = 48
    (tmp_path / "model" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"g_idx: found 32 inputs in group 0, expected 48 .*quantization_config has"
    ):
        quant_of(tmp_path / "model")


def test_groups_of_equal_number_are_told_by_g_idx(models, tmp_path):
    """64 inputs in groups of 48 or 32 are two groups each, 96 inputs three or two. g_idx tells where shapes do not."""
    source, stated, expected = models("order")
    folder = with_configs(source, tmp_path / "model", {QUANTIZE: stated | {"group_size": 40}, CONFIG: stated})
    with pytest.warns(ExlWarning, match="group_size: found 40 in .* taking 32"):
        assert (logits(folder) - expected).abs().max() <= TOLERANCE


def test_asymmetric_zeros_in_the_wrong_format_are_rubbish(models, tmp_path):
    """What all this is for: nothing in such a file shows that its only configuration is wrong."""
    source, stated, expected = models("v1")
    folder = with_configs(source, tmp_path / "model", {CONFIG: stated | {"checkpoint_format": "gptq_v2"}})
    assert (logits(folder) - expected).abs().max() > 1
