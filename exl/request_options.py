"""What a request may ask for: the keywords of ``LLM.generate``, of chats and of everything built on them."""

from __future__ import annotations

import dataclasses
import math
import numbers
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from exl.errors import ConfigError
from exl.sampling_params import OPTIONS, SamplingParams

ChosenAdapter = str | Literal[False] | None  # ``lora`` of a request


@dataclass(frozen=True)
class PromptProgress:
    """How far the computation of a prompt has come. On a GPU: how much has been launched."""

    tokens: int  # that are done; while a prefill window goes through the layers, in proportion to the layers
    total: int  # tokens to compute: without those that the cache already had
    layer: int  # layers of the present window that are done
    num_layers: int


class RequestOptions(TypedDict, total=False):
    """Keywords of a request; those that ``exl.sampling_params.OPTIONS`` lists are explained there.

    A sampling option that is left out or None is taken from ``SamplingParams`` if they were given, else from the
    model's generation_config; if that has none, decoding is greedy, and filters and penalties are off.
    """

    temperature: float | None
    dynamic_range: float | None
    dynamic_exponent: float | None
    temperature_last: bool | None
    top_n_sigma: float | None
    top_k: int | None
    typical_p: float | None
    top_p: float | None
    min_p: float | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    penalty_window: int | None
    penalize_prompt: bool | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_window: int | None
    dry_breakers: str | Sequence[str] | None
    logit_bias: Mapping[int, float] | None
    banned_tokens: Sequence[int] | None
    min_tokens: int | None
    ignore_eos: bool | None
    stop_token_ids: Sequence[int] | None
    seed: int | None
    max_tokens: int | None
    banned_strings: str | Sequence[str] | None
    stop: str | Sequence[str] | None  # the text ends before the first of these to occur
    # What the cache still holds of the prompt: "exact", the default, takes what has the bits that computing it again
    # would give; True takes all there is, which is equal up to rounding where rows depend on their chunk (on a GPU, and
    # where torch computes); False takes nothing.
    reuse_prefix: bool | Literal["exact"]
    n: int | None  # answers to the same prompt, each with a seed of its own; the first is that of n=1
    best_of: int | None  # so many answers are made, and the n with the highest mean log-probability are kept
    # Beam search: the texts with the highest log-probability that a search over so many texts at once finds, as
    # transformers' generate does with options of these names. n: how many of them are told, the best first. Nothing
    # is told before the end, and no sampling option, stop string, constraint or draft goes along with it.
    num_beams: int | None
    length_penalty: float | None  # scores are divided by length ** this; 1 by default, above 0 favours longer texts
    early_stopping: bool | Literal["never"] | None  # when the search ends; False by default
    # Classifier-free guidance: the text is drawn from the logits n + guidance_scale (c - n), c being those after the
    # text, n those after the negative prompt and the same new tokens. 1, the default, is off. negative_prompt is a text
    # or token ids, by default the last token of the prompt.
    guidance_scale: float | None
    negative_prompt: str | Sequence[int] | None
    # the text must be JSON of this schema: a dictionary, JSON text or a pydantic model; True: any object
    json_schema: Any
    regex: str | None  # the text must match all of this regular expression
    grammar: str | None  # the text must follow this grammar, in Lark's syntax or llama.cpp's GBNF
    choices: Sequence[str] | None  # the text must be one of these
    after: str | Sequence[int] | None  # json_schema, regex, grammar or choices hold once this text or these ids came
    # Guesses that the model checks, several tokens a step; the text is the same. "prompt": what followed in the text
    # before; "draft", the default if the model was loaded with draft=: what that model says; False: none.
    speculate: str | Literal[False] | None
    draft_tokens: int | None  # guesses in each step; by default as many as pay, none where it does not pay
    top_logprobs: int | None  # the log-probability of each token, and of this many likeliest ones at its position
    # The log-probability of each token of the prompt but the first, and of this many likeliest ones at its position.
    # The cache has none, so such a request takes nothing from it, whatever ``reuse_prefix`` allows; with max_tokens=0
    # nothing is generated.
    prompt_logprobs: int | None
    prompt_progress: Callable[[PromptProgress], None] | None  # called while the prompt is computed, after each layer
    deadline: float | None  # seconds after which it ends as it is, with finish_reason "cancelled", limit "deadline"
    max_unread: int | None  # tokens that whoever iterates may be behind before the request waits; by default 512
    # When a text reaches the context: "stop", the default, ends it; "shift" drops about half of what lies behind its
    # first ``shift_keep`` tokens (by default 4; rounded up to pages of 64) and goes on, until max_tokens
    overflow: Literal["stop", "shift"] | None
    shift_keep: int | None
    # The name of the adapter that is to answer, of those that the model was loaded with (``lora=``); False: none. By
    # default the one that was given to ``exl.load`` without a name, else none.
    lora: ChosenAdapter


@dataclass(frozen=True)
class Request:
    """The options of one request, with all defaults filled in."""

    params: SamplingParams
    reuse_prefix: bool | Literal["exact"] = "exact"
    n: int = 1
    best_of: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    guidance_scale: float = 1.0
    negative_prompt: str | Sequence[int] | None = None
    constraint: Mapping[str, Any] = field(default_factory=dict)  # json_schema, regex, ...: those that were given
    speculate: str | Literal[False] | None = None
    draft_tokens: int | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_progress: Callable[[PromptProgress], None] | None = None
    deadline: float | None = None
    max_unread: int = 512
    overflow: Literal["stop", "shift"] = "stop"
    shift_keep: int | None = None
    lora: ChosenAdapter = None

    @classmethod
    def of(
        cls,
        params: SamplingParams | int | None,
        options: RequestOptions,
        model_defaults: object,
        **defaults: Any,
    ) -> Request:
        """``params``: a number means ``max_tokens``. Options count more than ``params``, these more than
        ``model_defaults`` (attributes that are None count nothing), and those more than ``defaults``, by option.

        Raises ``ConfigError`` for an invalid value, ``TypeError`` if ``max_tokens`` is given twice.
        """
        asked: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        base: Mapping[str, Any]
        if isinstance(params, SamplingParams):
            base = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
        else:
            searches = asked.get("num_beams", 1) != 1  # which samples nothing, whatever the model's files propose
            found = {} if searches else {name: getattr(model_defaults, name, None) for name in OPTIONS}
            base = {
                "temperature": 0.0,
                **defaults,
                **{name: value for name, value in found.items() if value is not None},
            }
            if params is not None:
                if "max_tokens" in asked:
                    raise TypeError(f"max_tokens: given twice, as {params!r} and as {asked['max_tokens']!r}")
                asked["max_tokens"] = params
        names = (*OPTIONS, "stop")
        chosen = {name: asked.pop(name, base.get(name)) for name in names if name in asked or name in base}
        if chosen.get("seed") is None:
            chosen["seed"] = secrets.randbits(63)  # reported by the completion, so that it can be repeated
        for name, check in _CHECKS.items():
            if name in asked:
                check(name, asked[name])
        request = cls(
            SamplingParams(**chosen),
            constraint={name: asked.pop(name) for name in CONSTRAINTS if name in asked},
            **asked,
        )
        if request.best_of is not None and request.best_of < request.n:
            raise ConfigError(f"best_of: found {request.best_of}, expected n, {request.n}, or more")
        check_beams(request)
        if request.guidance_scale == 1.0 and request.negative_prompt is not None:
            raise ConfigError("negative_prompt: found without guidance_scale=, or with 1, expected another scale")
        if request.guidance_scale != 1.0 and request.prompt_logprobs is not None:
            found = request.prompt_logprobs
            raise ConfigError(f"prompt_logprobs: found {found} with guidance_scale=, expected one of the two")
        if request.guidance_scale != 1.0 and request.speculate:
            raise ConfigError(f"speculate: found {request.speculate!r} with guidance_scale=, expected one of the two")
        if request.overflow == "shift":
            for name, off in (("num_beams", 1), ("guidance_scale", 1.0)):
                if (found := getattr(request, name)) != off:
                    raise ConfigError(f"{name}: found {found} with overflow='shift', expected one of the two")
            if request.speculate == "draft":
                raise ConfigError(
                    "speculate: found 'draft' with overflow='shift', with which a draft model cannot keep up: expected "
                    "'prompt' or False"
                )
            keep = DEFAULT_SHIFT_KEEP if request.shift_keep is None else request.shift_keep
            return dataclasses.replace(request, shift_keep=keep)
        if request.shift_keep is not None:
            raise ConfigError(f"shift_keep: found {request.shift_keep} without overflow='shift', expected both")
        return request


_BEAM_PARAMS = ("temperature", "max_tokens", "seed", "stop_token_ids")  # that go along with a search


def check_beams(request: Request) -> None:
    """Raises ``ConfigError`` for what a beam search cannot honour, and for its options without one."""
    if request.num_beams == 1:
        if request.length_penalty != 1.0 or request.early_stopping is not False:
            name = "length_penalty" if request.length_penalty != 1.0 else "early_stopping"
            raise ConfigError(f"{name}: found {getattr(request, name)!r} without num_beams=, expected 2 beams or more")
        return
    if request.n > request.num_beams:
        raise ConfigError(f"n: found {request.n}, expected num_beams, {request.num_beams}, or fewer")
    found: dict[str, Any] = {**request.constraint}
    if request.params.temperature != 0.0:
        found["temperature"] = request.params.temperature
    for option in dataclasses.fields(SamplingParams):
        value = getattr(request.params, option.name)
        if option.name not in _BEAM_PARAMS and value != option.default:
            found[option.name] = value
    others = {"best_of": None, "speculate": False, "draft_tokens": None, "guidance_scale": 1.0, "prompt_logprobs": None}
    for name, off in others.items():
        value = getattr(request, name)
        if value is not None and value != off:
            found[name] = value
    for name, value in found.items():
        raise ConfigError(f"{name}: found {value!r} with num_beams=, which goes without: expected one of the two")


CONSTRAINTS = ("json_schema", "regex", "grammar", "choices", "after")
SPECULATE = ("prompt", "draft")
_MAX_CHOICES = 128
_MAX_DRAFT_TOKENS = 64
DEFAULT_SHIFT_KEEP = 4  # on which attention leans (StreamingLLM, arXiv 2309.17453)
_MAX_GUIDANCE = 100.0
_MAX_LENGTH_PENALTY = 100.0


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise ConfigError(f"{name}: found {value!r}, expected a function of a PromptProgress")


def _check_reuse(name: str, value: object) -> None:
    if not isinstance(value, bool) and value != "exact":
        raise ConfigError(f"{name}: found {value!r}, expected 'exact', True or False")


def _check_count(name: str, value: object) -> None:
    most = _MAX_DRAFT_TOKENS if name == "draft_tokens" else _MAX_CHOICES
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{name}: found {value!r}, expected a whole number from 1 to {most}")


def _check_deadline(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: found {value!r}, expected a number of seconds above 0")


def _check_unread(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: found {value!r}, expected a number of tokens, 1 or more")


def _check_speculate(name: str, value: object) -> None:
    if value is not False and value not in SPECULATE:
        raise ConfigError(f"{name}: found {value!r}, expected {', '.join(map(repr, SPECULATE))} or False")


def check_lora(name: str, value: object) -> None:
    """Raises ``ConfigError`` unless it may be the name of an adapter, or False."""
    if value is not False and not (isinstance(value, str) and value):
        raise ConfigError(f"{name}: found {value!r}, expected the name of an adapter, or False for none")


def _check_overflow(name: str, value: object) -> None:
    if value not in ("stop", "shift"):
        raise ConfigError(f"{name}: found {value!r}, expected 'stop' or 'shift'")


def _check_shift_keep(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name}: found {value!r}, expected a number of tokens, 0 or more")


def _check_length_penalty(name: str, value: object) -> None:
    most = _MAX_LENGTH_PENALTY
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not -most <= value <= most:
        raise ConfigError(f"{name}: found {value!r}, expected a number from -{most:g} to {most:g}")


def _check_early_stopping(name: str, value: object) -> None:
    if not isinstance(value, bool) and value != "never":
        raise ConfigError(f"{name}: found {value!r}, expected True, False or 'never'")


def _check_guidance(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0.0 <= value <= _MAX_GUIDANCE:
        raise ConfigError(f"{name}: found {value!r}, expected a number from 0 to {_MAX_GUIDANCE:g}; 1 is off")


_CHECKS: dict[str, Callable[[str, object], None]] = {
    "reuse_prefix": _check_reuse,
    "prompt_progress": _check_callable,
    "n": _check_count,
    "best_of": _check_count,
    "draft_tokens": _check_count,
    "speculate": _check_speculate,
    "num_beams": _check_count,
    "length_penalty": _check_length_penalty,
    "early_stopping": _check_early_stopping,
    "guidance_scale": _check_guidance,
    "deadline": _check_deadline,
    "max_unread": _check_unread,
    "overflow": _check_overflow,
    "shift_keep": _check_shift_keep,
    "lora": check_lora,
}
