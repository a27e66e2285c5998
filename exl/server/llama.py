"""llama-server's small routes: ``/tokenize``, ``/detokenize``, ``/apply-template``, ``/props``, ``/slots``
(tools/server/README.md of ggml-org/llama.cpp). ``/tokenize`` is text-generation-inference's, too: the body tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

import exl
from exl.request_options import Request as EngineRequest
from exl.sampling_params import SamplingParams
from exl.server.bodies import Body, json_body, read_body
from exl.server.errors import ApiError, told_as
from exl.server.openai.begin import TEMPLATE_NAMES, check_template_kwargs
from exl.server.openai.fields import JsonObject
from exl.server.openai.messages import Message, Tool
from exl.server.responses import json_response
from exl.server.served import ServedModel
from exl.server.state import Server

_FLAGS = ("add_special", "parse_special", "with_pieces")
_RANDOM_SEED = 2**32 - 1  # llama-server's word for no seed

# What llama-server calls exl's sampling options where it has another name.
_LLAMA_NAMES = {
    "dynamic_range": "dynatemp_range",
    "dynamic_exponent": "dynatemp_exponent",
    "repetition_penalty": "repeat_penalty",
    "penalty_window": "repeat_last_n",
    "dry_window": "dry_penalty_last_n",
    "dry_breakers": "dry_sequence_breakers",
}
_SAME_NAMES = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold"),
    *("presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base", "dry_allowed_length"),
    *("mirostat_tau", "mirostat_eta", "ignore_eos"),
)


class TokenizeRequest(Body):
    """llama-server's, with ``content``, or text-generation-inference's, with ``inputs``."""

    content: str | None = None
    inputs: str | None = Field(None, description="text-generation-inference's word: tokens with places in the text.")
    add_special: bool | None = Field(None, description="What the model expects before a text, BOS; false by default.")
    parse_special: bool | None = Field(None, description="Special tokens in the text are such; true by default.")
    with_pieces: bool | None = Field(None, description="Each token with its text; false by default.")
    model: str | None = None


class DetokenizeRequest(Body):
    tokens: list[int]
    model: str | None = None


class ApplyTemplateRequest(Body):
    """The fields of /v1/chat/completions that the template sees."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: JsonObject | None = Field(None, description="Further variables of the template.")
    model: str | None = None


BODIES: tuple[type[BaseModel], ...] = (TokenizeRequest, DetokenizeRequest, ApplyTemplateRequest)


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize", openapi_extra=json_body(TokenizeRequest), summary="The tokens of a text")
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeRequest)
        async with server.models.use(body.model) as model:
            return json_response(await server.in_thread(lambda: _tokens(model, body)))

    @routes.post("/detokenize", openapi_extra=json_body(DetokenizeRequest), summary="The text of tokens")
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeRequest)
        async with server.models.use(body.model) as model:
            return json_response({"content": await server.in_thread(lambda: _text(model, body.tokens))})

    @routes.post(
        "/apply-template", openapi_extra=json_body(ApplyTemplateRequest), summary="A conversation as the model reads it"
    )
    async def apply_template(request: Request) -> Response:
        body = await read_body(request, ApplyTemplateRequest)
        async with server.models.use(body.model) as model:
            return json_response({"prompt": await server.in_thread(lambda: _rendered(model, body))})

    @routes.get("/props", summary="What the server would do with a request that says nothing")
    async def props(model: str | None = None) -> Response:
        async with server.models.use(model) as served:
            return json_response(_props(server, served))

    @routes.get("/slots", summary="How many sequences run; 503 with fail_on_no_slot=1 if no more can")
    async def slots(model: str | None = None, fail_on_no_slot: str | None = None) -> Response:
        async with server.models.use(model) as served:
            shown = _slots(served)
        if fail_on_no_slot == "1" and all(slot["is_processing"] for slot in shown):
            raise ApiError(503, f"all {len(shown)} slots are busy", code="no_slot")
        return json_response(shown)

    return routes


# Tokens


def _tokens(model: ServedModel, body: TokenizeRequest) -> Any:
    if (body.content is None) == (body.inputs is None):
        found = "neither of the two" if body.content is None else "both"
        expected = "content (llama-server's) or inputs (text-generation-inference's)"
        raise ApiError(400, f"content, inputs: found {found}, expected {expected}", code="invalid_value")
    if body.content is not None:
        return {"tokens": _llama_tokens(model, body)}
    for name in _FLAGS:
        if getattr(body, name) is not None:
            raise ApiError(400, f"{name}: found with inputs, expected with content", code="invalid_value", param=name)
    return _tgi_tokens(model, body.inputs or "")


def _llama_tokens(model: ServedModel, body: TokenizeRequest) -> list[Any]:
    tokenizer = model.llm.tokenizer
    special = body.parse_special is not False
    ids = tokenizer.encode(body.content or "", bos=bool(body.add_special), special=special)
    return [{"id": i, "piece": _piece(tokenizer.token_bytes(i))} for i in ids] if body.with_pieces else ids


def _piece(data: bytes) -> str | list[int]:
    """As llama-server tells it: a text, or the bytes of what is only a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _tgi_tokens(model: ServedModel, text: str) -> list[dict[str, Any]]:
    """Those that ``/generate`` takes for the text. ``start`` and ``stop`` count its characters; a BOS that the text
    itself does not hold has none."""
    spans = model.llm.tokenizer.encode_spans(text)
    ids = model.text_prompt(text)
    spans = [(token_id, 0, 0) for token_id in ids[: len(ids) - len(spans)]] + spans
    return [{"id": i, "text": text[start:stop], "start": start, "stop": stop} for i, start, stop in spans]


def _text(model: ServedModel, tokens: Sequence[int]) -> str:
    """With the special tokens as they are written."""
    tokenizer = model.llm.tokenizer
    for i, token_id in enumerate(tokens):
        if not 0 <= token_id < tokenizer.vocab_size or tokenizer.id_to_token(token_id) is None:
            expected = f"the id of a token, below {tokenizer.vocab_size}"
            raise ApiError(400, f"tokens[{i}]: found {token_id}, expected {expected}", param=f"tokens[{i}]")
    return tokenizer.decode(tokens, skip_special_tokens=False)


def _rendered(model: ServedModel, body: ApplyTemplateRequest) -> str:
    check_template_kwargs(model, body.chat_template_kwargs)
    messages = [message.for_template() for message in body.messages]
    tools = [tool.for_template() for tool in body.tools or ()] or None
    with told_as(TEMPLATE_NAMES):
        return model.chat_text(messages, tools, body.chat_template_kwargs, body.add_generation_prompt is not False)


# The server


def _props(server: Server, model: ServedModel) -> dict[str, Any]:
    """No path of the machine's: of the model's folder the name alone."""
    tokenizer = model.llm.tokenizer
    names = tokenizer.names
    template = "" if tokenizer.chat_template is None else tokenizer.chat_template.text()
    bos = names.get("bos_token") or (None if tokenizer.bos_id is None else tokenizer.id_to_token(tokenizer.bos_id))
    eos = names.get("eos_token") or next(map(tokenizer.id_to_token, tokenizer.eos_ids), None)
    return {
        "default_generation_settings": {
            "id": 0,
            "id_task": -1,
            "n_ctx": model.context,
            "speculative": False,
            "is_processing": False,
            "params": _params(server, model),
        },
        "total_slots": model.llm.max_sequences,
        "model_alias": model.name,
        "model_path": model.llm.folder.name,
        "chat_template": template,
        "bos_token": bos or "",
        "eos_token": eos or "",
        "modalities": {"vision": False, "audio": False},
        "build_info": f"exl {exl.__version__}",
        "is_sleeping": False,
    }


def _params(server: Server, model: ServedModel) -> dict[str, Any]:
    params: SamplingParams = EngineRequest.of(None, {}, model.llm.defaults).params
    most = -1 if server.options.max_tokens is None else server.options.max_tokens
    found: dict[str, Any] = {name: getattr(params, name) for name in _SAME_NAMES}
    found |= {theirs: getattr(params, ours) for ours, theirs in _LLAMA_NAMES.items()}
    return {**found, "seed": _RANDOM_SEED, "n_predict": most, "max_tokens": most, "stop": []}


def _slots(model: ServedModel) -> list[dict[str, Any]]:
    """A slot is room for one sequence. Which sequence has which slot means nothing to exl: those that run are counted
    first. Nobody's prompt or settings are told."""
    running = model.llm.stats().running
    return [
        {"id": i, "n_ctx": model.context, "is_processing": i < running, "speculative": False}
        for i in range(model.llm.max_sequences)
    ]
