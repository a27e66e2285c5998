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
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
_CLASSES = {
    "cohere2": (transformers.Cohere2Config, transformers.Cohere2ForCausalLM),
    "exaone4": (transformers.Exaone4Config, transformers.Exaone4ForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "glm": (transformers.GlmConfig, transformers.GlmForCausalLM),
    "glm4": (transformers.Glm4Config, transformers.Glm4ForCausalLM),
    "glm4_moe": (transformers.Glm4MoeConfig, transformers.Glm4MoeForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "ministral3": (transformers.Ministral3Config, transformers.Ministral3ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
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
_LONGROPE = {
    "original_max_position_embeddings": 48,
    "max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
}
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
    Case(
        "ministral3",
        "ministral3",
        {"head_dim": 16} | _rope(**_YARN, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.5),
        ("rope_scaling", "query_scale"),
    ),
    Case("qwen2", "qwen2", {}, ("rope", "qkv_bias")),
    Case(
        "qwen2-window",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        ("window", "window_layers"),
    ),
    Case("qwen3", "qwen3", {"head_dim": 32}, ("rope", "q_norm", "k_norm")),
    Case("qwen3-tied", "qwen3", {"head_dim": 16, "tie_word_embeddings": True}, ("q_norm",)),
    Case(
        "gemma2",
        "gemma2",
        {
            "head_dim": 32,
            "sliding_window": 16,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
        (
            "rope",
            "window",
            "window_layers",
            "embed_scale",
            "attn_scale",
            "attn_softcap",
            "logits_softcap",
            "activation",
            "attn_post_norm",
            "mlp_post_norm",
            "norm_offset",
        ),
    ),
    Case(
        "gemma2-uncapped",
        "gemma2",
        {"head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 16},
        ("window",),
    ),
    Case(
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 32,
            "sliding_window": 16,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        (
            "one_rope",
            "window",
            "window_layers",
            "embed_scale",
            "attn_scale",
            "activation",
            "attn_post_norm",
            "mlp_post_norm",
            "norm_offset",
            "q_norm",
            "k_norm",
        ),
    ),
    Case("phi3", "phi3", {}, ("rope",)),
    Case("phi3-window", "phi3", {"sliding_window": 16, "num_key_value_heads": 4}, ("window",)),
    Case("phi3-longrope", "phi3", _LONGROPE, ("rope_scaling", "attention_factor")),
    Case(
        "phi3-longrope-in-short-texts", "phi3", _LONGROPE | {"original_max_position_embeddings": 100}, ("rope_scaling",)
    ),
    Case("glm", "glm", {"head_dim": 16, "attention_bias": True}, ("rope", "pairs", "partial", "qkv_bias")),
    Case(
        "glm4",
        "glm4",
        {"head_dim": 16, "attention_bias": True},
        ("pairs", "partial", "attn_post_norm", "mlp_post_norm", "qkv_bias"),
    ),
    Case(
        "granite",
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.5,
            "tie_word_embeddings": True,
        },
        ("rope", "embed_scale", "residual_scale", "attn_scale", "logits_scale"),
    ),
    Case(
        "cohere2",
        "cohere2",
        {"sliding_window": 16, "sliding_window_pattern": 2, "logit_scale": 0.7},
        ("window", "window_layers", "no_rope", "pairs", "parallel", "layer_norm", "logits_scale"),
    ),
    Case(
        "cohere2-biases",
        "cohere2",
        {"attention_bias": True, "sliding_window": 16, "logit_scale": 0.7},
        ("qkv_bias", "o_bias"),
    ),
    Case("olmo2", "olmo2", {}, ("rope", "q_norm", "k_norm", "norm_rows", "attn_post_norm", "mlp_post_norm")),
    Case(
        "exaone4",
        "exaone4",
        {"sliding_window": 16, "sliding_window_pattern": 2},
        ("rope", "no_rope", "window", "window_layers", "q_norm", "k_norm", "attn_post_norm", "mlp_post_norm"),
    ),
    Case("exaone4-full", "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}, ("rope",)),
    Case("smollm3", "smollm3", {"no_rope_layer_interval": 2}, ("rope", "no_rope")),
    Case(
        "smollm3-window",
        "smollm3",
        {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 16},
        ("window", "window_layers", "no_rope"),
    ),
]

MIXTURES = [
    Case("mixtral", "mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}, ("normalize", "experts")),
    Case("mixtral-window", "mixtral", {"num_local_experts": 4, "sliding_window": 16}, ("window",)),
    Case(
        "qwen2_moe",
        "qwen2_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 112,
        },
        ("qkv_bias", "shared", "shared_gate", "normalized"),
    ),
    Case(
        "qwen2_moe-sparse",
        "qwen2_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 48,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
        ("shared", "normalize"),
    ),
    Case(
        "qwen3_moe",
        "qwen3_moe",
        {
            "head_dim": 32,
            "num_experts": 20,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 80,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        ("q_norm", "k_norm", "normalize", "experts"),
    ),
    Case(
        "qwen3_moe-window",
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "use_sliding_window": True,
            "sliding_window": 16,
        },
        ("window", "normalized"),
    ),
    Case(
        "glm4_moe",
        "glm4_moe",
        {
            "head_dim": 16,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 96,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "use_qk_norm": True,
            "attention_bias": True,
        },
        ("partial", "qkv_bias", "q_norm", "shared", "normalize", "sigmoid", "groups", "router_bias", "route_scaling"),
    ),
    Case(
        "glm4_moe-plain",
        "glm4_moe",
        {
            "head_dim": 16,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
        },
        ("normalized", "router_bias"),
    ),
    Case(
        "gpt_oss",
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 16,
            "swiglu_limit": 1.5,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "beta_fast": 2.0,
                "beta_slow": 0.5,
                "truncate": False,
                "original_max_position_embeddings": 24,
            },
        },
        (
            *("window", "window_layers", "sinks", "rope_scaling", "truncate", "qkv_bias", "o_bias"),
            *("chosen", "router_linear_bias", "expert_bias", "limit", "activation"),
        ),
    ),
]
CASES += MIXTURES


def build(case: Case, seed: int = 0, projection_scale: float = 5.0) -> transformers.PreTrainedModel:
    """Builds the model; projections are scaled up, so that attention is peaked and every feature matters."""
    config_class, model_class = _CLASSES[case.family]
    torch.manual_seed(seed)
    options = copy.deepcopy(case.options)  # transformers writes into nested ones
    model = model_class(config_class(**{**_SIZES, **options})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
                if case.family.startswith("gemma"):
                    parameter.sub_(1.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "proj" in name:
                parameter.mul_(projection_scale)
            else:
                parameter.normal_(0, 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.3)
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
