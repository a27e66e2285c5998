"""The sampling parameters of a request, checked; and the table of them. Quick to import: the command line shows it."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from exl.errors import ConfigError

_MAX_TEMPERATURE = 100.0
_MIN_PENALTY, _MAX_PENALTY = 0.01, 100.0
_MAX_INT = 2**31 - 1
_MAX_SEED = 2**64 - 1
_MAX_STRINGS = 64
_MAX_STRING_CHARS = 1024


@dataclass(frozen=True)
class SamplingOption:
    """One option of a request, for whatever shows them: a command line, a form."""

    kind: type[float] | type[int]
    help: str


def _option(default: Any, kind: type[float] | type[int], text: str) -> Any:
    return field(default=default, metadata={"option": SamplingOption(kind, text)})


@dataclass(frozen=True)
class SamplingParams:
    """How a request turns logits into text. The defaults leave the model's distribution unchanged.

    Order: repetition penalty, temperature, top-k, top-p, min-p, then one draw. Raises ``ConfigError`` for a value of
    the wrong type or outside its range.
    """

    # 0 to 100; 0 takes the likeliest token and ignores top_k, top_p, min_p and seed
    temperature: float = _option(1.0, float, "0 is greedy. Default: the model's own, else greedy.")
    # keeps the k likeliest tokens, and all ties with the k-th; 0 is off
    top_k: int = _option(0, int, "Only the k most likely tokens; 0 is off.")
    # above 0, to 1; keeps the fewest likeliest tokens whose total probability reaches it; 1 is off
    top_p: float = _option(1.0, float, "Only the most likely tokens whose probabilities sum to p; 1 is off.")
    # 0 to 1; keeps tokens at least this many times as likely as the likeliest; 0 is off
    min_p: float = _option(0.0, float, "Only tokens at least p times as likely as the most likely one; 0 is off.")
    # 0.01 to 100; divides positive, multiplies negative logits of seen tokens
    repetition_penalty: float = _option(1.0, float, "Above 1: tokens that occurred before become less likely.")
    # 0 to 2**64-1; None draws from the system's entropy: not repeatable
    seed: int | None = _option(None, int, "The same seed gives the same text, on the same machine.")
    # at most this many new tokens; 0: none
    max_tokens: int = _option(256, int, "At most this many new tokens.")
    # the text ends before the first of these strings to occur; kept as a tuple
    stop: str | Sequence[str] | None = ()

    def __post_init__(self) -> None:
        self._check_number("temperature", 0.0, _MAX_TEMPERATURE)
        self._check_number("top_p", 0.0, 1.0, above=True)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("repetition_penalty", _MIN_PENALTY, _MAX_PENALTY)
        self._check_integer("top_k", _MAX_INT)
        self._check_integer("max_tokens", _MAX_INT)
        if self.seed is not None:
            self._check_integer("seed", _MAX_SEED)
        object.__setattr__(self, "stop", checked_stop(self.stop))

    def _check_number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        expected = f"a number {'above' if above else 'from'} {low:g}{',' if above else ''} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ConfigError(f"{name}: found {value!r} ({type(value).__name__}), expected {expected}")
        if not low <= value <= high or (above and value == low):  # a NaN fails the first comparison
            raise ConfigError(f"{name}: found {value!r}, expected {expected}")
        object.__setattr__(self, name, float(value))

    def _check_integer(self, name: str, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ConfigError(f"{name}: found {value!r} ({type(value).__name__}), expected an integer from 0 to {high}")
        if not 0 <= value <= high:
            raise ConfigError(f"{name}: found {value!r}, expected an integer from 0 to {high}")
        object.__setattr__(self, name, int(value))


# The options that are one number each, by name, in the order in which they are shown.
OPTIONS: dict[str, SamplingOption] = {
    found.name: found.metadata["option"] for found in fields(SamplingParams) if "option" in found.metadata
}


def checked_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as ``SamplingParams`` keeps them. Raises ``ConfigError`` for anything but texts."""
    return checked_strings("stop", stop)


def checked_strings(name: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    """The texts of an option: one text, or a list of them. Raises ``ConfigError`` for anything else."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise ConfigError(f"{name}: found {value!r} ({type(value).__name__}), expected a text or a list of texts")
    if len(value) > _MAX_STRINGS:
        raise ConfigError(f"{name}: found {len(value)} strings, expected at most {_MAX_STRINGS}")
    for text in value:
        if not isinstance(text, str):
            raise ConfigError(f"{name}: found {text!r} ({type(text).__name__}), expected strings only")
        if not 1 <= len(text) <= _MAX_STRING_CHARS:
            found = f"{name}: found a string of {len(text)} characters"
            raise ConfigError(f"{found}, expected from 1 to {_MAX_STRING_CHARS}")
    return tuple(value)
