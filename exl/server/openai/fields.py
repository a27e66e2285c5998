"""Fields that requests to all routes which generate text share: OpenAI's names, and exl's own beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, create_model
from pydantic_core import PydanticCustomError

from exl.engine.request import Outcome
from exl.request_options import RequestOptions
from exl.sampling_params import BIASES, FLAG, IDS, INTEGER, NUMBER, OPTIONS, TEXTS
from exl.server.bodies import Body, Json
from exl.server.errors import ApiError, openai_body
from exl.server.generation import Usage
from exl.server.responses import sse
from exl.server.state import Server

MAX_TOP_LOGPROBS = 20  # OpenAI's own bound of chats

# A known field that changes nothing here.
Ignored = Annotated[Json, Field(description="Accepted; changes nothing.")]


def _writable(value: Any) -> Any:
    """JSON's parsers read 1e999 as infinity, which nothing can write."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise PydanticCustomError("unsupported", "expected what JSON can hold, at no great depth") from None
    return value


# What is written again: into a template, a grammar, an answer.
Written = Annotated[Json, AfterValidator(_writable)]
JsonObject = Annotated[dict[str, Json], AfterValidator(_writable)]


def refused(why: str, *harmless: Any) -> Any:
    """The type of a known field that would change the answer and cannot be honoured; ``harmless`` values can."""

    def check(value: Any) -> Any:
        if value is None or value in harmless:
            return value
        raise PydanticCustomError("unsupported", "{why}", {"why": why})

    return Annotated[Json, AfterValidator(check), Field(description=f"Refused: {why}.")]


Timeout = Annotated[float | None, Field(gt=0, description="Seconds after which the answer ends as it is.")]

# The names of the kinds as JSON has them; the option's own check judges ranges.
_TYPES: dict[Any, Any] = {
    NUMBER: float,
    INTEGER: int,
    FLAG: bool,
    IDS: list[int],
    BIASES: dict[str, float],
    TEXTS: str | list[str],
}


def _fields() -> dict[str, Any]:
    return {
        name: (_TYPES[option.kind] | None, Field(None, description=option.help)) for name, option in OPTIONS.items()
    }


# exl's sampling options under their own names, which are also OpenAI's where that has them.
SamplingFields: type[BaseModel] = create_model("SamplingFields", __base__=Body, **_fields())


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class GenerationFields(SamplingFields):  # type: ignore[valid-type, misc]
    """What may be asked of any text."""

    model: str | None = None
    stream: bool | None = False
    n: int | None = None
    stop: str | list[str] | None = None
    # exl's own
    best_of: int | None = None
    json_schema: Json = None
    regex: str | None = None
    grammar: str | None = None
    choices: list[str] | None = None
    after: str | list[int] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    reuse_prefix: bool | str | None = None
    speculate: str | bool | None = None
    draft_tokens: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    overflow: str | None = None
    shift_keep: int | None = None
    timeout: Timeout = None


_OWN = (
    *("n", "best_of", "stop", "json_schema", "regex", "grammar", "choices", "after", "prompt_logprobs", "reuse_prefix"),
    *("speculate", "draft_tokens", "num_beams", "length_penalty", "early_stopping", "guidance_scale"),
    *("negative_prompt", "overflow", "shift_keep"),
)


def request_options(server: Server, body: Any, room: int, default_tokens: int | None = None) -> RequestOptions:
    """The engine's options for a body with ``GenerationFields``. ``room``: tokens that the context has left;
    ``default_tokens``: of an answer whose request does not say; None: all the room. Raises ``ApiError``."""
    found: dict[str, Any] = {}
    for name in (*OPTIONS, *_OWN):
        value = getattr(body, name, None)
        if value is not None:
            found[name] = value
    if isinstance(found.get("stop"), str):
        found["stop"] = [found["stop"]]
    if "logit_bias" in found:
        found["logit_bias"] = _biases(found["logit_bias"])
    most = server.options.max_tokens
    if body.stream and found.get("best_of", 1) > found.get("n", 1):
        raise ApiError(400, f"best_of: found {found['best_of']} with stream, expected one of the two", param="best_of")
    asked = found.get("max_tokens")
    if asked is not None and most is not None and asked > most:
        raise ApiError(400, f"max_tokens: found {asked}, this server allows {most}", param="max_tokens")
    if asked is None:
        wanted = max(1, room) if default_tokens is None else default_tokens
        found["max_tokens"] = wanted if most is None else min(wanted, most)
    limits = [seconds for seconds in (body.timeout, server.options.timeout) if seconds is not None]
    if limits:
        found["deadline"] = min(limits)
    return found  # type: ignore[return-value]


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token_id): bias for token_id, bias in given.items()}
    except ValueError:
        bad = next(key for key in given if not key.lstrip("-").isdigit())
        raise ApiError(400, f"logit_bias: found the key {bad!r}, expected token ids", param="logit_bias") from None


def openai_event(error: ApiError) -> bytes:
    """The last event of a stream that has failed."""
    return sse(openai_body(error))


def counts_of(usage: Usage) -> dict[str, Any]:
    """The fields of an answer that tell what it took: OpenAI's and llama-server's."""
    return {"usage": _usage(usage), "timings": usage.timings()}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_generated,
        "total_tokens": usage.num_prompt + usage.num_generated,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached},
        "completion_tokens_details": {
            "reasoning_tokens": usage.num_reasoning,
            "accepted_prediction_tokens": usage.num_accepted,
            "rejected_prediction_tokens": usage.num_drafted - usage.num_accepted,
        },
    }


def finish_reason(outcome: Outcome | None, is_whole: bool, has_calls: bool) -> str:
    """OpenAI's word. An answer that its deadline has ended, and one that the model has ended inside a tool call, are
    told as "length": clients know no other word for what is not all there, and do not run half a call."""
    if outcome is None or outcome.finish_reason != "stop" or not is_whole:
        return "length"
    return "tool_calls" if has_calls else "stop"
