"""What files leave out is what the family's class in transformers sets: a config with every key that the class writes,
and one with sizes alone, mean the same model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exl.errors import ConfigError
from exl.families.config import FAMILIES, ModelConfig

_SIZES = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _written(family: str) -> dict[str, Any]:
    return {**CONFIG_MAPPING[family]().to_dict(), "architectures": None}


def _model(values: dict[str, Any]) -> ModelConfig:
    """Without ids of tokens: a wrong guess ends texts early, so exl takes none that no file has."""
    return dataclasses.replace(ModelConfig.from_dict(values), bos_id=None, eos_ids=())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_sizes_alone(family):
    written = _written(family)
    assert _model({key: written[key] for key in _SIZES}) == _model(written)


# Text parts by the whole's model_type; LLaVA's are of several kinds.
_PARTS = [
    *(("llava", "llama"), ("llava", "mistral"), ("llava_next", "qwen2"), ("mistral3", "mistral")),
    *(("gemma3", "gemma3_text"), ("aya_vision", "cohere2"), ("internvl", "qwen2")),
    *(("qwen2_vl", "qwen2_vl_text"), ("qwen2_5_vl", "qwen2_5_vl_text"), ("qwen3_vl", "qwen3_vl_text")),
]


@pytest.mark.parametrize(("whole", "part"), _PARTS)
def test_a_text_part_that_says_nothing(whole, part):
    written = CONFIG_MAPPING[whole](text_config={"model_type": part}).to_dict()
    tied = {"tie_word_embeddings": written["tie_word_embeddings"]}
    assert _model({"model_type": whole, "text_config": {"model_type": part}, **tied}) == _model(written)


def test_null_is_no_default():
    """Gemma 2 without caps says so."""
    values = {**_written("gemma2"), "attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = _model(values)
    assert (config.layers[0].attention.softcap, config.logits.softcap) == (None, None)


def test_longrope_of_phi_without_its_original_length():
    scaling = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    values = {"model_type": "phi3", "max_position_embeddings": 131_072, "rope_scaling": scaling}
    sizes = {key: value for key, value in _written("phi3").items() if key in _SIZES}
    rope = _model({**sizes, **values}).rope
    assert (rope.original_max_position, rope.factor) == (4096, 32.0)


def test_published_exaone_has_a_pattern_of_letters_beside_its_types():
    written = _written("exaone4")
    assert _model({**written, "sliding_window_pattern": "LLLG"}) == _model(written)
    with pytest.raises(ConfigError, match="sliding_window_pattern: found 'LLLG', expected an integer"):
        _model({**written, "sliding_window_pattern": "LLLG", "layer_types": None})
