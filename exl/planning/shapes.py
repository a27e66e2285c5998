"""Shapes of well-known models: enough to plan one that is not there, as headers of a GPTQ checkpoint without weights.

The values are those of each model's published ``config.json`` on Hugging Face; the parameters that follow from them are
checked against the published counts (``tests/unit/planning/test_shapes.py``).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import TensorInfo, shown
from exl.checkpoint.quant.values import SUPPORTED_BITS
from exl.errors import ConfigError
from exl.formats.groups import num_groups

DENSE_BITS = 16  # an original checkpoint, not quantized
_DTYPE_BYTES = {"f16": 2, "i32": 4}
_ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

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

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """A layer's matrices by name: inputs, outputs."""
        hidden, inter = self.hidden_size, self.intermediate_size
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (hidden, width),
            "self_attn.k_proj": (hidden, kv_width),
            "self_attn.v_proj": (hidden, kv_width),
            "self_attn.o_proj": (width, hidden),
            "mlp.gate_proj": (hidden, inter),
            "mlp.up_proj": (hidden, inter),
            "mlp.down_proj": (inter, hidden),
        }

    @property
    def biases(self) -> tuple[str, ...]:
        """The matrices that have one."""
        return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") if self.family == "qwen2" else ()

    @property
    def norms(self) -> dict[str, int]:
        """A layer's norms by name, and their widths."""
        found = {"input_layernorm": self.hidden_size, "post_attention_layernorm": self.hidden_size}
        if self.family == "qwen3":
            found |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        return found

    @property
    def num_parameters(self) -> int:
        """Of the original model; a tied head is counted once."""
        return sum(prod(shape) for _, _, shape in self.tensors(DENSE_BITS, 0))

    def tensors(self, bits: int, group_size: int) -> list[TensorEntry]:
        """The tensors of a GPTQ checkpoint with a dense f16 embedding and head, in the order of the layers; at 16 bits
        those of the original checkpoint. ``group_size`` -1: one group."""
        found: list[TensorEntry] = [("model.embed_tokens.weight", "f16", (self.vocab_size, self.hidden_size))]
        for i in range(self.num_layers):
            prefix = f"model.layers.{i}."
            found += [(f"{prefix}{name}.weight", "f16", (width,)) for name, width in self.norms.items()]
            for name, (K, N) in self.linears.items():
                found += _linear_tensors(prefix + name, K, N, bits, group_size)
                if name in self.biases:
                    found.append((f"{prefix}{name}.bias", "f16", (N,)))
        found.append(("model.norm.weight", "f16", (self.hidden_size,)))
        if not self.tied:
            found.append(("lm_head.weight", "f16", (self.vocab_size, self.hidden_size)))
        return found

    def config(self, bits: int, group_size: int) -> dict[str, object]:
        """A ``config.json``. Only what sizes depend on is the model's own: RoPE and the norms' epsilon are not."""
        values: dict[str, object] = {
            "architectures": [f"{_ARCHITECTURES[self.family]}ForCausalLM"],
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
        if self.family == "mistral":
            values["sliding_window"] = self.sliding_window
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
