"""Shapes of well-known models: enough to plan one that is not there, as headers of a GPTQ checkpoint without weights.

The values are those of each model's published ``config.json`` on Hugging Face; the parameters that follow from them are
checked against the published counts (``tests/unit/planning/test_shapes.py``).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import TensorInfo, shown
from exl.checkpoint.quant.values import SUPPORTED_BITS
from exl.errors import ConfigError
from exl.families.config import ModelConfig
from exl.families.specs import LayerSpec, MoeShape, PartSpec
from exl.formats.groups import num_groups

DENSE_BITS = 16  # an original checkpoint, not quantized
_DTYPE_BYTES = {"f16": 2, "i32": 4}
TensorEntry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class ModelShape:
    """What a configuration says about sizes. ``tied``: the embedding is also the head."""

    family: str  # Hugging Face's model_type
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    tied: bool = False
    sliding_window: int | None = None
    experts: tuple[int, int, int] | None = None  # of each layer: how many, of which a token takes, their width

    @cached_property
    def layer(self) -> LayerSpec:
        """The first one: in these families all have tensors of the same shapes."""
        return ModelConfig.from_dict(self.config(DENSE_BITS, 0)).layers[0]

    @property
    def modules(self) -> dict[str, tuple[int, int, bool]]:
        """A layer's modules as files have them: inputs, outputs, and whether there is a bias."""
        return {
            part.module: (part.K, part.N if part.rows is None else part.rows.total, part.has_bias)
            for part in self._parts
        }

    @property
    def _parts(self) -> list[PartSpec]:
        """A layer's matrices; of mixtures those of each expert."""
        layer = self.layer
        found = [part for parts in layer.linears.values() for part in parts]
        if isinstance(layer.mlp, MoeShape):
            one = [part for parts in layer.experts[0].values() for part in parts]
            found += [replace(part, module=part.module.format(e=e)) for e in range(layer.mlp.count) for part in one]
        return found

    @property
    def num_parameters(self) -> int:
        """Of the original model; a tied head is counted once."""
        return sum(prod(shape) for _, _, shape in self.tensors(DENSE_BITS, 0))

    def tensors(self, bits: int, group_size: int) -> list[TensorEntry]:
        """The tensors of a GPTQ checkpoint with a dense f16 embedding and head, in the order of the layers; at 16 bits
        those of the original checkpoint. ``group_size`` -1: one group."""
        found: list[TensorEntry] = [("model.embed_tokens.weight", "f16", (self.vocab_size, self.hidden_size))]
        dense = {part.module for part in self._parts if part.exact}
        modules = self.modules
        for i in range(self.num_layers):
            prefix = f"model.layers.{i}."
            found += [(prefix + norm.tensor, "f16", (norm.width,)) for norm in self.layer.norms]
            for name, (K, N, has_bias) in modules.items():
                found += _linear_tensors(prefix + name, K, N, DENSE_BITS if name in dense else bits, group_size)
                if has_bias:
                    found.append((f"{prefix}{name}.bias", "f16", (N,)))
        found.append(("model.norm.weight", "f16", (self.hidden_size,)))
        if not self.tied:
            found.append(("lm_head.weight", "f16", (self.vocab_size, self.hidden_size)))
        return found

    def config(self, bits: int, group_size: int) -> dict[str, object]:
        """A ``config.json``. Only what sizes depend on is the model's own: RoPE and the norms' epsilon are not."""
        values: dict[str, object] = {
            "model_type": self.family,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.sliding_window is not None or self.family == "mistral":
            values["sliding_window"] = self.sliding_window
        if self.experts is not None:
            count, per_token, width = self.experts
            values |= {"num_experts": count, "num_local_experts": count, "num_experts_per_tok": per_token}
            values["moe_intermediate_size"] = width
        if bits != DENSE_BITS:
            values["quantization_config"] = {
                "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": True, "desc_act": False
            }  # fmt: skip
        return values


def _linear_tensors(name: str, K: int, N: int, bits: int, group_size: int) -> list[TensorEntry]:
    if bits == DENSE_BITS:
        return [(f"{name}.weight", "f16", (N, K))]
    G = num_groups(K, group_size)
    return [
        (f"{name}.qweight", "i32", (K * bits // 32, N)),
        (f"{name}.qzeros", "i32", (G, N * bits // 32)),
        (f"{name}.scales", "f16", (G, N)),
    ]


def _llama(*sizes: int, tied: bool = False) -> ModelShape:
    return ModelShape("llama", *sizes, tied=tied)


def _qwen2(*sizes: int, tied: bool = False) -> ModelShape:
    return ModelShape("qwen2", *sizes, 32768, tied=tied)


def _qwen3(*sizes: int, tied: bool = False) -> ModelShape:
    return ModelShape("qwen3", *sizes, 128, 151936, 40960, tied=tied)


def _qwen3_moe(*sizes: int, experts: tuple[int, int, int]) -> ModelShape:
    return ModelShape("qwen3_moe", *sizes, 128, 151936, 40960, experts=experts)


def _gemma2(*sizes: int) -> ModelShape:
    return ModelShape("gemma2", *sizes, 256000, 8192, tied=True, sliding_window=4096)


def _gemma3(*sizes: int, window: int) -> ModelShape:
    return ModelShape("gemma3_text", *sizes, tied=True, sliding_window=window)


# hidden, intermediate, layers, heads, kv heads, head size, vocabulary, longest context
SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 128, 32000, 4096),
        "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 128, 32000, 4096),
        "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 128, 32000, 4096),
        "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128, 128256, 8192),
        "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128, 128256, 8192),
        "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128, 128256, 131072),
        "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128, 128256, 131072),
        "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 64, 128256, 131072, tied=True),
        "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128, 128256, 131072, tied=True),
        "llama-3.3-70b": _llama(8192, 28672, 80, 64, 8, 128, 128256, 131072),
        "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 64, 32000, 2048),
        "smollm2-135m": _llama(576, 1536, 30, 9, 3, 64, 49152, 8192, tied=True),
        "smollm2-360m": _llama(960, 2560, 32, 15, 5, 64, 49152, 8192, tied=True),
        "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 64, 49152, 8192, tied=True),
        "mistral-7b-v0.1": ModelShape("mistral", 4096, 14336, 32, 32, 8, 128, 32000, 32768, sliding_window=4096),
        "mistral-7b-v0.2": ModelShape("mistral", 4096, 14336, 32, 32, 8, 128, 32000, 32768),
        "mistral-7b-v0.3": ModelShape("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 32768),
        "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 64, 151936, tied=True),
        "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 128, 151936, tied=True),
        "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 128, 151936, tied=True),
        "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 128, 152064),
        "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, 128, 152064),
        "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 128, 152064),
        "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 128, 152064),
        "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
        "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
        "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
        "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
        "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8),
        "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
        "qwen3-30b-a3b": _qwen3_moe(2048, 6144, 48, 32, 4, experts=(128, 8, 768)),
        "qwen3-235b-a22b": _qwen3_moe(4096, 12288, 94, 64, 4, experts=(128, 8, 1536)),
        "mixtral-8x7b": ModelShape("mixtral", 4096, 14336, 32, 32, 8, 128, 32000, 32768, experts=(8, 2, 14336)),
        "mistral-nemo-12b": ModelShape("mistral", 5120, 14336, 40, 32, 8, 128, 131072, 131072),
        "mistral-small-24b": ModelShape("mistral", 5120, 32768, 40, 32, 8, 128, 131072, 32768),
        "gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4, 256),
        "gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8, 256),
        "gemma-2-27b": _gemma2(4608, 36864, 46, 32, 16, 128),
        "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, 256, 262144, 32768, window=512),
        "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4, 256, 262208, 131072, window=1024),
        "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8, 256, 262208, 131072, window=1024),
        "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, 128, 262208, 131072, window=1024),
        "phi-3-mini": ModelShape("phi3", 3072, 8192, 32, 32, 32, 96, 32064, 4096, sliding_window=2047),
        "phi-3-medium": ModelShape("phi3", 5120, 17920, 40, 40, 10, 128, 32064, 4096, sliding_window=2047),
        "phi-4": ModelShape("phi3", 5120, 17920, 40, 40, 10, 128, 100352, 16384),
        "glm-4-9b": ModelShape("glm4", 4096, 13696, 40, 32, 2, 128, 151552, 32768),
        "glm-4-32b": ModelShape("glm4", 6144, 23040, 61, 48, 2, 128, 151552, 32768),
        "granite-3.1-2b": ModelShape("granite", 2048, 8192, 40, 32, 8, 64, 49155, 131072, tied=True),
        "granite-3.1-8b": ModelShape("granite", 4096, 12800, 40, 32, 8, 128, 49155, 131072, tied=True),
        "command-r7b": ModelShape("cohere2", 4096, 14336, 32, 32, 8, 128, 256000, 132096, True, 4096),
        "olmo-2-7b": ModelShape("olmo2", 4096, 11008, 32, 32, 32, 128, 100352, 4096),
        "olmo-2-13b": ModelShape("olmo2", 5120, 13824, 40, 40, 40, 128, 100352, 4096),
        "smollm3-3b": ModelShape("smollm3", 2048, 11008, 36, 16, 4, 128, 128256, 65536, tied=True),
    }
)


def find_shape(name: str) -> ModelShape:
    """By name, in any case, with spaces for hyphens if need be. Raises ``ConfigError`` with the nearest names."""
    key = name.strip().lower().replace(" ", "-").replace("_", "-") if isinstance(name, str) else ""
    if key in SHAPES:
        return SHAPES[key]
    longer = [known for known in SHAPES if key and known.startswith(key)]
    nearest = longer[:6] or difflib.get_close_matches(key, SHAPES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"expected one of {', '.join(SHAPES)}"
    raise ConfigError(f"shape: found {shown(name)}; {hint}")


def check_quantization(bits: int, group_size: int) -> None:
    """Raises ``ConfigError`` for what no GPTQ checkpoint has. ``bits`` may be 16: a dense model."""
    allowed = (*SUPPORTED_BITS, DENSE_BITS)
    if isinstance(bits, bool) or bits not in allowed:
        raise ConfigError(f"bits: found {bits!r}, expected one of {', '.join(map(str, allowed))}")
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not whole or not (group_size == -1 or 1 <= group_size <= 1 << 20):
        raise ConfigError(
            f"group_size: found {group_size!r}, expected a number of inputs such as 128, or -1: one group"
        )


def shape_checkpoint(shape: ModelShape, name: str, bits: int, group_size: int) -> Checkpoint:
    """Headers without a file: what a plan reads of a checkpoint, in memory. Its tensors cannot be read."""
    tensors, start = {}, 0
    for tensor, dtype, sizes in shape.tensors(bits, group_size):
        stop = start + prod(sizes) * _DTYPE_BYTES[dtype]
        tensors[tensor] = TensorInfo(tensor, "model.safetensors", dtype, sizes, start, stop)
        start = stop
    return Checkpoint(Path(name), Path(name), {}, tensors)
