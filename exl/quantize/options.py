"""The options of quantization. Checked when made, except what depends on the model: checked when that is read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from exl.checkpoint.quant.values import SUPPORTED_BITS
from exl.errors import ConfigError
from exl.quantize.overrides import Override, Settings
from exl.text.chats import DOCUMENTS

_CHOICES = {
    "method": ("gptq", "rtn"),
    "checkpoint_format": ("gptq", "gptq_v2"),
    "documents": DOCUMENTS,
}


@dataclass(frozen=True)
class QuantizeOptions:
    """Raises ``ConfigError`` that names the option, what was found and what was expected."""

    bits: int | None = None  # 2, 3, 4 or 8; None: 4, or, with target_bits, what is measured to be best
    group_size: int = 128  # inputs that share a scale; -1: all
    act_order: bool = True  # GPTQ rounds the inputs that matter most first
    static_groups: bool = True  # with act_order, groups stay consecutive inputs: no cost at inference
    match_dense: bool = True  # GPTQ's target is the dense model's outputs at this place; takes twice the time
    sym: bool = False  # one fixed zero, 2^(bits - 1)
    calibration: str | os.PathLike[str] | None = None  # path of UTF-8 text; GPTQ needs it
    documents: str = "auto"  # what the text holds, as read_calibration explains: lines, packed, whole, chats
    num_samples: int = 128  # num_samples * seq_len is about the number of tokens taken from the text
    seq_len: int | None = None  # at most this many tokens per sequence; None: 2048, or the model's maximum if less
    damp: float = 0.01  # added to the Hessian's diagonal, relative to its mean
    method: str = "gptq"  # "rtn": round to nearest, from the weights alone
    checkpoint_format: str = "gptq"  # "gptq": stores zero - 1, which every loader reads; "gptq_v2": stores zero
    max_shard_bytes: int = 4_000_000_000
    # Settings of single modules, "PATTERN=bits:8,group_size:32" or "PATTERN=dense". PATTERN is a regular expression
    # that matches from the start of a module's name. The first that matches decides, those with "dense" before others.
    overrides: Sequence[str] = ()
    # The average number of bits per quantized weight, scales and zeros not counted: linears get bits of their own,
    # of ``bit_choices``, more where the measured error is larger (``sensitivity.py``).
    target_bits: float | None = None
    bit_choices: Sequence[int] | None = None  # None, with target_bits: 2, 3, 4 and 8

    def __post_init__(self) -> None:
        self._check_bits()
        if self.group_size != -1:
            _check_count("group_size", self.group_size, 2, " or -1 for one group")
        _check_count("num_samples", self.num_samples, 1)
        _check_count("max_shard_bytes", self.max_shard_bytes, 1)
        if self.seq_len is not None:
            _check_count("seq_len", self.seq_len, 8)
        if not _is_number(self.damp) or not 0 < self.damp <= 1:
            raise ConfigError(f"damp: found {self.damp!r}, expected a number above 0, at most 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        if self.method == "gptq" and self.calibration is None:
            raise ConfigError(
                "calibration: found nothing, expected a text file: GPTQ measures the layers' inputs on it"
            )
        if isinstance(self.overrides, str) or not all(isinstance(text, str) for text in self.overrides):
            raise ConfigError(f"overrides: found {self.overrides!r}, expected a sequence of strings")
        object.__setattr__(self, "overrides", tuple(self.overrides))
        patterns = [override.pattern for override in self.parsed_overrides]
        for pattern in patterns:
            if patterns.count(pattern) > 1:  # ``dynamic`` has one entry of a name
                raise ConfigError(f"overrides: found {pattern!r} {patterns.count(pattern)} times, expected it once")

    def _check_bits(self) -> None:
        if self.target_bits is None:
            if self.bits is None:
                object.__setattr__(self, "bits", 4)
            if self.bit_choices is not None:
                raise ConfigError("bit_choices: found some, which have no meaning without target_bits")
            _check_width("bits", self.bits)
            return
        if self.bits is not None:
            raise ConfigError(f"bits: found {self.bits}, expected none beside target_bits, which chooses them")
        choices = SUPPORTED_BITS if self.bit_choices is None else tuple(self.bit_choices)
        for width in choices:
            _check_width("bit_choices", width)
        if len(set(choices)) < 2:
            raise ConfigError(f"bit_choices: found {choices!r}, expected at least two different ones")
        object.__setattr__(self, "bit_choices", tuple(sorted(set(choices))))
        low, high = self.bit_choices[0], self.bit_choices[-1]
        if not _is_number(self.target_bits) or not low <= self.target_bits <= high:
            raise ConfigError(f"target_bits: found {self.target_bits!r}, expected a number from {low} to {high}")
        if self.method != "gptq":
            raise ConfigError(f"target_bits: found method {self.method!r}, expected gptq: errors are measured on text")

    @property
    def reference_bits(self) -> int:
        """With ``target_bits``: the nearest choice that is not above it."""
        return max(width for width in self.bit_choices if width <= self.target_bits)

    @property
    def settings(self) -> Settings:
        """Of modules that no override names; with ``target_bits`` before they are chosen."""
        return Settings(self.reference_bits if self.bits is None else self.bits, self.group_size, self.sym)

    @cached_property
    def parsed_overrides(self) -> tuple[Override, ...]:
        return tuple(Override.parse(text) for text in self.overrides)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_width(name: str, value: object) -> None:
    if value not in SUPPORTED_BITS or isinstance(value, bool):
        raise ConfigError(f"{name}: found {value!r}, expected one of {', '.join(map(str, SUPPORTED_BITS))}")


def _check_count(name: str, value: object, low: int, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name}: found {value!r}, expected a whole number of at least {low}{otherwise}")
