"""The values of a Hugging Face ``config.json``, checked once and frozen. Families differ in values, not in code."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from exl.checkpoint.lfs import lfs_pointer
from exl.errors import ConfigError, UnsupportedModelError
from exl.sampling_params import SamplingParams
from exl.user_text import decode_utf8

logger = logging.getLogger(__name__)

_MAX_SIZE = 1 << 24  # far above any dimension of a real model; a product of two stays far below 64 bits
_MAX_POSITION = 1 << 30
MAX_JSON_BYTES = 16 << 20


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises ``ConfigError``, which names the file, if that fails."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block forever
            raise ConfigError(f"{path}: not a regular file")
        if status.st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: {status.st_size} bytes, expected at most {MAX_JSON_BYTES}")
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_json(raw, str(path))


def parse_json(raw: bytes | bytearray, source: str) -> dict[str, Any]:
    """Like :func:`read_json`, from a file's bytes; ``source`` is its name in error messages."""
    if (pointer := lfs_pointer(raw)) is not None:
        raise ConfigError(f"{source}: {pointer}")
    try:
        value = json.loads(decode_utf8(raw))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: found a JSON {type(value).__name__}, expected an object")
    return value


class _Reader:
    """Typed access to a JSON object; every error names the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def error(self, key: str, expected: str) -> ConfigError:
        found = repr(self.values.get(key)) if key in self.values else "nothing"
        return ConfigError(f"{self.source}: {key}: found {found[:80]}, expected {expected}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = _MAX_SIZE) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "an integer")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, above: bool = True) -> float:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "a number")
            return default
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
        if not good or math.isnan(value) or value < low or (above and value == low):
            raise self.error(key, f"a finite number {'above' if above else 'of at least'} {low:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def object(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """From an id, a list of ids, or nothing. Negative ids (some files say -1) are left out."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i > _MAX_SIZE for i in ids):
            raise self.error(key, "a token id or a list of them")
        return tuple(i for i in ids if i >= 0)

    def sampling(self, key: str) -> float | int | None:
        """A parameter of ``SamplingParams``, in its range. A top_k of -1 is off, as in vLLM."""
        value = self.values.get(key)
        if value is None:
            return None
        if key == "top_k" and isinstance(value, int | float) and not isinstance(value, bool):
            value = 0 if value == -1 else int(value) if math.isfinite(value) and value == int(value) else value
        try:
            return getattr(SamplingParams(**{key: value}), key)
        except ConfigError as error:
            raise self.error(key, str(error).rpartition(", expected ")[2]) from None


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: frequencies, and how they are scaled for long contexts. Meanings and defaults as in
    transformers' ``modeling_rope_utils``."""

    kind: str = "default"  # "default" | "linear" | "dynamic" | "llama3" | "yarn"
    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    max_position: int = 2048  # the model's max_position_embeddings; "dynamic" scales beyond it
    original_max_position: int = 2048  # before scaling, for "llama3" and "yarn"
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __str__(self) -> str:
        """``"yarn, factor 4 of 32768 tokens, theta 1000000"``."""
        parts = [self.kind]
        if self.kind in ("llama3", "yarn"):
            parts.append(f"factor {self.factor:g} of {self.original_max_position} tokens")
        elif self.kind != "default":
            parts.append(f"factor {self.factor:g}")
        parts.append(f"theta {self.theta:.15g}")
        if self.partial_rotary_factor != 1.0:
            parts.append(f"{self.partial_rotary_factor:g} of the channels")
        return ", ".join(parts)


_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
_ROPE_OF_THE_MODEL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_ROPE_KEYS = (
    "rope_type", "type", *_ROPE_OF_THE_MODEL, "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip


def _read_rope(config: _Reader, max_position: int) -> RopeConfig:
    """Reads ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (earlier versions).

    transformers 5 also nests parameters by the types of a model's layers: ``{"full_attention": {...}, ...}``. The
    decoder has one RoPE for all layers, so those that the layers use must be equal.
    """
    key = _rope_key(config)
    rope = _Reader(config.object(key), f"{config.source}: {key}")
    types = config.values.get("layer_types")
    types = list(dict.fromkeys(map(str, types))) if isinstance(types, list) else []
    nested = [name for name in rope.values if name in (*_LAYER_TYPES, *types)]
    if not nested:
        return _rope_config(rope, config, max_position)
    used = [name for name in types if name in (*_LAYER_TYPES, *nested)] or nested
    found = {}
    for name in used:
        if not isinstance(rope.values.get(name), dict):
            raise rope.error(name, "an object: the RoPE of these layers")
        found[name] = _rope_config(_Reader(rope.values[name], f"{rope.source}: {name}"), config, max_position)
    first, *others = found
    for other in others:
        ours, theirs = asdict(found[first]), asdict(found[other])
        if differ := [field for field in ours if ours[field] != theirs[field]]:
            raise UnsupportedModelError(
                f"{rope.source}: {first} and {other} differ in {differ[0]}: found {ours[differ[0]]!r} and "
                f"{theirs[differ[0]]!r}; exl has models with one RoPE for all layers"
            )
    return found[first]


def _rope_key(config: _Reader) -> str:
    return "rope_parameters" if config.has("rope_parameters") else "rope_scaling"


def check_rope(rope: object) -> None:
    """Raises ``ConfigError`` unless ``rope``, which replaces what a config says, has the form for that: the dict that
    configs hold as ``rope_parameters`` or ``rope_scaling``. Its values are checked with the model's."""
    if not isinstance(rope, Mapping) or not rope:
        raise ConfigError(
            f"rope: found {rope!r}, expected a dict such as {{'rope_type': 'yarn', 'factor': 4.0}} or "
            "{'rope_theta': 1e6}, with the keys of a config's rope_parameters"
        )
    if foreign := [key for key in rope if key not in _ROPE_KEYS]:
        raise ConfigError(f"rope: found the key {foreign[0]!r}, expected {', '.join(_ROPE_KEYS)}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise ConfigError(f"rope: rope_type: found {str(kind)[:40]!r}, expected one of {', '.join(_ROPE_KINDS)}")
    scaling = [key for key in rope if key not in ("rope_theta", "partial_rotary_factor")]
    if scaling and not {"rope_type", "type"} & {*rope}:
        raise ConfigError(f"rope: found {scaling[0]!r} without 'rope_type', expected one of {', '.join(_ROPE_KINDS)}")


def _replaced_rope(config: _Reader, given: Mapping[str, Any], max_position: int) -> tuple[RopeConfig, int]:
    """The RoPE that a user gave in the place of the file's, and the model's positions with it.

    With a ``rope_type``, nothing of the file's scaling is left; what belongs to the model itself (theta, which channels
    turn, the length that it was trained at) is the file's where the user does not say. Without one, theta and channels
    are changed, and the scaling stays. A factor makes the model's length that many times the original one, as
    transformers' documentation has it; "dynamic" still stretches beyond the file's ``max_position_embeddings``.
    """
    check_rope(given)
    rope = _Reader(given, "rope")
    if not (rope.has("rope_type") or rope.has("type")):
        own = _read_rope(config, max_position)
        theta, partial = _checked_turns(rope, own.kind, own.theta, own.partial_rotary_factor)
        return replace(own, theta=theta, partial_rotary_factor=partial), max_position
    key = _rope_key(config)
    unscaled = _Reader({**config.values, key: _unscaled(config.object(key))}, config.source)
    own = _read_rope(unscaled, max_position)
    original = rope.integer("original_max_position_embeddings", own.original_max_position)
    found = _rope_config(
        _Reader(
            {
                "rope_theta": own.theta,
                "partial_rotary_factor": own.partial_rotary_factor,
                **given,
                "original_max_position_embeddings": original,
            },
            "rope",
        ),
        unscaled,
        max_position,
    )
    longest = original * found.factor
    if longest > _MAX_POSITION:
        raise rope.error("factor", f"at most {_MAX_POSITION} positions")
    return found, max(max_position, int(longest))


def _unscaled(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Without its scaling; also of parameters that are nested by the types of layers."""
    return {
        key: _unscaled(value) if isinstance(value, dict) else value
        for key, value in rope.items()
        if isinstance(value, dict) or key in _ROPE_OF_THE_MODEL
    }


def _checked_turns(rope: _Reader, kind: str, theta: float, partial: float) -> tuple[float, float]:
    """Theta and the part of the channels that turns; the arguments are what holds where ``rope`` says nothing."""
    theta, partial = rope.number("rope_theta", theta), rope.number("partial_rotary_factor", partial)
    if theta == 1.0 and kind == "yarn":
        raise rope.error("rope_theta", "a number other than 1, whose logarithm yarn divides by")
    if partial > 1.0:
        raise rope.error("partial_rotary_factor", "a number of at most 1")
    return theta, partial


def _rope_config(rope: _Reader, config: _Reader, max_position: int) -> RopeConfig:
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _ROPE_KINDS:
        raise UnsupportedModelError(
            f"{rope.source}: rope_type: found {kind[:40]!r}, expected one of {', '.join(_ROPE_KINDS)}"
        )
    original = config.integer("original_max_position_embeddings", max_position)
    original = rope.integer("original_max_position_embeddings", original)
    default_factor = max_position / original if kind == "yarn" else 1.0
    needs_factor = kind in ("linear", "dynamic", "llama3")
    low = rope.number("low_freq_factor", None if kind == "llama3" else 1.0)
    high = rope.number("high_freq_factor", None if kind == "llama3" else 4.0)
    if low == high:
        raise rope.error("high_freq_factor", f"a number other than low_freq_factor, {low!r}")
    theta, partial = _checked_turns(
        rope, kind, config.number("rope_theta", 10000.0), config.number("partial_rotary_factor", 1.0)
    )
    return RopeConfig(
        kind=kind,
        theta=theta,
        partial_rotary_factor=partial,
        factor=rope.number("factor", None if needs_factor else default_factor),
        max_position=max_position,
        original_max_position=original,
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor") if rope.has("attention_factor") else None,
        mscale=rope.number("mscale", above=False) if rope.has("mscale") else None,
        mscale_all_dim=rope.number("mscale_all_dim", above=False) if rope.has("mscale_all_dim") else None,
        truncate=rope.flag("truncate", True),
    )


@dataclass(frozen=True)
class _Family:
    """What a ``model_type`` implies, although its config does not say it."""

    qkv_bias: bool | None = False  # None: attention_bias decides, for o_proj too
    qk_norm: bool = False
    sliding_window: str = "never"  # "never" | "always": unless null | "opt_in": use_sliding_window, upper layers
    mlp_bias_key: bool = False  # whether mlp_bias is a key of this family
    default_head_dim: int | None = None


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(qkv_bias=None, mlp_bias_key=True),
    "mistral": _Family(sliding_window="always"),
    "qwen2": _Family(qkv_bias=True, sliding_window="opt_in"),
    "qwen3": _Family(qkv_bias=None, qk_norm=True, sliding_window="opt_in", default_head_dim=128),
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: everything that determines its shapes and arithmetic."""

    family: str  # Hugging Face model_type
    hidden_size: int  # C
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # Hkv
    head_dim: int  # D
    vocab_size: int  # V
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]  # [L]; a token sees itself and the window - 1 tokens before it; None: all
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @property
    def window(self) -> int | None:
        """The widest of the layers' windows; None if there is a layer that sees everything."""
        widths = [window for window in self.windows if window is not None]
        return max(widths) if len(widths) == len(self.windows) else None

    @property
    def attn_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.attn_width + 2 * self.kv_width

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> ModelConfig:
        """Reads ``config.json`` of a Hugging Face model folder."""
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], source: str = "config.json", rope: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """``rope`` replaces what ``values`` say of RoPE, see ``check_rope``. Raises ``ConfigError`` for an invalid
        value, ``UnsupportedModelError`` for a model that exl does not have."""
        read = _Reader(values, source)
        model_type = read.text("model_type", "")
        family = _FAMILIES.get(model_type)
        if family is None:
            raise UnsupportedModelError(
                f"{source}: model_type: found {model_type[:40]!r}, exl has {', '.join(sorted(_FAMILIES))}"
            )
        _refuse_other_architectures(read)
        if read.text("hidden_act", "silu") not in ("silu", "swish"):
            raise UnsupportedModelError(f"{source}: hidden_act: found {values['hidden_act']!r}, expected 'silu'")
        hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads", high=4096)
        kv_heads = read.integer("num_key_value_heads", heads, high=4096)
        if heads % kv_heads:
            raise read.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
        head_dim = read.integer("head_dim", family.default_head_dim or max(1, hidden // heads), high=4096)
        if head_dim % 2:
            derived = "" if read.has("head_dim") else f"; hidden_size / num_attention_heads is {head_dim}"
            raise read.error("head_dim", f"an even number: rotary channels come in pairs{derived}")
        num_layers = read.integer("num_hidden_layers", high=4096)
        max_position = read.integer("max_position_embeddings", 2048, high=_MAX_POSITION)
        attention_bias = read.flag("attention_bias", False)
        if rope is None:
            turns = _read_rope(read, max_position)
        else:
            turns, max_position = _replaced_rope(read, rope, max_position)
        if int(head_dim * turns.partial_rotary_factor) < 4 and turns.kind == "dynamic":
            raise read.error("head_dim", "at least 4 rotary channels for dynamic RoPE")
        return cls(
            family=model_type,
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=read.integer("vocab_size"),
            max_position=max_position,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6, above=False),
            rope=turns,
            windows=_read_windows(read, family, num_layers),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.qkv_bias is None else False,
            mlp_bias=family.mlp_bias_key and read.flag("mlp_bias", False),
            qk_norm=family.qk_norm,
            tie_embeddings=read.flag("tie_word_embeddings", False),
            bos_id=next(iter(read.token_ids("bos_token_id")), None),
            eos_ids=read.token_ids("eos_token_id"),
        )


def _refuse_other_architectures(read: _Reader) -> None:
    """Refuses a known model_type with another head (classification, reward): it would load, but generate nonsense."""
    names = read.values.get("architectures")
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise read.error("architectures", "a list of class names")
    if names and not any(name.endswith("ForCausalLM") for name in names):
        raise UnsupportedModelError(f"{read.source}: architectures: found {names[0][:60]!r}, expected a ...ForCausalLM")


def _read_windows(read: _Reader, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    if family.sliding_window == "never":
        return (None,) * num_layers
    opt_in = family.sliding_window == "opt_in"
    if opt_in and not read.flag("use_sliding_window", False):
        return (None,) * num_layers
    if "sliding_window" in read.values and read.values["sliding_window"] is None:
        return (None,) * num_layers
    window = read.integer("sliding_window", 4096, high=1 << 30)
    layer_types = read.values.get("layer_types") if opt_in else None
    if layer_types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(layer_types, list) or len(layer_types) != num_layers or set(map(str, layer_types)) - {*known}:
            raise read.error("layer_types", f"{num_layers} times one of {known}")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = read.integer("max_window_layers", 28, low=0) if opt_in else 0
    return tuple(window if i >= first else None for i in range(num_layers))


_DRAWS = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # what do_sample turns on


@dataclass(frozen=True)
class GenerationDefaults:
    """The values of ``generation_config.json``. None: absent; exl's own default applies.

    A value that exl cannot honour is ignored as if it were absent, with one warning: the file only says what happens
    if a request says nothing, so it must not keep a model from loading.
    """

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> GenerationDefaults:
        """All values are None if the folder has no such file. Raises ``ConfigError`` if it is not a JSON object."""
        path = Path(folder) / "generation_config.json"
        if not path.exists():
            return cls()
        read = _Reader(read_json(path), str(path))
        bos_ids, eos_ids = (_valid(read.token_ids, key) or () for key in ("bos_token_id", "eos_token_id"))
        # Without do_sample, decoding is greedy, whatever temperature the file gives; with it, the default temperature
        # is 1 (as in transformers).
        chosen = {"repetition_penalty": _valid(read.sampling, "repetition_penalty")}
        if _valid(read.flag, "do_sample", False):
            chosen |= {name: _valid(read.sampling, name) for name in _DRAWS}
            chosen["temperature"] = 1.0 if chosen["temperature"] is None else chosen["temperature"]
        return cls(bos_id=next(iter(bos_ids), None), eos_ids=eos_ids, **chosen)


def _valid(read: Callable[..., Any], key: str, *default: Any) -> Any:
    """A value of generation_config.json, or None with a warning that names file, key and value."""
    try:
        return read(key, *default)
    except ConfigError as error:
        _warn_once(f"{error}; it is ignored")
        return None


@functools.cache
def _warn_once(text: str) -> None:
    """Once per process: a file is read for several purposes."""
    logger.warning("%s", text)
