"""The options of quantization. Checked when made, except what depends on the model: checked when that is read."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from exl.checkpoint.quant.values import SUPPORTED_BITS
from exl.errors import ConfigError
from exl.text.chats import DOCUMENTS

_CHOICES = {
    "method": ("gptq", "rtn"),
    "checkpoint_format": ("gptq", "gptq_v2"),
    "documents": DOCUMENTS,
}


@dataclass(frozen=True)
class QuantizeOptions:
    """Raises ``ConfigError`` that names the option, what was found and what was expected."""

    bits: int = 4  # 2, 3, 4 or 8
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

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS or isinstance(self.bits, bool):
            raise ConfigError(f"bits: found {self.bits!r}, expected one of {', '.join(map(str, SUPPORTED_BITS))}")
        if self.group_size != -1:
            _check_count("group_size", self.group_size, 2, " or -1 for one group")
        _check_count("num_samples", self.num_samples, 1)
        _check_count("max_shard_bytes", self.max_shard_bytes, 1)
        if self.seq_len is not None:
            _check_count("seq_len", self.seq_len, 8)
        number = isinstance(self.damp, int | float) and not isinstance(self.damp, bool) and math.isfinite(self.damp)
        if not number or not 0 < self.damp <= 1:
            raise ConfigError(f"damp: found {self.damp!r}, expected a number above 0, at most 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        if self.method == "gptq" and self.calibration is None:
            raise ConfigError(
                "calibration: found nothing, expected a text file: GPTQ measures the layers' inputs on it"
            )


def _check_count(name: str, value: object, low: int, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name}: found {value!r}, expected a whole number of at least {low}{otherwise}")
