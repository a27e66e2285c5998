"""What a request may ask for: the keywords of ``LLM.generate``, of chats and of everything built on them."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from exl.errors import ConfigError
from exl.sampling_params import OPTIONS, SamplingParams


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
    stop: str | Sequence[str] | None  # the text ends before the first of these to occur
    reuse_prefix: bool  # reuse what the cache still holds of the prompt: faster; equal only up to rounding on a GPU
    top_logprobs: int | None  # the log-probability of each token, and of this many likeliest ones at its position
    prompt_progress: Callable[[PromptProgress], None] | None  # called while the prompt is computed, after each layer


@dataclass(frozen=True)
class Request:
    """The options of one request, with all defaults filled in."""

    params: SamplingParams
    reuse_prefix: bool = False
    top_logprobs: int | None = None
    prompt_progress: Callable[[PromptProgress], None] | None = None

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
            found = {name: getattr(model_defaults, name, None) for name in OPTIONS}
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
        for name in ("reuse_prefix", "prompt_progress"):
            _check_kind(name, asked.get(name))
        return cls(SamplingParams(**chosen), **asked)


def _check_kind(name: str, value: object) -> None:
    if name == "prompt_progress" and value is not None and not callable(value):
        raise ConfigError(f"prompt_progress: found {value!r}, expected a function of a PromptProgress")
    if name == "reuse_prefix" and value is not None and not isinstance(value, bool):
        raise ConfigError(f"reuse_prefix: found {value!r}, expected True or False")
