"""Configuration files of damaged or hostile checkpoints: each key with values of wrong type, wrong size or no sense.

Reading a config succeeds, or raises an ``ExlError`` that names the file and the key. Nothing else is raised and
nothing hangs.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exl.checkpoint.config_reader import read_json
from exl.checkpoint.generation_config import GenerationDefaults
from exl.checkpoint.quant.gptq import GptqConfig
from exl.checkpoint.quant_config import read_quant_config
from exl.errors import ConfigError, ExlError, UnsupportedModelError
from exl.families.config import ModelConfig

SETTINGS = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MODELS = Path(__file__).parents[2] / "data"

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
NOT_NUMBERS = st.sampled_from(["4", "", [4], {"4": 4}, True, False, [], {}, "NaN"])
EXTREMES = st.sampled_from([0, -1, -(2**63), 2**31, 2**63, 2**64, 10**40, 1e300, -1e300, math.inf, -math.inf, math.nan])
TOO_DEEP = json.loads("[" * 500 + "]" * 500)


def write(folder, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- quantize_config.json --------------------------------------------------------------------------------------------

QUANT = {
    **{"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False, "quant_method": "gptq"},
    **{"checkpoint_format": "gptq", "pack_dtype": "int32", "is_marlin_format": False},
}
FLAGS = ("desc_act", "sym", "lm_head", "is_marlin_format")
TEXTS = ("quant_method", "checkpoint_format", "pack_dtype", "method", "format")


def quant_verdict(folder, values) -> GptqConfig | str:
    """The config, or the error's message. Never None, because the file exists."""
    write(folder, "quantize_config.json", json.dumps(values))
    try:
        config = read_quant_config(folder, {})
    except (ConfigError, UnsupportedModelError) as error:
        message = str(error)
    else:
        assert isinstance(config, GptqConfig)
        return config
    assert len(message) < 800
    return message


def assert_sane(config: GptqConfig) -> None:
    assert config.bits in (2, 3, 4, 8)
    assert config.group_size == -1 or 0 < config.group_size <= 1 << 24
    assert all(isinstance(flag, bool) for flag in (config.desc_act, config.sym, config.lm_head))
    assert config.checkpoint_format in ("gptq", "gptq_v2", "gptq_p")


@pytest.mark.parametrize("key", ["bits", "group_size"])
@SETTINGS
@given(value=NOT_NUMBERS | EXTREMES.filter(lambda value: value != -1))
def test_numbers_of_a_quant_config(tmp_path, key, value):
    message = quant_verdict(tmp_path, QUANT | {key: value})
    assert isinstance(message, str), message
    assert message.startswith(f"quantize_config.json: {key}: found ")


@pytest.mark.parametrize("key", FLAGS)
@SETTINGS
@given(value=JUNK.filter(lambda value: value is not None and not isinstance(value, bool)))
def test_flags_of_a_quant_config(tmp_path, key, value):
    message = quant_verdict(tmp_path, QUANT | {key: value})
    assert isinstance(message, str)
    assert message.startswith(f"quantize_config.json: {key}: found ")
    assert message.endswith("expected true or false")


@pytest.mark.parametrize("key", TEXTS)
@SETTINGS
@given(value=JUNK.filter(lambda value: value is not None))
def test_texts_of_a_quant_config(tmp_path, key, value):
    values = {k: v for k, v in QUANT.items() if key != "format" or k != "checkpoint_format"}
    message = quant_verdict(tmp_path, values | {key: value})
    assert isinstance(message, str)
    assert message.startswith(f"quantize_config.json: {key}: found ")


@SETTINGS
@given(pattern=st.text("ab.*+?()[]{}|^$\\-:0123,<>=!P", max_size=20), value=JUNK)
def test_rules_of_a_quant_config(tmp_path, pattern, value):
    verdict = quant_verdict(tmp_path, QUANT | {"dynamic": {pattern: value}})
    if isinstance(verdict, str):
        assert verdict.startswith("quantize_config.json: dynamic: ")
        return
    assert_sane(verdict)
    for name in ("", "a", "ab" * 30, "model.layers.0.mlp.up_proj"):
        own = verdict.for_module(name)
        assert own is None or own.bits == 4


@SETTINGS
@given(values=st.dictionaries(st.sampled_from([*QUANT, "dynamic", "w_bit", "adapter", "version"]) | st.text(), JUNK))
def test_quant_configs_of_anything(tmp_path, values):
    verdict = quant_verdict(tmp_path, values)
    if isinstance(verdict, str):
        assert verdict.startswith("quantize_config.json: ")
    else:
        assert_sane(verdict)


METHODS = {
    "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"]},
    "auto-round": {
        **{"bits": 4, "group_size": 128, "sym": False, "data_type": "int", "packing_format": "auto_round"},
        **{"block_name_to_quantize": "model.layers", "extra_config": {"lm_head": {"bits": 8}}},
    },
    "compressed-tensors": {
        **{"format": "pack-quantized", "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}},
        "config_groups": {
            "group_0": {
                **{"targets": ["Linear"], "input_activations": None, "format": None},
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
            }
        },
    },
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
}


@pytest.mark.parametrize("method", METHODS)
@SETTINGS
@given(data=st.data())
def test_configs_of_other_methods_with_anything_in_them(tmp_path, method, data):
    """At any depth: an error that names the file, or a configuration that answers for any module."""
    values = json.loads(json.dumps(METHODS[method])) | {"quant_method": method}
    place = values
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
        else:
            place[key] = data.draw(JUNK | EXTREMES)
            break
    write(tmp_path, "quantize_config.json", json.dumps(values))
    try:
        config = read_quant_config(tmp_path, {})
    except (ConfigError, UnsupportedModelError) as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 800
    if message:
        assert message.startswith("quantize_config.json: ")
        return
    for name in ("", "lm_head", "model.layers.0.mlp.up_proj", "ab" * 30):
        for own in (config.for_module(name), config.for_quantized(name)):
            assert own is None or own.bits in (2, 3, 4, 8)
    assert isinstance(config.layout, str)


@pytest.mark.parametrize("key", [*QUANT, "dynamic"])
def test_deeply_nested_values_of_a_quant_config(tmp_path, key):
    message = quant_verdict(tmp_path, QUANT | {key: TOO_DEEP})
    assert isinstance(message, str)
    assert message.startswith(f"quantize_config.json: {key}: found [[[")


def test_every_quant_config_that_is_cut_off(tmp_path):
    text = json.dumps(QUANT)
    for length in range(len(text)):
        write(tmp_path, "quantize_config.json", text[:length])
        with pytest.raises(ConfigError, match=r"quantize_config\.json: not valid JSON"):
            read_quant_config(tmp_path, {})


# --- any JSON file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 100_000 + "}", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        ("[1, 2]", r"found a JSON list, expected an object"),
        ("null", r"found a JSON NoneType, expected an object"),
        ('"text"', r"found a JSON str, expected an object"),
        ("NaN", r"found a JSON float, expected an object"),
    ],
)
def test_files_that_are_no_json_object(tmp_path, text, message):
    write(tmp_path, "config.json", text)
    for read in (ModelConfig.from_folder, lambda folder: read_json(folder / "config.json")):
        with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
            read(tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read: No such file"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: "):
        ModelConfig.from_folder(tmp_path)


def test_a_json_file_of_endless_size(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(ConfigError, match=r"config\.json: 17179869184 bytes, expected at most"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_named_pipes_do_not_block(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name}: "):
        ModelConfig.from_folder(tmp_path) if name == "config.json" else read_quant_config(tmp_path, {})


# --- config.json -----------------------------------------------------------------------------------------------------

LLAMA = json.loads((MODELS / "stories2M" / "config.json").read_text())
QWEN = LLAMA | {
    **{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
    **{"sliding_window": 64, "max_window_layers": 2},
}
YARN = LLAMA | {
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32, "beta_slow": 1}
}
LLAMA3 = LLAMA | {
    "rope_parameters": {
        **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 128,
    }
}
SIZES = (
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("vocab_size", "max_position_embeddings"),
)
ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def model_verdict(values) -> ModelConfig | str:
    try:
        config = ModelConfig.from_dict(values, "config.json")
    except ExlError as error:
        message = str(error)
    else:
        assert_sane_model(config)
        return config
    assert message.startswith("config.json: ")
    assert len(message) < 800
    return message


def assert_sane_model(config: ModelConfig) -> None:
    """Checks what all later code relies on: bounded sizes, numbers that are finite."""
    sizes = (config.hidden_size, config.intermediate_size, config.num_layers, config.vocab_size, config.max_position)
    assert all(isinstance(size, int) and 0 < size <= 1 << 30 for size in sizes)
    assert config.num_heads % config.num_kv_heads == 0
    assert config.head_dim % 2 == 0
    assert len(config.windows) == config.num_layers
    assert all(window is None or window > 0 for window in config.windows)
    rope = config.rope
    assert all(map(math.isfinite, (config.norm.eps, rope.theta, rope.factor, rope.partial_rotary_factor)))
    assert rope.theta > 0
    assert rope.factor > 0
    assert all(isinstance(i, int) and i >= 0 for i in config.eos_ids)


def test_the_bases_themselves_load():
    for values in (LLAMA, QWEN, YARN, LLAMA3):
        assert isinstance(model_verdict(values), ModelConfig)


@pytest.mark.parametrize("key", SIZES)
@SETTINGS
@given(value=NOT_NUMBERS | EXTREMES | st.floats())
def test_sizes_of_a_model_config(key, value):
    message = model_verdict(LLAMA | {key: value})
    if isinstance(message, ModelConfig):
        assert key == "max_position_embeddings", "only a length may be as large as 2^30"
        assert value <= 1 << 30
    else:
        assert f": {key}: " in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_dim": 15}, r"head_dim: found 15, expected an even number: rotary channels come in pairs$"),
        (
            {"hidden_size": 60},
            r"head_dim: found nothing, expected an even .*; hidden_size / num_attention_heads is 15$",
        ),
    ],
    ids=["given", "derived"],
)
def test_odd_head_sizes(values, message):
    base = {name: value for name, value in LLAMA.items() if name != "head_dim"}
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(base | {"num_attention_heads": 4, "num_key_value_heads": 4} | values)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@SETTINGS
@given(value=st.sampled_from(["1", [1], {}, True, -1.0, math.nan, math.inf, -math.inf, 1e300, 10**400]))
def test_numbers_of_a_model_config(key, value):
    values = {k: v for k, v in LLAMA.items() if k != "rope_parameters"} | {key: value}
    message = model_verdict(values)
    assert isinstance(message, str)
    assert f": {key}: " in message


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "tie_word_embeddings"])
@SETTINGS
@given(value=JUNK.filter(lambda value: value is not None and not isinstance(value, bool)))
def test_flags_of_a_model_config(key, value):
    message = model_verdict(LLAMA | {key: value})
    assert isinstance(message, str)
    assert f": {key}: found " in message


@pytest.mark.parametrize("key", ["model_type", "hidden_act"])
@SETTINGS
@given(value=JUNK.filter(lambda value: value is not None))
def test_texts_of_a_model_config(key, value):
    message = model_verdict(LLAMA | {key: value})
    assert isinstance(message, str)
    assert f": {key}: found " in message


@pytest.mark.parametrize("base", [YARN, LLAMA3], ids=["yarn", "llama3"])
@pytest.mark.parametrize("key", ROPE_NUMBERS)
@SETTINGS
@given(value=NOT_NUMBERS | EXTREMES | st.floats(allow_nan=False))
def test_numbers_of_rope(base, key, value):
    message = model_verdict(base | {"rope_parameters": base["rope_parameters"] | {key: value}})
    if isinstance(value, str | list | dict | bool) or value != value or abs(value) == math.inf:
        read_there = base is LLAMA3 or key not in ("low_freq_factor", "high_freq_factor")
        assert isinstance(message, str) or not read_there
    if isinstance(message, str):
        assert "rope_parameters" in message


@SETTINGS
@given(
    values=st.dictionaries(st.sampled_from([*QWEN, "layer_types", "rope_scaling", "sliding_window"]), JUNK, max_size=4)
)
def test_model_configs_of_anything(values):
    for base in (LLAMA, QWEN, YARN):
        model_verdict(base | values)
    model_verdict(values)


@pytest.mark.parametrize("key", [*QWEN, "layer_types", "rope_scaling"])
def test_deeply_nested_values_of_a_model_config(key):
    verdict = model_verdict(QWEN | {key: TOO_DEEP})
    assert isinstance(verdict, ModelConfig) or key in verdict


@SETTINGS
@given(values=st.dictionaries(st.sampled_from(["eos_token_id", "do_sample", "temperature", "top_k", "top_p"]), JUNK))
def test_generation_configs_of_anything(tmp_path, values):
    write(tmp_path, "generation_config.json", json.dumps(values))
    try:
        defaults = GenerationDefaults.from_folder(tmp_path)
    except ConfigError as error:
        message = str(error)
    else:
        for value in (defaults.temperature, defaults.top_p, defaults.repetition_penalty):
            assert value is None or math.isfinite(value)
        return
    assert "generation_config.json: " in message
