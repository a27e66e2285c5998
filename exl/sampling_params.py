"""The sampling parameters of a request, checked; and the one table of them, which API, command line, chat commands,
demo and documentation show. Quick to import: the command line shows it.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from exl.errors import ConfigError

_MAX_TEMPERATURE = 100.0
_MIN_PENALTY, _MAX_PENALTY = 0.01, 100.0
_MAX_INT = 2**31 - 1
_MAX_SEED = 2**64 - 1
MAX_STOPS = 64
_MAX_STOP_CHARS = 1024
MAX_LISTED = 1024  # token ids in one parameter
DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's and text-generation-webui's


@dataclass(frozen=True)
class Kind:
    """What the values of a parameter are."""

    name: str
    type: Any  # as a keyword
    check: Callable[[str, Any, SamplingOption], Any]  # the name, what was given -> the value as it is kept
    parse: Callable[[str], Any]  # from what was typed; raises ValueError
    typed: str  # what is expected to be typed


@dataclass(frozen=True)
class SamplingOption:
    """One parameter: what it is, for whatever shows or checks it."""

    kind: Kind
    help: str
    default: Any
    off: Any = None  # the value at which nothing is done; None: there is none
    low: float = 0
    high: float = _MAX_INT
    above: bool = False  # low itself is not allowed
    source: str = ""  # where it is defined
    aliases: Mapping[str, str] = field(default_factory=dict)  # other libraries' names -> what to say of each, or ""

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        if self.kind is NUMBER:
            return (
                f"a number {'above' if self.above else 'from'} {self.low:g}{',' if self.above else ''} to {self.high:g}"
            )
        return f"an integer from {self.low} to {self.high}" if self.kind is INTEGER else self.kind.typed

    def parsed(self, name: str, text: str) -> Any:
        """A value from what was typed for the option ``name``. Raises ``ConfigError``; ranges are not checked."""
        try:
            return self.kind.parse(text.strip())
        except ValueError:
            raise ConfigError(f"{name}: found {text.strip()!r}, expected {self.kind.typed}") from None


def _wrong(name: str, value: object, expected: str, *, is_type: bool = True) -> ConfigError:
    shown = f"{value!r} ({type(value).__name__})" if is_type else f"{value!r}"
    return ConfigError(f"{name}: found {shown}, expected {expected}")


def _check_number(name: str, value: Any, option: SamplingOption) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong(name, value, option.allowed)
    if not option.low <= value <= option.high or (option.above and value == option.low):  # a NaN fails the first
        raise _wrong(name, value, option.allowed, is_type=False)
    return float(value)


def _check_integer(name: str, value: Any, option: SamplingOption) -> int | None:
    if value is None and option.default is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong(name, value, option.allowed)
    if not option.low <= value <= option.high:
        raise _wrong(name, value, option.allowed, is_type=False)
    return int(value)


def _check_flag(name: str, value: Any, option: SamplingOption) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "True or False")
    return value


def _check_ids(name: str, value: Any, option: SamplingOption) -> tuple[int, ...]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise _wrong(name, value, "a list of token ids")
    ids = tuple(sorted({_token_id(name, token_id) for token_id in value}))
    if len(ids) > MAX_LISTED:
        raise ConfigError(f"{name}: found {len(ids)} token ids, expected at most {MAX_LISTED}")
    return ids


def _token_id(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= value <= _MAX_INT:
        raise _wrong(name, value, "token ids: integers from 0")
    return int(value)


def _check_biases(name: str, value: Any, option: SamplingOption) -> tuple[tuple[int, float], ...]:
    """Kept as pairs, so that parameters can be hashed; pairs are taken too."""
    if isinstance(value, Mapping):
        value = value.items()
    try:
        biases = {_token_id(name, token_id): bias for token_id, bias in value}
    except (TypeError, ValueError):
        raise _wrong(name, value, "a bias by token id, such as {50256: -100}") from None
    if len(biases) > MAX_LISTED:
        raise ConfigError(f"{name}: found {len(biases)} token ids, expected at most {MAX_LISTED}")
    for token_id, bias in biases.items():
        expected = f"numbers from {option.low:g} to {option.high:g}; banned_tokens forbids tokens"
        if isinstance(bias, bool) or not isinstance(bias, numbers.Real) or not option.low <= bias <= option.high:
            raise _wrong(f"{name}: token {token_id}", bias, expected, is_type=not isinstance(bias, float))
    return tuple(sorted((token_id, float(bias)) for token_id, bias in biases.items()))


def _check_texts(name: str, value: Any, option: SamplingOption) -> tuple[str, ...]:
    return checked_texts(name, value)


def _parse_flag(text: str) -> bool:
    return {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}[text.lower()]


def _flag_or_error(text: str) -> bool:
    try:
        return _parse_flag(text)
    except KeyError:
        raise ValueError from None


def _parse_ids(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",")) if text else ()


def _parse_biases(text: str) -> dict[int, float]:
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    return {int(token_id): float(bias) for token_id, _, bias in pairs}


NUMBER = Kind("number", float, _check_number, float, "a number")
INTEGER = Kind("integer", int, _check_integer, int, "a whole number")
FLAG = Kind("flag", bool, _check_flag, _flag_or_error, "on or off")
IDS = Kind("token ids", Sequence[int], _check_ids, _parse_ids, "token ids, such as 5,17")
BIASES = Kind("biases", Mapping[int, float], _check_biases, _parse_biases, "token ids and biases, such as 5=-2,17=0.5")
TEXTS = Kind("texts", str | Sequence[str], _check_texts, lambda text: (text,), "a text or a list of texts")


def _option(default: Any, kind: Kind, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"option": SamplingOption(kind, text, default, **more)})


_number = functools.partial(_option, kind=NUMBER)
_CTRL = "Keskar et al., CTRL, 2019 (arXiv 1909.05858)"
_OPENAI = "OpenAI's API reference"
_DRY = "p-e-w, text-generation-webui, pull request 5677; llama.cpp, pull request 9702"
_XTC = "p-e-w, text-generation-webui, pull request 6335"
_MIROSTAT = "Basu et al., Mirostat, 2021 (arXiv 2007.14966), version 2"
_DYNAMIC = "llama.cpp, pull request 4972"


@dataclass(frozen=True)
class SamplingParams:
    """How a request turns logits into text. The defaults leave the model's distribution unchanged. Raises
    ``ConfigError`` for a value of the wrong type or outside its range; ``OPTIONS`` is the table of both.

    The order is fixed:

    1.  Allowed tokens: a constraint's mask, ``banned_tokens``, ``min_tokens``, ``ignore_eos``. What may not be said
        takes no part in anything that follows.
    2.  ``logit_bias``: what the caller thinks of tokens, before what was said counts.
    3.  ``repetition_penalty``, then ``frequency_penalty`` and ``presence_penalty``, on the last ``penalty_window``
        tokens. The factor is defined on the model's logits, so it comes before what is subtracted.
    4.  DRY, which subtracts too.
    5.  ``top_n_sigma``: a cut on the logits themselves; the point of it is that temperature does not move it.
    6.  ``temperature``, or the dynamic one, by the entropy of what is left.
    7.  ``top_k``, then ``typical_p``, ``top_p``, which takes a share of what those keep, and ``min_p``. Or mirostat in
        the place of all four: it sets its own cut.
    8.  XTC, which its author puts after whatever cuts off the unlikely.
    9.  One draw, a function of the seed and the number of the token.

    ``temperature_last`` does 6 after 8: the filters then see the model's own distribution, as in llama.cpp.
    Temperature 0 takes the largest logit after 4 and ignores the rest.
    """

    temperature: float = _number(
        1.0,
        text="0 is greedy. Default: the model's own, else greedy.",
        high=_MAX_TEMPERATURE,
        off=1.0,
        source="Ackley et al., 1985",
        aliases={"temp": "", "do_sample": "temperature (0 is greedy)"},
    )
    dynamic_range: float = _number(
        0.0,
        text="By the entropy, a temperature from temperature - range to temperature + range; 0 is off.",
        high=_MAX_TEMPERATURE,
        off=0.0,
        source=_DYNAMIC,
        aliases={"dynatemp_range": "", "dynatemp": "", "dynamic_temperature": "dynamic_range and dynamic_exponent"},
    )
    dynamic_exponent: float = _number(
        1.0,
        text="How the dynamic temperature follows the entropy: below 1 it rises sooner.",
        high=10.0,
        source=_DYNAMIC,
        aliases={"dynatemp_exponent": ""},
    )
    temperature_last: bool = _option(
        False, FLAG, "The filters see temperature 1, and temperature comes after them.", off=False, source="llama.cpp"
    )
    top_n_sigma: float = _number(
        0.0,
        text="Only tokens whose logit is within n standard deviations of the largest; 0 is off.",
        high=100.0,
        off=0.0,
        source="Tang et al., Top-n-sigma, 2024 (arXiv 2411.07641)",
        aliases={"top_nsigma": "", "nsigma": "", "n_sigma": ""},
    )
    top_k: int = _option(
        0, INTEGER, "Only the k most likely tokens, and all ties with the k-th; 0 is off.", off=0,
        source="Fan et al., 2018 (arXiv 1805.04833)",
    )  # fmt: skip
    typical_p: float = _number(
        1.0,
        text="Only the tokens whose surprise is nearest to the expected one, up to this probability; 1 is off.",
        high=1.0,
        above=True,
        off=1.0,
        source="Meister et al., Locally Typical Sampling, 2022 (arXiv 2202.00666)",
        aliases={"typ_p": "", "typical": ""},
    )
    top_p: float = _number(
        1.0,
        text="Only the most likely tokens whose probabilities sum to p; 1 is off.",
        high=1.0,
        above=True,
        off=1.0,
        source="Holtzman et al., 2019 (arXiv 1904.09751)",
    )
    min_p: float = _number(
        0.0,
        text="Only tokens at least p times as likely as the most likely one; 0 is off.",
        high=1.0,
        off=0.0,
        source="Nguyen et al., Min-p, 2024 (arXiv 2407.01082)",
    )
    mirostat_tau: float = _number(
        0.0,
        text="Mirostat 2 holds the surprise near so many bits a token, in place of top_k, typical_p, top_p and min_p; "
        "5 is usual, 0 is off.",
        high=100.0,
        off=0.0,
        source=_MIROSTAT,
        aliases={
            "mirostat": "mirostat_tau; above 0 it turns mirostat 2 on",
            "mirostat_mode": "mirostat_tau; above 0 it turns mirostat 2 on",
            "mirostat_ent": "",
        },
    )
    mirostat_eta: float = _number(
        0.1,
        text="How fast mirostat follows.",
        high=1.0,
        above=True,
        source=_MIROSTAT,
        aliases={"mirostat_lr": ""},
    )
    xtc_probability: float = _number(
        0.0,
        text="How often XTC takes the likeliest tokens away, so that the least likely good one remains; 0 is off.",
        high=1.0,
        off=0.0,
        source=_XTC,
        aliases={"xtc_p": ""},
    )
    xtc_threshold: float = _number(
        0.1,
        text="What XTC takes for good: tokens with at least this probability; above 0.5 there is nothing to take away.",
        high=1.0,
        above=True,
        source=_XTC,
        aliases={"xtc_t": ""},
    )
    repetition_penalty: float = _number(
        1.0,
        text="Above 1: tokens that occurred before become less likely.",
        low=_MIN_PENALTY,
        high=_MAX_PENALTY,
        off=1.0,
        source=_CTRL,
        aliases={"repeat_penalty": "", "rep_pen": ""},
    )
    frequency_penalty: float = _number(
        0.0,
        text="Subtracted from a token's logit for each time that it was generated; 0 is off.",
        low=-2.0,
        high=2.0,
        off=0.0,
        source=_OPENAI,
    )
    presence_penalty: float = _number(
        0.0,
        text="Subtracted from a token's logit once it was generated; 0 is off.",
        low=-2.0,
        high=2.0,
        off=0.0,
        source=_OPENAI,
    )
    penalty_window: int = _option(
        0,
        INTEGER,
        "How many of the last tokens those three penalties count; 0: all.",
        aliases=dict.fromkeys(("repeat_last_n", "penalty_last_n", "repetition_penalty_range", "rep_pen_range"), ""),
    )
    penalize_prompt: bool = _option(
        True, FLAG, "Whether the prompt counts for repetition_penalty; it never does for frequency and presence."
    )
    dry_multiplier: float = _number(
        0.0,
        text="DRY: how much less likely tokens become that would go on with a repetition; 0.8 is usual, 0 is off.",
        high=100.0,
        off=0.0,
        source=_DRY,
    )
    dry_base: float = _number(
        1.75,
        text="DRY: the penalty grows by this factor for each further token that is repeated.",
        low=1.0,
        high=100.0,
        source=_DRY,
    )
    dry_allowed_length: int = _option(
        2, INTEGER, "DRY: repetitions shorter than this cost nothing.", low=1, source=_DRY
    )
    dry_window: int = _option(
        0, INTEGER, "DRY: how many of the last tokens are searched, the prompt's too; 0: all.", source=_DRY,
        aliases={"dry_penalty_last_n": "", "dry_range": ""},
    )  # fmt: skip
    dry_breakers: str | Sequence[str] = _option(
        DRY_BREAKERS,
        TEXTS,
        "DRY: a repetition ends at a token that contains one of these.",
        source=_DRY,
        aliases={"dry_sequence_breakers": "", "dry_sequence_breaker": ""},
    )
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = _option(
        (), BIASES, "Added to the logits of these token ids.", low=-100.0, high=100.0, off=(), source=_OPENAI
    )
    banned_tokens: Sequence[int] = _option(
        (),
        IDS,
        "Token ids that are never drawn.",
        off=(),
        aliases={"banned_token_ids": "", "suppress_tokens": "", "custom_token_bans": "", "bad_words_ids": ""},
    )
    min_tokens: int = _option(
        0, INTEGER, "The text does not end before so many new tokens.", off=0,
        aliases={"min_new_tokens": "", "min_length": ""},
    )  # fmt: skip
    ignore_eos: bool = _option(
        False, FLAG, "End-of-sequence tokens are never drawn: the text goes on.", off=False,
        aliases={"ban_eos_token": ""},
    )  # fmt: skip
    stop_token_ids: Sequence[int] = _option(
        (), IDS, "Token ids at which the text ends, beside the model's own.", off=(),
        aliases={"eos_token_id": "stop_token_ids; the model's own come from its files"},
    )  # fmt: skip
    # None draws from the system's entropy: not repeatable
    seed: int | None = _option(
        None, INTEGER, "The same seed gives the same text, on the same machine.", high=_MAX_SEED, source="exl.philox",
        aliases={"rng_seed": "", "sampling_seed": ""},
    )  # fmt: skip
    max_tokens: int = _option(
        256,
        INTEGER,
        "At most this many new tokens.",
        aliases=dict.fromkeys(
            ("max_completion_tokens", "max_length", "max_new_tokens", "n_predict", "num_predict"), ""
        ),
    )
    banned_strings: str | Sequence[str] = _option(
        (), TEXTS, "Texts that must not occur: where one has, the tokens are drawn again, another one first.", off=()
    )
    # the text ends before the first of these strings to occur; kept as a tuple
    stop: str | Sequence[str] | None = ()

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.kind.check(name, getattr(self, name), option))
        object.__setattr__(self, "stop", checked_stop(self.stop))


# All options but stop, by name, in the order in which they are shown.
OPTIONS: dict[str, SamplingOption] = {
    found.name: found.metadata["option"] for found in fields(SamplingParams) if "option" in found.metadata
}


def checked_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as ``SamplingParams`` keeps them. Raises ``ConfigError`` for anything but texts."""
    return () if stop is None else checked_texts("stop", stop)


def checked_texts(name: str, texts: Any) -> tuple[str, ...]:
    """One text or several, as a tuple. Raises ``ConfigError``."""
    if isinstance(texts, str):
        texts = (texts,)
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise _wrong(name, texts, "a text or a list of texts")
    if len(texts) > MAX_STOPS:
        raise ConfigError(f"{name}: found {len(texts)} strings, expected at most {MAX_STOPS}")
    for text in texts:
        if not isinstance(text, str):
            raise _wrong(name, text, "strings only")
        if not 1 <= len(text) <= _MAX_STOP_CHARS:
            raise ConfigError(f"{name}: found a string of {len(text)} characters, expected from 1 to {_MAX_STOP_CHARS}")
    return tuple(texts)
