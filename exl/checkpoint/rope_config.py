"""Rotary embedding as a ``config.json`` describes it, checked once and frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exl.checkpoint.config_reader import MAX_POSITION, ConfigReader
from exl.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: frequencies, and how they are scaled for long contexts. Meanings and defaults as in
    transformers' ``modeling_rope_utils``."""

    kind: str = "default"  # "default" | "linear" | "dynamic" | "llama3" | "yarn" | "longrope" | "none": nothing turns
    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    max_position: int = 2048  # the model's max_position_embeddings; "dynamic" scales beyond it
    original_max_position: int = 2048  # before scaling, for "llama3", "yarn" and "longrope"
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # "longrope": what each frequency is divided by, up to the original length
    long_factor: tuple[float, ...] = ()  # and in longer texts
    # Queries at position p are multiplied by 1 + query_beta * ln(1 + floor(p / original length)): Ministral 3.
    query_beta: float = 0.0

    def __str__(self) -> str:
        """``"yarn, factor 4 of 32768 tokens, theta 1000000"``."""
        if self.kind == "none":
            return "none"
        parts = [self.kind]
        if self.kind in ("llama3", "yarn", "longrope"):
            parts.append(f"factor {self.factor:g} of {self.original_max_position} tokens")
        elif self.kind != "default":
            parts.append(f"factor {self.factor:g}")
        parts.append(f"theta {self.theta:.15g}")
        if self.partial_rotary_factor != 1.0:
            parts.append(f"{self.partial_rotary_factor:g} of the channels")
        return ", ".join(parts)


NO_ROPE = RopeConfig(kind="none")  # of layers that see no positions
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
_ROPE_OF_THE_MODEL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_ROPE_KEYS = (
    "rope_type", "type", *_ROPE_OF_THE_MODEL, "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor",
    "llama_4_scaling_beta",
)  # fmt: skip


def read_ropes(
    config: ConfigReader, max_position: int, given: Mapping[str, Any] | None = None
) -> tuple[dict[str, RopeConfig], int]:
    """RoPE by type of layer, and the model's positions. ``""``: of all layers whose type is not there.

    Reads ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (earlier versions).
    transformers 5 also nests parameters by the types of a model's layers: ``{"full_attention": {...}, ...}``.
    ``given`` replaces what the file says, see ``check_rope``: where layers differ, that of full attention.
    """
    types = _nested_types(config)
    if given is None:
        return _read_ropes(config, max_position, types), max_position
    which = "" if not types else "full_attention" if "full_attention" in types else types[0]
    replaced, positions = _replaced_rope(config, given, max_position, which)
    others = [name for name in types if name != which]
    return {**(_read_ropes(config, max_position, others) if others else {}), which: replaced}, positions


def _nested_types(config: ConfigReader) -> list[str]:
    """The types of layers by which RoPE's parameters are nested, of those that layers have; []: they are not."""
    rope = config.object(_rope_key(config))
    types = config.values.get("layer_types")
    types = list(dict.fromkeys(map(str, types))) if isinstance(types, list) else []
    nested = [name for name in rope if name in (*_LAYER_TYPES, *types)]
    return [name for name in types if name in (*_LAYER_TYPES, *nested)] or nested if nested else []


def _read_ropes(config: ConfigReader, max_position: int, types: Sequence[str]) -> dict[str, RopeConfig]:
    """As the file has them. ``types`` as ``_nested_types`` says."""
    key = _rope_key(config)
    rope = ConfigReader(config.object(key), f"{config.source}: {key}")
    if not types:
        return {"": _rope_config(rope, config, max_position)}
    found = {}
    for name in types:
        if not isinstance(rope.values.get(name), dict):
            raise rope.error(name, "an object: the RoPE of these layers")
        found[name] = _rope_config(ConfigReader(rope.values[name], f"{rope.source}: {name}"), config, max_position)
    return found


def _rope_key(config: ConfigReader) -> str:
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
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope: rope_type: found {str(kind)[:40]!r}, expected one of {', '.join(ROPE_KINDS)}")
    scaling = [key for key in rope if key not in ("rope_theta", "partial_rotary_factor")]
    if scaling and not {"rope_type", "type"} & {*rope}:
        raise ConfigError(f"rope: found {scaling[0]!r} without 'rope_type', expected one of {', '.join(ROPE_KINDS)}")


def _replaced_rope(
    config: ConfigReader, given: Mapping[str, Any], max_position: int, which: str
) -> tuple[RopeConfig, int]:
    """The RoPE that a user gave in the place of the file's for layers of type ``which``, and the model's positions with
    it.

    With a ``rope_type``, nothing of the file's scaling is left; what belongs to the model itself (theta, which channels
    turn, the length that it was trained at) is the file's where the user does not say. Without one, theta and channels
    are changed, and the scaling stays. A factor makes the model's length that many times the original one, as
    transformers' documentation has it; "dynamic" still stretches beyond the file's ``max_position_embeddings``.
    """
    check_rope(given)
    rope = ConfigReader(given, "rope")
    if not (rope.has("rope_type") or rope.has("type")):
        own = _read_ropes(config, max_position, [which] if which else ())[which]
        theta, partial = _checked_turns(rope, own.kind, own.theta, own.partial_rotary_factor)
        return replace(own, theta=theta, partial_rotary_factor=partial), max_position
    key = _rope_key(config)
    unscaled = ConfigReader({**config.values, key: _unscaled(config.object(key))}, config.source)
    own = _read_ropes(unscaled, max_position, [which] if which else ())[which]
    original = rope.integer("original_max_position_embeddings", own.original_max_position)
    found = _rope_config(
        ConfigReader(
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
    if longest > MAX_POSITION:
        raise rope.error("factor", f"at most {MAX_POSITION} positions")
    return found, max(max_position, int(longest))


def _unscaled(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Without its scaling; also of parameters that are nested by the types of layers."""
    return {
        key: _unscaled(value) if isinstance(value, dict) else value
        for key, value in rope.items()
        if isinstance(value, dict) or key in _ROPE_OF_THE_MODEL
    }


def _checked_turns(rope: ConfigReader, kind: str, theta: float, partial: float) -> tuple[float, float]:
    """Theta and the part of the channels that turns; the arguments are what holds where ``rope`` says nothing."""
    theta, partial = rope.number("rope_theta", theta), rope.number("partial_rotary_factor", partial)
    if theta == 1.0 and kind == "yarn":
        raise rope.error("rope_theta", "a number other than 1, whose logarithm yarn divides by")
    if partial > 1.0:
        raise rope.error("partial_rotary_factor", "a number of at most 1")
    return theta, partial


def _rope_config(rope: ConfigReader, config: ConfigReader, max_position: int) -> RopeConfig:
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(
            f"{rope.source}: rope_type: found {kind[:40]!r}, expected one of {', '.join(ROPE_KINDS)}"
        )
    original = config.integer("original_max_position_embeddings", max_position)
    original = rope.integer("original_max_position_embeddings", original)
    default_factor = max_position / original if kind in ("yarn", "longrope") else 1.0
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
        query_beta=rope.number("llama_4_scaling_beta", 0.0, above=False),
        **({name: rope.numbers(name) for name in ("short_factor", "long_factor")} if kind == "longrope" else {}),
    )


def check_factors(rope: RopeConfig, num_angles: int, source: str) -> None:
    """Raises ``ConfigError`` unless "longrope" has a factor for each of the angles of a head."""
    for name in ("short_factor", "long_factor"):
        if rope.kind == "longrope" and len(getattr(rope, name)) != num_angles:
            raise ConfigError(
                f"{source}: {name}: found {len(getattr(rope, name))} numbers, expected {num_angles}, one for each "
                "frequency"
            )
