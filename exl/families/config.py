"""A Hugging Face ``config.json``, checked once and frozen: finds its family, and reads what all families share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from exl.checkpoint.config_reader import MAX_POSITION, ConfigReader, read_json
from exl.checkpoint.rope_config import RopeConfig, check_factors, read_ropes
from exl.errors import UnsupportedModelError
from exl.families.cohere import cohere2, prepare_cohere2
from exl.families.common import Source
from exl.families.exaone import exaone4, prepare_exaone4
from exl.families.gemma import gemma2, gemma3, prepare_gemma2, prepare_gemma3
from exl.families.glm import glm, glm4, prepare_glm
from exl.families.glm_moe import glm4_moe, prepare_glm4_moe
from exl.families.gpt_oss import gpt_oss, prepare_gpt_oss
from exl.families.granite import granite
from exl.families.llama import llama, mistral, prepare_ministral3, prepare_mistral
from exl.families.mixtral import mixtral, prepare_mixtral
from exl.families.olmo import olmo2, prepare_olmo2
from exl.families.phi import phi3, prepare_phi3
from exl.families.qwen import prepare_qwen, qwen2, qwen3
from exl.families.qwen_moe import prepare_qwen2_moe, prepare_qwen3_moe, qwen2_moe, qwen3_moe
from exl.families.smollm import prepare_smollm3, smollm3
from exl.families.specs import EmbedShape, FamilySpec, LayerSpec, LogitsShape, ModelNames, MoeShape, NormShape
from exl.families.text_part import find_text_part


@dataclass(frozen=True)
class Family:
    """``prepare`` brings what files of this family say in ways of their own into the usual form, and fills in what
    they leave out; ``describe`` says what the config means."""

    describe: Callable[[Source], FamilySpec]
    prepare: Callable[[ConfigReader], ConfigReader] = lambda read: read


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "cohere2": Family(cohere2, prepare_cohere2),
        "exaone4": Family(exaone4, prepare_exaone4),
        "gemma2": Family(gemma2, prepare_gemma2),
        "gemma3_text": Family(gemma3, prepare_gemma3),
        "glm": Family(glm, prepare_glm),
        "glm4": Family(glm4, prepare_glm),
        "glm4_moe": Family(glm4_moe, prepare_glm4_moe),
        "gpt_oss": Family(gpt_oss, prepare_gpt_oss),
        "granite": Family(granite),
        "llama": Family(llama),
        "ministral3": Family(mistral, prepare_ministral3),
        "mistral": Family(mistral, prepare_mistral),
        "mixtral": Family(mixtral, prepare_mixtral),
        "olmo2": Family(olmo2, prepare_olmo2),
        "phi3": Family(phi3, prepare_phi3),
        "qwen2": Family(qwen2, prepare_qwen),
        "qwen2_moe": Family(qwen2_moe, prepare_qwen2_moe),
        "qwen3": Family(qwen3, prepare_qwen),
        "qwen3_moe": Family(qwen3_moe, prepare_qwen3_moe),
        "smollm3": Family(smollm3, prepare_smollm3),
    }
)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: everything that determines its shapes and arithmetic."""

    family: str  # Hugging Face model_type
    hidden_size: int  # C
    vocab_size: int  # V
    max_position: int
    layers: tuple[LayerSpec, ...]
    norm: NormShape
    embed: EmbedShape
    logits: LogitsShape
    names: ModelNames
    tie_embeddings: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    is_text_part: bool = False  # of a model that also takes images, say; its other parts are not read

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    # Heads are of one size in all layers: pages of the cache are.

    @property
    def num_heads(self) -> int:
        return self.layers[0].attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.layers[0].attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.layers[0].attention.head_dim

    @property
    def attn_width(self) -> int:
        return self.layers[0].attention.width

    @property
    def kv_width(self) -> int:
        return self.layers[0].attention.kv_width

    @property
    def qkv_width(self) -> int:
        return self.layers[0].attention.qkv_width

    @property
    def intermediate_size(self) -> int:
        """Of the widest MLP, expert or shared expert."""
        return max(layer.mlp.widest for layer in self.layers)

    @property
    def mixtures(self) -> tuple[MoeShape, ...]:
        """Of the layers that are mixtures of experts."""
        return tuple(layer.mlp for layer in self.layers if isinstance(layer.mlp, MoeShape))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """[L]; a token sees itself and the window - 1 tokens before it; None: all."""
        return tuple(layer.attention.window for layer in self.layers)

    @property
    def window(self) -> int | None:
        """The widest of the layers' windows; None if there is a layer that sees everything."""
        widths = [window for window in self.windows if window is not None]
        return max(widths) if len(widths) == self.num_layers else None

    @cached_property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different ones, in the order of the layers that use them first."""
        return tuple(dict.fromkeys(layer.attention.rope for layer in self.layers))

    @property
    def rope(self) -> RopeConfig:
        """The first layer's that turns anything."""
        return next((rope for rope in self.ropes if rope.kind != "none"), self.ropes[0])

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> ModelConfig:
        """Reads ``config.json`` of a Hugging Face model folder."""
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], source: str = "config.json", rope: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """``rope`` replaces what ``values`` say of RoPE, see ``rope_config.check_rope``. Raises ``ConfigError`` for an
        invalid value, ``UnsupportedModelError`` for a model that exl does not have."""
        whole = ConfigReader(values, source)
        text_part = find_text_part(whole)
        read = text_part or whole
        model_type = read.text("model_type", "")
        family = FAMILIES.get(model_type)
        if family is None:
            raise UnsupportedModelError(
                f"{read.source}: model_type: found {model_type[:40]!r}, exl has {', '.join(sorted(FAMILIES))}"
            )
        _refuse_other_architectures(whole, "ForCausalLM" if text_part is None else "ForConditionalGeneration")
        read = family.prepare(read)
        max_position = read.integer("max_position_embeddings", 2048, high=MAX_POSITION)
        ropes, max_position = read_ropes(read, max_position, rope)
        spec = family.describe(Source(read, ropes, max_position))
        config = cls(
            family=model_type,
            hidden_size=read.integer("hidden_size"),
            vocab_size=read.integer("vocab_size"),
            max_position=max_position,
            layers=spec.layers,
            norm=spec.norm,
            embed=spec.embed,
            logits=spec.logits,
            names=spec.names,
            tie_embeddings=read.flag("tie_word_embeddings", False),
            bos_id=next(iter(read.token_ids("bos_token_id")), None),
            eos_ids=read.token_ids("eos_token_id"),
            is_text_part=text_part is not None,
        )
        for turns in config.ropes:
            _check_turns(read, turns, config.head_dim)
        return config


def _check_turns(read: ConfigReader, rope: RopeConfig, head_dim: int) -> None:
    turning = int(head_dim * rope.partial_rotary_factor)
    if turning < 4 and rope.kind == "dynamic":
        raise read.error("head_dim", "at least 4 rotary channels for dynamic RoPE")
    check_factors(rope, (turning + 1) // 2, read.source)


def _refuse_other_architectures(read: ConfigReader, expected: str) -> None:
    """Refuses a known model_type with another head (classification, reward): it would load, but generate nonsense."""
    names = read.values.get("architectures")
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise read.error("architectures", "a list of class names")
    if names and not any(name.endswith(("ForCausalLM", expected)) for name in names):
        raise UnsupportedModelError(f"{read.source}: architectures: found {names[0][:60]!r}, expected a ...{expected}")
