"""Quantization configs as AutoGPTQ, GPTQModel and others write them, and the rules for single modules."""

from __future__ import annotations

import json
import random
import re

import pytest

from exl.checkpoint.module_pattern import ModuleMatcher, ModulePattern
from exl.checkpoint.quant.gptq import GptqConfig
from exl.checkpoint.quant_config import parse_quant_config, read_quant_config
from exl.errors import ConfigError, UnsupportedModelError

SOURCE = "quantize_config.json"
BASE = {"bits": 4, "group_size": 128}
AUTOGPTQ = {  # as AutoGPTQ 0.4 writes it
    **{"bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": True, "static_groups": False, "sym": True},
    **{"true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model"},
}
GPTQMODEL = {  # as GPTQModel writes it into config.json
    **{"bits": 4, "checkpoint_format": "gptq_v2", "desc_act": False, "group_size": 32, "lm_head": True},
    **{"pack_dtype": "int32", "quant_method": "gptq", "sym": False},
    "dynamic": {r"-:.*\.0\..*": {}, r"+:.*\.1\..*": {"bits": 8}},
    "meta": {"damp_percent": 0.05, "quantizer": ["gptqmodel:5.0.0"], "static_groups": False},
}


def parse(values, source=SOURCE):
    return parse_quant_config(values, source)


def of(config: GptqConfig) -> tuple:
    return (config.bits, config.group_size, config.desc_act, config.sym, config.checkpoint_format, config.lm_head)


def test_a_file_of_autogptq():
    assert of(parse(AUTOGPTQ)) == (4, 128, True, True, "gptq", False)


def test_a_config_of_gptqmodel():
    config = parse(GPTQMODEL)
    assert of(config) == (4, 32, False, False, "gptq_v2", True)
    assert config.for_module("model.layers.0.mlp.up_proj") is None
    assert config.for_module("model.layers.1.mlp.up_proj").bits == 8
    assert config.for_module("model.layers.2.mlp.up_proj").bits == 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (BASE, (4, 128, False, True, "gptq", False)),
        ({"w_bit": 3, "q_group_size": -1}, (3, -1, False, True, "gptq", False)),
        ({"wbits": 2, "group_size": 64, "sym": None, "desc_act": None}, (2, 64, False, True, "gptq", False)),
        (BASE | {"format": "GPTQ_V2", "method": "GPTQ"}, (4, 128, False, True, "gptq_v2", False)),
        (BASE | {"checkpoint_format": "gptq", "format": "gptq"}, (4, 128, False, True, "gptq", False)),
        (BASE | {"bits": 8, "w_bit": 8, "pack_dtype": "torch.int32"}, (8, 128, False, True, "gptq", False)),
    ],
)
def test_key_names_of_several_quantizers(values, expected):
    assert of(parse(values)) == expected


# --- which file ----------------------------------------------------------------------------------------------------


def test_files_are_asked_in_autogptqs_order(tmp_path):
    config_json = {"quantization_config": BASE | {"bits": 2}}
    assert read_quant_config(tmp_path, {}) is None
    assert read_quant_config(tmp_path, {"quantization_config": None}) is None
    config = read_quant_config(tmp_path, config_json)
    assert (config.bits, config.source) == (2, "config.json: quantization_config")
    (tmp_path / "quant_config.json").write_text(json.dumps(BASE | {"bits": 3}))
    config = read_quant_config(tmp_path, config_json)
    assert (config.bits, config.source) == (3, "quant_config.json")
    (tmp_path / "quantize_config.json").write_text(json.dumps(BASE | {"bits": 8}))
    config = read_quant_config(tmp_path, config_json)
    assert (config.bits, config.source) == (8, "quantize_config.json")


def test_what_files_say_differently_is_kept_and_what_they_say_alike_is_not(tmp_path):
    """Also equal patterns: two parses of one regular expression are equal."""
    rules = {"dynamic": {r"-:.*\.0\..*": {}, r"+:.*\.1\..*": {"bits": 8}}}
    (tmp_path / "quantize_config.json").write_text(json.dumps(BASE | rules | {"desc_act": True}))
    config = read_quant_config(tmp_path, {"quantization_config": BASE | rules | {"lm_head": True}})
    assert (config.others, config.lm_head, len(config.rules)) == ((), True, 2)
    rules["dynamic"][r"+:.*\.1\..*"] = {"bits": 2}
    config = read_quant_config(tmp_path, {"quantization_config": BASE | rules | {"sym": False}})
    (other,) = config.others
    assert (config.sym, other.sym, other.rules[1].bits, other.source) == (
        False, False, 2, "config.json: quantization_config",
    )  # fmt: skip


def test_a_file_that_cannot_be_read_is_not_taken_for_absent(tmp_path):
    (tmp_path / "quantize_config.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(ConfigError, match=r"quantize_config\.json"):
        read_quant_config(tmp_path, {"quantization_config": BASE})


def test_a_text_part_may_have_it_in_its_own_config(tmp_path):
    config = read_quant_config(tmp_path, {"model_type": "llava", "text_config": {"quantization_config": BASE}})
    assert of(config) == (4, 128, False, True, "gptq", False)
    assert config.source == "config.json: text_config: quantization_config"
    both = {"text_config": {"quantization_config": BASE}, "quantization_config": BASE | {"bits": 8}}
    config = read_quant_config(tmp_path, both)
    assert (config.bits, [other.bits for other in config.others]) == (8, [4])
    with pytest.raises(UnsupportedModelError, match="text_config: quantization_config: quant_method: found 'hqq'"):
        read_quant_config(tmp_path, {"text_config": {"quantization_config": {"quant_method": "hqq"}}})


# --- refused by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (BASE | {"quant_method": "marlin"}, r"quant_method: found 'marlin'"),
        (BASE | {"is_marlin_format": True}, r"is_marlin_format: found true"),
        (
            BASE | {"checkpoint_format": "marlin"},
            r"checkpoint_format: found 'marlin', exl reads gptq and gptq_v2 and",
        ),
        (BASE | {"format": "bitblas"}, r"format: found 'bitblas'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quant_method: found 'bitsandbytes'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, r"found a bitsandbytes configuration"),
        ({"quant_method": "exl2", "bits": 4.25}, r"quant_method: found 'exl2'"),
        ({"quant_method": "exl3"}, r"quant_method: found 'exl3'"),
        (BASE | {"method": "qqq"}, r"method: found 'qqq'"),
        (BASE | {"bits": 5}, r"bits: found 5, exl has \(2, 3, 4, 8\)"),
        (BASE | {"bits": 16}, r"bits: found 16"),
        (BASE | {"pack_dtype": "int16"}, r"pack_dtype: found 'int16', exl reads int32"),
        (BASE | {"rotation": "hadamard"}, r"rotation: found 'hadamard': rotated weights"),
        (BASE | {"adapter": {"rank": 32}}, r"adapter: found \{'rank': 32\}"),
        (BASE | {"dynamic": {"+:x": {"pack_dtype": "int8"}}}, r"dynamic: '\+:x': pack_dtype: found 'int8'"),
        (BASE | {"dynamic": {"+:x": {"bits": 6}}}, r"dynamic: '\+:x': bits: found 6"),
        (BASE | {"dynamic": {"+:x": {"format": "marlin"}}}, r"dynamic: '\+:x': format: found 'marlin'"),
        (BASE | {"dynamic": {"x": {"format": "gptq_v2"}}}, r"dynamic: 'x': found gptq_v2 in a file of gptq"),
        (BASE | {"dynamic": {"x": {"codebook": 3}}}, r"dynamic: 'x': 'codebook': an override that exl does not know"),
    ],
)
def test_other_quantizations_are_refused_by_name(values, message):
    with pytest.raises(UnsupportedModelError, match=rf"^quantize_config\.json: {message}"):
        parse(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 128}, r"found no bits"),
        ({"bits": 4}, r"found no group_size"),
        (BASE | {"bits": "4"}, r"bits: found '4', expected one of \(2, 3, 4, 8\)"),
        (BASE | {"bits": True}, r"bits: found True"),
        (BASE | {"bits": 4.0}, r"bits: found 4\.0"),
        (BASE | {"bits": [4]}, r"bits: found \[4\]"),
        (BASE | {"bits": 4, "w_bit": 8}, r"found \{'bits': 4, 'w_bit': 8\}, expected names of one thing to agree"),
        (BASE | {"group_size": 0}, r"group_size: found 0, expected a number of inputs above 0, or -1"),
        (BASE | {"group_size": -2}, r"group_size: found -2"),
        (BASE | {"group_size": "128"}, r"group_size: found '128'"),
        (BASE | {"group_size": 128.0}, r"group_size: found 128\.0"),
        (BASE | {"group_size": float("nan")}, r"group_size: found nan"),
        (BASE | {"group_size": 1 << 70}, r"group_size: found 11805916207174113034"),
        (BASE | {"desc_act": 1}, r"desc_act: found 1, expected true or false"),
        (BASE | {"sym": "yes"}, r"sym: found 'yes'"),
        (BASE | {"lm_head": 0}, r"lm_head: found 0"),
        (BASE | {"is_marlin_format": "no"}, r"is_marlin_format: found 'no'"),
        (BASE | {"quant_method": 4}, r"quant_method: found 4, expected a string"),
        (BASE | {"checkpoint_format": ["gptq"]}, r"checkpoint_format: found \['gptq'\], expected a string"),
        (BASE | {"checkpoint_format": "gptq", "format": "gptq_v2"}, r"found \{.*\}, expected names of one thing"),
        (BASE | {"pack_dtype": 32}, r"pack_dtype: found 32"),
        (BASE | {"dynamic": ["+:x"]}, r"dynamic: found \['\+:x'\], expected an object"),
        (BASE | {"dynamic": {"+:x": 8}}, r"dynamic: '\+:x': found 8, expected an object"),
        (BASE | {"dynamic": {"+:x": {"bits": "8"}}}, r"dynamic: '\+:x': bits: found '8'"),
        (BASE | {"dynamic": {"+:x": {"group_size": 0}}}, r"dynamic: '\+:x': group_size: found 0"),
        (BASE | {"dynamic": {"+:(": {"bits": 8}}}, r"dynamic: '\+:\(': not a regular expression: missing \)"),
        (BASE | {"dynamic": {"-:*": {}}}, r"dynamic: '-:\*': not a regular expression: nothing to repeat"),
        (BASE | {"dynamic": {r"(a)\1": {}}}, r"dynamic: .*groupref in a pattern, which exl does not support"),
        (BASE | {"dynamic": {"(?i)a": {}}}, r"dynamic: '\(\?i\)a': flags in a pattern"),
        (BASE | {"dynamic": {"(?<=a)b": {}}}, r"dynamic: .*assert in a pattern"),
        (BASE | {"dynamic": {"((((a*)*)*)*)*": {}}}, r"dynamic: .*more than 3 repeats inside each other"),
        (BASE | {"dynamic": {"a" * 513: {}}}, r"dynamic: .*a pattern of 513 characters, expected at most 512"),
        (BASE | {"dynamic": {"a{99999999999}": {}}}, r"dynamic: .*not a regular expression"),
    ],
)
def test_values_that_make_no_sense_name_file_and_key(values, message):
    with pytest.raises(ConfigError, match=rf"^quantize_config\.json: {message}"):
        parse(values)


def test_a_config_that_is_no_object(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config: found \[1\], expected an object"):
        read_quant_config(tmp_path, {"quantization_config": [1]})
    (tmp_path / "quantize_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"quantize_config\.json"):
        read_quant_config(tmp_path, {})


# --- a module's own ------------------------------------------------------------------------------------------------


def dynamic(rules, **values) -> GptqConfig:
    return parse(BASE | values | {"dynamic": rules})


def test_the_first_match_decides_and_its_other_values_come_from_the_file():
    config = dynamic({"+:a.*": {"bits": 8}, "+:a.b": {"bits": 2, "group_size": 32}}, desc_act=True)
    assert of(config.for_module("a.b")) == (8, 128, True, True, "gptq", False)
    assert of(config.for_module("b.a")) == (4, 128, True, True, "gptq", False)


def test_every_override_is_honoured():
    values = {"bits": 2, "group_size": -1, "desc_act": True, "sym": False}
    assert of(dynamic({"a": values}).for_module("a")) == (2, -1, True, False, "gptq", False)


def test_exclusions_come_before_all_other_rules():
    """GPTQModel moves exclusions to the front when it reads a config."""
    config = dynamic({"+:a": {"bits": 8}, "-:a\\.x": {}, "b": {"bits": 2}})
    assert config.for_module("a.x") is None
    assert config.for_module("a.y").bits == 8
    assert config.for_module("b").bits == 2


def test_patterns_match_from_the_start_and_not_to_the_end():
    """As in ``re.match``: "model.gate" matches model.gate_proj, but "mlp" matches no name that begins with model."""
    config = dynamic({"-:mlp": {}, r"+:model\.gate": {"bits": 8}})
    assert config.for_module("model.mlp").bits == 4
    assert config.for_module("model.gate_proj").bits == 8
    assert config.for_module("mlp.up") is None


def test_the_head_is_dense_unless_the_file_or_a_rule_says_otherwise():
    assert parse(BASE).for_module("lm_head") is None
    assert parse(BASE | {"lm_head": True}).for_module("lm_head").bits == 4
    assert dynamic({"lm_head": {"bits": 8}}).for_module("lm_head").bits == 8
    assert dynamic({"-:lm_head": {}}, lm_head=True).for_module("lm_head") is None


def test_what_is_a_modules_own_is_final():
    own = dynamic({"+:.*": {"bits": 8}, "-:never": {}}).for_module("a")
    assert own.for_module("never") == own


# --- patterns ------------------------------------------------------------------------------------------------------


def matches(pattern: str, name: str, max_steps: int = 100_000) -> bool:
    return ModuleMatcher(name, max_steps).matches(ModulePattern.parse(pattern))


ATOMS = (
    r"a b c 1 _ . \. [ab] [^a] [a-c1] [\d_] \d \D \w \W \s \S ^ $ \b \B \A \Z \n (a|b) (?:a|) (ab) (?=a) (?!b) (a|ab)"
)
QUANTIFIERS = ["", "", "", "", "?", "??", "{2}", "{1,2}", "*", "+", "*?", "+?", "{0,3}", "{2,}"]


def random_pattern(rng: random.Random, depth: int = 0) -> str:
    parts = []
    for _ in range(rng.randint(1, 4)):
        atom = rng.choice(ATOMS.split())
        if depth < 2 and rng.random() < 0.25:
            atom = f"(?:{random_pattern(rng, depth + 1)})"
        elif depth < 2 and rng.random() < 0.1:
            atom = f"(?:{random_pattern(rng, depth + 1)}|{random_pattern(rng, depth + 1)})"
        # Unbounded repeats inside repeats would keep ``re`` itself busy forever, even on seven characters.
        parts.append(atom + rng.choice(QUANTIFIERS if depth == 0 else QUANTIFIERS[:8]))
    return "".join(parts)


def test_verdicts_are_those_of_re_match():
    rng = random.Random(0)
    verdicts = {True: 0, False: 0}
    while sum(verdicts.values()) < 12_000:
        pattern = random_pattern(rng)
        try:
            truth, ours = re.compile(pattern), ModulePattern.parse(pattern)
        except re.error:
            continue
        for _ in range(4):
            name = "".join(rng.choice("abc1_.\n") for _ in range(rng.randint(1, 7)))
            expected = truth.match(name) is not None
            assert ModuleMatcher(name, 100_000).matches(ours) == expected, (pattern, name)
            anywhere = truth.search(name) is not None
            assert ModuleMatcher(name, 100_000).found(ours) == anywhere, (pattern, name)
            verdicts[expected] += 1
    assert min(verdicts.values()) > 3000


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        (r".*\.18\..*gate.*", "model.layers.18.mlp.gate_proj", True),
        (r".*\.18\..*gate.*", "model.layers.28.mlp.gate_proj", False),
        (r"model\.layers\.(1[0-9]|2[0-1])\.mlp", "model.layers.21.mlp.up_proj", True),
        (r"model\.layers\.(1[0-9]|2[0-1])\.mlp", "model.layers.22.mlp.up_proj", False),
        (r"^model\.layers\.0\.mlp\.up_proj$", "model.layers.0.mlp.up_proj", True),
        (r"^model\.layers\.0\.mlp\.up_proj$", "model.layers.0.mlp.up_proj_2", False),
        (r"^(?!.*mlp).*", "model.layers.0.self_attn.q_proj", True),
        (r"^(?!.*mlp).*", "model.layers.0.mlp.up_proj", False),
        (r"^lm_head$", "lm_head\n", True),
        (r"lm_head$", "lm_head\n\n", False),
    ],
)
def test_patterns_of_real_configs(pattern, name, expected):
    assert (re.match(pattern, name) is not None) == expected
    assert matches(pattern, name) == expected


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a*)*(a*)*(a*)*b", "(?:a?){40}a{40}$", "(.*a){12}$"])
def test_patterns_that_re_would_never_finish(pattern):
    """Steps are polynomial: ``re`` needs 2^60 steps or more for these patterns, exl a few thousand."""
    assert matches(pattern, "a" * 60 + "!", max_steps=20_000) is False


def test_too_many_steps_are_a_config_error():
    config = dynamic({f"(?:a?){{30}}(?:a?){{30}}[xy]{{{i + 1}}}": {"bits": 8} for i in range(1200)})
    with pytest.raises(ConfigError, match=r"^quantize_config\.json: dynamic: patterns that take too many steps"):
        config.for_module("a" * 60)


def test_thousands_of_exact_rules():
    """GPTQModel writes one anchored rule per module."""
    config = dynamic({rf"+:^model\.layers\.{i}\.mlp$": {"bits": (2, 3, 8)[i % 3]} for i in range(3000)})
    assert [config.for_module(f"model.layers.{i}.mlp").bits for i in (0, 1, 2, 2999)] == [2, 3, 8, 8]
    assert config.for_module("model.layers.3000.mlp").bits == 4
