"""The language model inside a model that takes images, too: its own config, found in the whole one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from exl.checkpoint.config_reader import ConfigReader
from exl.errors import UnsupportedModelError

# model_type of the whole -> of its text part, where the file does not say. In these, text alone is read as by a
# language model of that family. In others it is not: PaliGemma's prompts see themselves in both directions, say.
_WHOLES: Mapping[str, str] = MappingProxyType(
    {
        "aya_vision": "cohere2",
        "gemma3": "gemma3_text",
        "internvl": "qwen2",
        "llava": "llama",
        "llava_next": "llama",
        "llava_onevision": "qwen2",
        "mistral3": "mistral",
        "qwen2_5_vl": "qwen2_5_vl_text",
        "qwen2_vl": "qwen2_vl_text",
        "qwen3_vl": "qwen3_vl_text",
    }
)
# Text parts with a name of their own that compute what another family does. Their RoPE turns by three positions, of
# time, height and width, which are one and the same number in text.
_SAME_AS: Mapping[str, str] = MappingProxyType(
    {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
)
# Nested configs lack what the class of the text part in transformers sets, sizes too (LLaVA 1.5: all of them).
# Other families fill in their sizes themselves.
_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_QWEN = {**_LLAMA, "vocab_size": 151_936, "intermediate_size": 22_016}
_QWEN2_VL = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": {**_LLAMA, "intermediate_size": 14_336},
        "qwen2": _QWEN,
        "qwen2_vl_text": _QWEN2_VL,
        "qwen2_5_vl_text": _QWEN2_VL,
        "qwen3_vl_text": {**_QWEN, "max_position_embeddings": 128_000, "rope_theta": 5e5},
    }
)
_OF_BOTH = ("tie_word_embeddings", "bos_token_id", "eos_token_id")  # stand in either, the whole's first
_ROPE_KEYS = ("rope_parameters", "rope_scaling")


def find_text_part(read: ConfigReader) -> ConfigReader | None:
    """The config of the language model in ``read``; None: that is a language model itself. Raises
    ``UnsupportedModelError`` for a whole that exl does not have."""
    whole = read.text("model_type", "")
    if whole not in _WHOLES:
        if read.has("text_config"):
            raise UnsupportedModelError(
                f"{read.source}: model_type: found {whole[:40]!r}, a model with a text part; exl reads that of "
                f"{', '.join(sorted(_WHOLES))}"
            )
        return None
    nested = read.object("text_config")
    inner = ConfigReader(nested, f"{read.source}: text_config") if nested else read
    model_type = inner.text("model_type", _WHOLES[whole]) if nested else _WHOLES[whole]
    values: dict[str, Any] = {**_DEFAULTS.get(model_type, {}), **inner.values}
    values |= {key: read.values[key] for key in _OF_BOTH if read.has(key)}
    values["model_type"] = _SAME_AS.get(model_type, model_type)
    if model_type in _SAME_AS:
        for key in _ROPE_KEYS:
            rope = dict(inner.object(key))
            if rope.get("rope_type", rope.get("type")) == "mrope":
                values[key] = {**rope, "rope_type": "default", "type": "default"}
    return ConfigReader(values, inner.source)
