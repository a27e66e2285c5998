"""Tiny random transformers models, written as checkpoints, each with a feature that a decoder can get wrong."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from exl.families.config import ModelConfig

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


@dataclass(frozen=True)
class Case:
    """A model, and the features whose removal must change its logits."""

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    features: tuple[str, ...] = ("rope",)

    def __str__(self) -> str:
        return self.name


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0, **parameters}}


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
CASES = [
    Case("llama", "llama", _rope(rope_type="default")),
    Case("llama-tied", "llama", {"tie_word_embeddings": True}),
    Case("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}, ("qkv_bias", "o_bias", "mlp_bias")),
    Case("llama-one-kv-head", "llama", {"num_key_value_heads": 1}),
    Case("llama-wide-heads", "llama", {"head_dim": 40, "num_key_value_heads": 4}),
    Case("llama-linear", "llama", _rope(rope_type="linear", factor=3.0), ("rope_scaling",)),
    Case("llama-dynamic", "llama", _rope(rope_type="dynamic", factor=2.0), ("rope_scaling",)),
    Case(
        "llama3",
        "llama",
        _rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=24,
        ),
        ("rope_scaling",),
    ),
    Case("llama-yarn", "llama", _rope(**_YARN), ("rope_scaling", "attention_factor")),
    Case("llama-yarn-mscale", "llama", _rope(**_YARN, mscale=1.2, mscale_all_dim=0.6), ("attention_factor",)),
    Case("llama-yarn-factor", "llama", _rope(**_YARN, attention_factor=1.3), ("attention_factor",)),
    Case("llama-yarn-exact", "llama", _rope(**_YARN, truncate=False, beta_fast=2.0, beta_slow=0.5), ("truncate",)),
    Case("mistral", "mistral", {"sliding_window": 16}, ("window",)),
    Case("mistral-full", "mistral", {"sliding_window": None}),
    Case("qwen2", "qwen2", {}, ("rope", "qkv_bias")),
    Case(
        "qwen2-window",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        ("window", "window_layers"),
    ),
    Case("qwen3", "qwen3", {"head_dim": 32}, ("rope", "q_norm", "k_norm")),
    Case("qwen3-tied", "qwen3", {"head_dim": 16, "tie_word_embeddings": True}, ("q_norm",)),
]


def build(case: Case, seed: int = 0, projection_scale: float = 5.0) -> transformers.PreTrainedModel:
    """Builds the model; projections are scaled up, so that attention is peaked and every feature matters."""
    config_class, model_class = _CLASSES[case.family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**_SIZES, **case.options})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "proj" in name:
                parameter.mul_(projection_scale)
            else:
                parameter.normal_(0, 0.5)
    return model


def with_attention(config: ModelConfig, **changes: object) -> ModelConfig:
    """The config with other values in the attention of all its layers."""
    layers = (replace(layer, attention=replace(layer.attention, **changes)) for layer in config.layers)
    return replace(config, layers=tuple(layers))


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    # transformers writes its defaults there; the model's results do not depend on it.
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert json.loads((folder / "config.json").read_text())["model_type"] == model.config.model_type
    return folder


def load_f32(folder: Path) -> transformers.PreTrainedModel:
    """A saved model in f32. Not ``model.to(dtype).float()``: that would round the rotary frequencies too."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def prefill_logits(model: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    model = copy.deepcopy(model)  # a copy, because dynamic RoPE remembers the longest sequence so far
    return model(torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def decode_logits(model: transformers.PreTrainedModel, ids: list[int], num_prompt: int) -> torch.Tensor:
    """Logits after the prompt, then after each further token, fed one by one through transformers' cache."""
    model = copy.deepcopy(model)
    out = model(torch.tensor([ids[:num_prompt]]), use_cache=True)
    logits, cache = [out.logits[0, -1]], out.past_key_values
    for token_id in ids[num_prompt:]:
        out = model(torch.tensor([[token_id]]), past_key_values=cache, use_cache=True)
        logits.append(out.logits[0, -1])
    return torch.stack(logits)
