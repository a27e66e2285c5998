"""Values of config.json and generation_config.json that files in use have, in all their spellings."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest

import exl
from exl.checkpoint import generation_config
from exl.checkpoint.generation_config import GenerationDefaults
from exl.errors import ConfigError
from exl.families.config import ModelConfig

MODELS = Path(__file__).parents[2] / "data"
LLAMA = json.loads((MODELS / "stories2M" / "config.json").read_text())
LLAMA = {key: value for key, value in LLAMA.items() if not key.startswith("rope_")}
QWEN = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True}
TYPES = ["full_attention", "sliding_attention"] * (LLAMA["num_hidden_layers"] // 2 + 1)
TYPES = TYPES[: LLAMA["num_hidden_layers"]]
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}


def rope(values) -> object:
    return ModelConfig.from_dict(values).rope


# RoPE


@pytest.mark.parametrize("parameters", [PLAIN, YARN], ids=["default", "yarn"])
@pytest.mark.parametrize("types", [None, TYPES, ["full_attention"] * len(TYPES)], ids=["no types", "both", "full only"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rope_nested_by_layer_type_is_read_if_all_layers_have_the_same(parameters, types, key):
    flat = QWEN | {key: parameters, "layer_types": types}
    for nested in (
        {"full_attention": parameters, "sliding_attention": dict(parameters)},
        {"full_attention": parameters},
    ):
        if types is TYPES and len(nested) == 1:
            continue  # layers without one: refused below
        assert rope(flat | {key: nested}) == rope(flat)
    assert rope(flat).theta == parameters["rope_theta"]


def test_rope_of_types_that_no_layer_has_does_not_count():
    nested = {"full_attention": YARN, "sliding_attention": PLAIN}
    values = QWEN | {"layer_types": ["full_attention"] * len(TYPES), "rope_parameters": nested}
    assert rope(values) == rope(QWEN | {"rope_parameters": YARN})


def test_rope_that_differs_by_layer_type_is_each_layers_own():
    nested = {"full_attention": YARN, "sliding_attention": PLAIN}
    config = ModelConfig.from_dict(QWEN | {"layer_types": TYPES, "rope_parameters": nested})
    found = [(layer.attention.rope.kind, layer.attention.rope.theta) for layer in config.layers]
    assert found == [("yarn", 1e6) if kind == "full_attention" else ("default", 5e5) for kind in TYPES]
    assert [rope.kind for rope in config.ropes] == ["yarn", "default"]


def test_a_given_rope_replaces_that_of_full_attention():
    nested = {"full_attention": YARN, "sliding_attention": PLAIN}
    values = QWEN | {"layer_types": TYPES, "rope_parameters": nested, "max_position_embeddings": 512}
    config = ModelConfig.from_dict(values, rope={"rope_type": "linear", "factor": 2.0})
    assert [(rope.kind, rope.theta) for rope in config.ropes] == [("linear", 1e6), ("default", 5e5)]
    assert config.max_position == 512


def test_defaults_beside_nested_rope_count_for_each():
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}
    assert rope(QWEN | {"rope_parameters": nested, "rope_theta": 7e4}).theta == 7e4


@pytest.mark.parametrize(
    ("nested", "error", "said"),
    [
        ({"full_attention": PLAIN}, ConfigError, r"rope_parameters: sliding_attention: found nothing, expected an obj"),
        (
            {"full_attention": PLAIN, "sliding_attention": None},
            ConfigError,
            r"rope_parameters: sliding_attention: found None, expected an object",
        ),
        (
            {"full_attention": PLAIN, "sliding_attention": {"rope_theta": "x"}},
            ConfigError,
            r"rope_parameters: sliding_attention: rope_theta: found 'x'",
        ),
    ],
    ids=["missing", "null", "malformed"],
)
def test_rope_by_layer_type_that_lacks_one_is_refused_by_name(nested, error, said):
    with pytest.raises(error, match=said):
        rope(QWEN | {"layer_types": TYPES, "rope_parameters": nested})


# generation_config.json


@pytest.fixture
def read(tmp_path, caplog):
    """-> (the defaults, the warnings that reading them twice gives)"""

    def write_and_read(**values) -> tuple[GenerationDefaults, list[str]]:
        generation_config._warn_once.cache_clear()
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        with caplog.at_level(logging.WARNING):
            defaults = GenerationDefaults.from_folder(tmp_path)
            assert GenerationDefaults.from_folder(tmp_path) == defaults
        return defaults, [record.getMessage() for record in caplog.records]

    return write_and_read


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.7, "top_k": 20}, {}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 20, "top_p": 0.5}, {}),
        ({"do_sample": None, "temperature": None}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None, "top_k": None}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95}),
        ({"do_sample": True, "top_k": -1}, {"temperature": 1.0, "top_k": 0}),
        ({"do_sample": True, "top_k": 20.0}, {"temperature": 1.0, "top_k": 20}),
        ({"do_sample": True, "top_p": 1, "min_p": 0}, {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}),
        ({"do_sample": True, "typical_p": 0.9}, {"temperature": 1.0, "typical_p": 0.9}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"eos_token_id": [5, -1], "bos_token_id": [3]}, {"eos_ids": (5,), "bos_id": 3}),
    ],
    ids=str,
)
def test_defaults_of_generation(read, values, expected):
    defaults, warnings = read(**values)
    assert defaults == GenerationDefaults(**expected)
    assert warnings == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("temperature", value) for value in (-1, 1000, "0.7", math.nan, [0.7], True)),
        *(("top_k", value) for value in (-2, "40", 1.5, 2**40, 1e300, math.inf)),
        *(("top_p", value) for value in (0, -0.5, 1.5, "x")),
        *(("min_p", value) for value in (-1, 2, {})),
        *(("typical_p", value) for value in (0, 1.5, "x")),
        *(("repetition_penalty", value) for value in (0, -1, 1e9, "1.1")),
        *(("do_sample", value) for value in ("yes", 1)),
        *(("eos_token_id", value) for value in ("</s>", 1.5, [1, "a"])),
        ("bos_token_id", "<s>"),
    ],
)
def test_a_default_that_makes_no_sense_is_ignored_with_one_warning(read, key, value):
    """Any request can be made, and asks for no more than SamplingParams takes."""
    defaults, warnings = read(
        **{"do_sample": True, "temperature": 0.5, "eos_token_id": 7, "bos_token_id": 6, key: value}
    )
    expected = {"temperature": 0.5, "eos_ids": (7,), "bos_id": 6}
    absent = {"temperature": {"temperature": 1.0}, "eos_token_id": {"eos_ids": ()}, "bos_token_id": {"bos_id": None}}
    absent["do_sample"] = {"temperature": None}
    assert defaults == GenerationDefaults(**(expected | absent.get(key, {})))
    (warning,) = warnings
    assert f"generation_config.json: {key}: found {value!r}, expected " in warning
    assert warning.endswith("; it is ignored")


def test_a_request_that_gives_its_own_value_is_not_refused_for_the_files(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "stories260K", folder)
    wrong = {"do_sample": True, "temperature": -3, "top_k": "all", "top_p": 0, "repetition_penalty": 0}
    (folder / "generation_config.json").write_text(json.dumps(wrong))
    with exl.load(folder) as llm:
        own = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 1}
        given = llm.generate("One", 5, **own)
        assert given.num_tokens == llm.generate("One", 5, seed=1).num_tokens == 5


# Other values


def test_numbers_in_errors_are_as_the_file_has_them():
    for key, value in (("vocab_size", 99999999), ("hidden_size", 16777217), ("max_position_embeddings", 1073741825)):
        with pytest.raises(ConfigError, match=rf"{key}: found {value}, expected an integer from 1 to \d+$"):
            ModelConfig.from_dict(LLAMA | {key: value})
    rope_parameters = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.2345678,
        "high_freq_factor": 1.2345678,
    }
    with pytest.raises(
        ConfigError, match=r"high_freq_factor: found 1\.2345678, .* other than low_freq_factor, 1\.2345678$"
    ):
        ModelConfig.from_dict(LLAMA | {"rope_parameters": rope_parameters})


@pytest.mark.parametrize(
    ("values", "given", "max_position"),
    [
        (LLAMA, YARN, 512),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_theta": 7.0}, YARN, 512),
        (LLAMA | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, YARN, 512),
        (QWEN | {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}}, YARN, 512),
    ],
)
def test_a_given_rope_takes_the_place_of_the_files(values, given, max_position):
    values = values | {"max_position_embeddings": 100}
    found = ModelConfig.from_dict(values, rope=given)
    plain = {key: value for key, value in values.items() if not key.startswith("rope_")}
    assert found.rope == rope(plain | {"rope_parameters": given})
    assert found.max_position == max_position


def test_what_a_given_rope_does_not_say_of_the_model_is_the_files():
    own = {"rope_theta": 7e4, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64}
    scaled = LLAMA | {"max_position_embeddings": 256, "rope_parameters": own | {"rope_type": "yarn", "factor": 4.0}}
    found = ModelConfig.from_dict(scaled, rope={"rope_type": "linear", "factor": 8.0})
    assert (found.rope.kind, found.rope.theta, found.rope.partial_rotary_factor) == ("linear", 7e4, 0.5)
    assert found.max_position == 512
    found = ModelConfig.from_dict(scaled, rope={"rope_theta": 5.0})
    assert (found.rope.kind, found.rope.factor, found.rope.theta, found.max_position) == ("yarn", 4.0, 5.0, 256)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"^rope: found \{\}, expected a dict such as"),
        ("yarn", r"^rope: found 'yarn', expected a dict such as"),
        ({"rope_typ": "yarn"}, r"^rope: found the key 'rope_typ', expected rope_type, type, rope_theta, "),
        ({"factor": 2.0}, r"^rope: found 'factor' without 'rope_type', expected one of default, linear, "),
        ({"rope_type": "linear"}, r"^rope: factor: found nothing, expected a number"),
        ({"rope_type": "linear", "factor": -2}, r"^rope: factor: found -2, expected a finite number above 0"),
        ({"rope_type": "su"}, r"^rope: rope_type: found 'su', expected one of default"),
        ({"rope_type": "linear", "factor": 1e9}, r"^rope: factor: found 1000000000.0, expected at most 1073741824 pos"),
        ({"rope_theta": "x"}, r"^rope: rope_theta: found 'x', expected a finite number above 0"),
        (
            {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
            r"^rope: rope_theta: found 1.0, expected a number",
        ),
    ],
)
def test_a_wrong_given_rope_is_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(LLAMA, rope=given)
