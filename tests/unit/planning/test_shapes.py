"""Shapes of models that are not there: their sizes against published parameter counts, their headers against files."""

from __future__ import annotations

import pytest

import exl
from benchmarks.synthetic import write_headers
from exl.errors import ConfigError, UnsupportedModelError
from exl.planning.shapes import SHAPES, find_shape

# Parameters as the models' pages on Hugging Face give them, from the headers of their files. A tied head is counted
# once, which some pages do not, because the file has both tensors.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    # Of the others the text part: without a vision tower of 416,866,032, its norm of 1,152, and 1,152 x hidden size.
    "gemma-3-4b": 4_300_079_472 - 416_866_032 - 1152 - 1152 * 2560,
    "gemma-3-12b": 12_187_325_040 - 416_866_032 - 1152 - 1152 * 3840,
    "gemma-3-27b": 27_432_406_640 - 416_866_032 - 1152 - 1152 * 5376,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "glm-4-9b": 9_400_279_040,
    "glm-4-32b": 32_566_487_552,
    "granite-3.1-2b": 2_533_531_648,
    "granite-3.1-8b": 8_170_848_256,
    "command-r7b": 8_028_033_024,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "smollm3-3b": 3_075_098_624,
}


def test_parameters_are_the_published_ones():
    assert {name: shape.num_parameters for name, shape in SHAPES.items()} == PUBLISHED


@pytest.mark.parametrize("name", ["llama-2-7b", "qwen2.5-0.5b", "qwen3-0.6b", "smollm2-135m", "mistral-7b-v0.1"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (3, 32), (8, -1)])
def test_a_shape_is_planned_as_its_files_would_be(tmp_path, name, bits, group_size):
    """Without tokenizer.json: how large that is, a shape does not say."""
    write_headers(tmp_path, find_shape(name), bits=bits, group_size=group_size)
    for options in ({}, {"vram": "24GB"}, {"vram": "24GB", "head": 8}):
        found = exl.plan(shape=name, bits=bits, group_size=group_size, **options)
        assert found.to_json() == exl.plan(tmp_path, **options).to_json()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", [4, 16])
def test_every_shape_has_a_plan_on_both_devices(name, bits):
    weights = SHAPES[name].num_parameters * bits / 8
    if SHAPES[name].experts is not None:
        with pytest.raises(UnsupportedModelError, match=r"mixtures of \d+ experts"):
            exl.plan(shape=name, bits=bits, context=64, vram="200GB")
    for options in ({}, {"vram": "200GB"}) if SHAPES[name].experts is None else ({},):
        found = exl.plan(shape=name, bits=bits, context=64, **options)
        assert found.placement.num_streamed == 0
        assert found.exact_bytes > weights


def test_names_are_found_as_people_write_them():
    assert find_shape("Llama 2 70B") is find_shape(" llama-2-70b ") is SHAPES["llama-2-70b"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-2-71b", "did you mean .*llama-2-70b"),
        ("mistral-7b", "did you mean mistral-7b-v0.1 or mistral-7b-v0.2 or mistral-7b-v0.3"),
        ("qwen3", "did you mean qwen3-0.6b"),
        ("tinylama", "did you mean tinyllama-1.1b"),
        ("xyz", "expected one of llama-2-7b, "),
        ("", "expected one of llama-2-7b, "),
        (5, "expected one of llama-2-7b, "),
    ],
)
def test_a_name_that_is_unknown_has_the_nearest(name, expected):
    with pytest.raises(ConfigError, match=rf"^shape: found .*{expected}"):
        exl.plan(shape=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"^bits: found 5, expected one of 2, 3, 4, 8, 16$"),
        ({"bits": True}, r"^bits: found True"),
        ({"group_size": 0}, r"^group_size: found 0, expected a number of inputs such as 128, or -1"),
        ({"group_size": "128"}, r"^group_size: found '128'"),
        ({"bits": 16, "group_size": 128}, r"^group_size: found 128 with bits=16, which has no groups$"),
        ({"model": "a/b"}, r"^shape: found 'qwen3-8b' beside model='a/b', expected one of them$"),
    ],
)
def test_what_makes_no_sense_with_a_shape(options, message):
    with pytest.raises(ConfigError, match=message):
        exl.plan(shape="qwen3-8b", **options)


@pytest.mark.parametrize("option", ["bits", "group_size"])
def test_a_checkpoint_says_its_quantization_itself(option):
    with pytest.raises(ConfigError, match=f"^{option}: found 4 without shape="):
        exl.plan(**{option: 4})


def test_keywords_of_other_libraries_are_explained():
    with pytest.raises(TypeError, match="'n_gpu_layers': exl calls it resident_layers"):
        exl.plan(n_gpu_layers=5)
