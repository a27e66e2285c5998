"""text-generation-inference's protocol: ``/generate``, ``/generate_stream``, ``POST /``, ``/info``
(docs/openapi.json of huggingface/text-generation-inference). Its ``/tokenize`` is in ``llama.py``.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

import exl
from exl.checkpoint.header import shown
from exl.completion import Completion
from exl.engine.request import Outcome
from exl.request_options import RequestOptions
from exl.sampling_params import MAX_STOPS
from exl.server.bodies import Body, Json, json_body, read_body
from exl.server.errors import ApiError, tgi_body, told_as
from exl.server.generation import Choice, Generation, Job, Update
from exl.server.openai.fields import MAX_TOP_LOGPROBS, GenerationFields, refused, request_options
from exl.server.responses import EventStream, json_response, sse, unless_gone
from exl.server.served import ServedModel
from exl.server.state import Server
from exl.text.logprobs import TokenLogprob
from exl.text.sink import TextSink

_DEFAULT_TOKENS = 100  # of an answer whose request does not say, as text-generation-inference has it
# Where a request has what exl calls so, for errors.
_FIELDS = {
    "prompt": "inputs",
    "max_tokens": "parameters.max_new_tokens",
    "json_schema": "parameters.grammar.value",
    "regex": "parameters.grammar.value",
}


class Grammar(Body):
    type: Literal["json", "json_schema", "regex"]
    value: Json


class GenerateParameters(Body):
    """What is left out is off, whatever the model's generation_config proposes: so it is there."""

    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool | None = Field(None, description="Greedy if it, temperature, top_k, top_p and typical_p are out.")
    temperature: float | None = Field(None, gt=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    return_full_text: bool | None = Field(None, description="The prompt before the text; POST / does so by default.")
    truncate: int | None = Field(None, ge=1, description="Only the last so many tokens of the prompt, BOS among them.")
    best_of: int | None = Field(None, ge=1)
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    grammar: Grammar | None = None
    watermark: refused("exl marks no texts", False) = None  # type: ignore[valid-type]
    adapter_id: str | None = Field(None, description="The name of an adapter that the server was started with.")


class GenerateRequest(Body):
    inputs: str
    parameters: GenerateParameters | None = None
    stream: bool | None = None


BODIES: tuple[type[BaseModel], ...] = (GenerateRequest,)


def router(server: Server) -> APIRouter:
    routes = APIRouter()
    body_of = json_body(GenerateRequest)

    @routes.post("/generate", openapi_extra=body_of, summary="Continues a text")
    async def generate(request: Request) -> Response:
        return await _answer(server, request, await _read(request, stream=False))

    @routes.post("/generate_stream", openapi_extra=body_of, summary="Continues a text, token by token")
    async def generate_stream(request: Request) -> Response:
        return await _answer(server, request, await _read(request, stream=True))

    @routes.post("/", openapi_extra=body_of, summary="/generate or /generate_stream, as the body's stream says")
    async def either(request: Request) -> Response:
        body = await read_body(request, GenerateRequest)
        parameters = body.parameters or GenerateParameters()
        if parameters.return_full_text is None:
            parameters.return_full_text = True
        body.parameters = parameters
        return await _answer(server, request, body, as_list=True)

    @routes.get("/info", summary="The model that text-generation-inference's clients get, and limits")
    async def info() -> Response:
        async with server.models.use(None) as model:
            return json_response(_info(server, model))

    return routes


async def _read(request: Request, *, stream: bool) -> GenerateRequest:
    body = await read_body(request, GenerateRequest)
    if body.stream is not None and body.stream != stream:
        path = request.scope["path"]
        raise ApiError(400, f"stream: found {body.stream} at {path}, expected {stream} or nothing", param="stream")
    body.stream = stream
    return body


async def _answer(server: Server, request: Request, body: GenerateRequest, *, as_list: bool = False) -> Response:
    """``as_list``: a list with the one answer, as ``POST /`` gives it."""
    parameters = body.parameters or GenerateParameters()
    _check(parameters, bool(body.stream))
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(server.models.use(_adapter(server, parameters.adapter_id)))
        prompt = await server.in_thread(lambda: _prompt(model, body.inputs, parameters.truncate))
        with told_as(_FIELDS):
            options = _options(server, model, body, parameters, len(prompt))
            generation = await Generation.begin(server, model, Job(prompt, options), request.scope["journey"])
        stack.callback(generation.close)
        told = _Told(model, prompt, body.inputs if parameters.return_full_text else "", parameters)
        if not body.stream:
            choices = await unless_gone(request, generation.choices())
            answer = told.whole(choices, generation)
            return json_response([answer] if as_list else answer, headers=_headers(body.inputs, generation))
        return EventStream(_events(told, generation), lambda error: sse(tgi_body(error)), stack.pop_all())


# Requests


def _check(parameters: GenerateParameters, stream: bool) -> None:
    if (parameters.best_of or 1) > 1 and not _samples(parameters):
        found = f"best_of: found {parameters.best_of} with greedy decoding"
        raise ApiError(400, f"{found}, expected do_sample, temperature, top_k, top_p or typical_p", param="best_of")
    for name, asked in (
        ("best_of", (parameters.best_of or 1) > 1),
        ("decoder_input_details", bool(parameters.decoder_input_details)),
    ):
        if stream and asked:
            found = f"{name}: found {getattr(parameters, name)} in a stream"
            raise ApiError(400, f"{found}, expected one of the two", param=name)


def _adapter(server: Server, name: str | None) -> str | None:
    """None: the model itself answers. Raises ``ApiError`` for a name that no adapter has: also another model's."""
    if name is None or name in server.models.adapters:
        return name
    text = f"adapter_id: found {shown(name)}, this server has {server.models.known_adapters()}"
    raise ApiError(400, text, param="adapter_id")


def _samples(parameters: GenerateParameters) -> bool:
    filters = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.typical_p)
    return bool(parameters.do_sample) or any(value is not None for value in filters)


def _prompt(model: ServedModel, text: str, truncate: int | None) -> list[int]:
    """Cut at its beginning, but for what the model expects before every text: as transformers truncates at the left."""
    ids = model.text_prompt(text)
    if truncate is None or len(ids) <= truncate:
        return ids
    prefix = model.llm.encode("")[:truncate]
    return prefix + ids[len(ids) - (truncate - len(prefix)) :]


def _options(
    server: Server, model: ServedModel, body: GenerateRequest, parameters: GenerateParameters, num_prompt: int
) -> RequestOptions:
    best_of = parameters.best_of if (parameters.best_of or 1) > 1 else None
    fields = GenerationFields(
        max_tokens=parameters.max_new_tokens,
        temperature=_or(parameters.temperature, 1.0) if _samples(parameters) else 0.0,
        top_k=_or(parameters.top_k, 0),
        top_p=_or(parameters.top_p, 1.0),
        typical_p=_or(parameters.typical_p, 1.0),
        repetition_penalty=_or(parameters.repetition_penalty, 1.0),
        frequency_penalty=_or(parameters.frequency_penalty, 0.0),
        seed=parameters.seed,
        stop=parameters.stop or None,
        n=best_of,
        best_of=best_of,
        prompt_logprobs=0 if parameters.decoder_input_details else None,
    )
    options = request_options(server, fields, model.context - num_prompt, _DEFAULT_TOKENS)
    if body.stream or _wants_details(parameters):
        options["top_logprobs"] = parameters.top_n_tokens or 0
    if parameters.grammar is not None:
        name, value = _constraint(parameters.grammar)
        options[name] = value  # type: ignore[literal-required]
    return options


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _wants_details(parameters: GenerateParameters) -> bool:
    return bool(parameters.details or parameters.decoder_input_details)


def _constraint(grammar: Grammar) -> tuple[str, Any]:
    value = grammar.value
    if grammar.type == "json_schema":
        if not isinstance(value, dict) or "schema" not in value:
            raise ApiError(400, "parameters.grammar.value: expected an object with a schema", param="grammar")
        return "json_schema", value["schema"]
    expected = (dict, str) if grammar.type == "json" else (str,)
    if not isinstance(value, expected):
        wanted = "a schema" if grammar.type == "json" else "a text"
        found = type(value).__name__
        raise ApiError(400, f"parameters.grammar.value: found {found}, expected {wanted}", param="grammar")
    return ("json_schema" if grammar.type == "json" else "regex"), value


# Answers


class _Sequence:
    """The tokens of one answer in text-generation-inference's words, and their text, with that of a stop string."""

    def __init__(self, model: ServedModel, prompt: Sequence[int]) -> None:
        self._tokenizer = model.llm.tokenizer
        self._sink = TextSink(self._tokenizer, prompt)
        self.text = ""
        self.num_tokens = 0

    def token(self, token_id: int, logprob: TokenLogprob | None) -> dict[str, Any]:
        """``text``: what the token adds, so that all pieces join to the answer; of a special one, how it is written."""
        piece = self._sink.push(token_id).text
        self.text += piece
        return self._shown(token_id, piece, logprob)

    def end_token(self, outcome: Outcome) -> dict[str, Any] | None:
        """The end-of-sequence token that ended the answer, which exl's own answers do not hold. Nobody has ranked it,
        so its logprob is null. None: something else ended it."""
        return self._shown(outcome.stop_reason, "", None) if isinstance(outcome.stop_reason, int) else None

    def no_token(self) -> dict[str, Any]:
        """For the last event of a stream if no token has come with it: at a deadline, or where a grammar has ended."""
        token_id = next(iter(self._tokenizer.eos_ids), 0)
        return {"id": token_id, "text": "", "logprob": None, "special": True}

    def finish(self) -> str:
        self.text += self._sink.finish()
        return self.text

    def _shown(self, token_id: int, text: str, logprob: TokenLogprob | None) -> dict[str, Any]:
        self.num_tokens += 1
        is_special = token_id in self._tokenizer.special_ids
        text = self._tokenizer.id_to_token(token_id) or "" if is_special else text
        return {
            "id": token_id,
            "text": text,
            "logprob": None if logprob is None else logprob.logprob,
            "special": is_special,
        }

    def top_tokens(self, logprob: TokenLogprob) -> list[dict[str, Any]]:
        special = self._tokenizer.special_ids
        return [
            {"id": one.token_id, "text": one.text, "logprob": one.logprob, "special": one.token_id in special}
            for one in logprob.alternatives
        ]


class _Told:
    """A request's answer, whole or token by token."""

    def __init__(self, model: ServedModel, prompt: Sequence[int], before: str, parameters: GenerateParameters) -> None:
        """``before``: stands before the text of each answer."""
        self._model, self._prompt, self._before = model, prompt, before
        self._parameters = parameters
        self._stop = tuple(parameters.stop or ())
        self._samples = _samples(parameters)
        self._wants_top = bool(parameters.top_n_tokens)
        self._streamed = _Sequence(model, prompt)
        self._kept: dict[str, Any] | None = None  # the last event, until it is known how the answer has ended

    def whole(self, choices: Sequence[Choice], generation: Generation) -> dict[str, Any]:
        best = generation.completion()
        ended = best.choices or (best,)
        prefill = self._prefill(generation)
        (text, details), *others = [self._one(choice, one, prefill) for choice, one in zip(choices, ended, strict=True)]
        if not _wants_details(self._parameters):
            return {"generated_text": text}
        if others:
            details["best_of_sequences"] = [{"generated_text": text, **found} for text, found in others]
        return {"generated_text": text, "details": details}

    def _one(self, choice: Choice, completion: Completion, prefill: list[Any]) -> tuple[str, dict[str, Any]]:
        sequence, outcome = _Sequence(self._model, self._prompt), choice.outcome or Outcome("cancelled")
        logprobs: Sequence[TokenLogprob | None] = choice.logprobs or [None] * len(choice.token_ids)
        tokens = [sequence.token(i, logprob) for i, logprob in zip(choice.token_ids, logprobs, strict=True)]
        end = sequence.end_token(outcome)
        tokens += [] if end is None else [end]
        details: dict[str, Any] = {
            "finish_reason": self._reason(outcome),
            "generated_tokens": sequence.num_tokens,
            "seed": completion.seed if self._samples else None,
            "prefill": prefill,
            "tokens": tokens,
        }
        if self._wants_top:
            tops = [sequence.top_tokens(logprob) for logprob in choice.logprobs or ()]
            details["top_tokens"] = tops + ([] if end is None else [[]])
        return self._before + sequence.finish(), details

    def _prefill(self, generation: Generation) -> list[dict[str, Any]]:
        ranked = generation.prompt_logprobs() or []
        tokenizer = self._model.llm.tokenizer
        return [
            {
                "id": token_id,
                "text": tokenizer.token_bytes(token_id).decode("utf-8", "replace"),
                "logprob": None if one is None else one.logprob,
            }
            for token_id, one in zip(self._prompt, ranked, strict=False)  # none, if they were not asked for
        ]

    def events(self, update: Update, generation: Generation) -> list[dict[str, Any]]:
        """The last event has the whole text, so a token is kept back while its answer is known to have ended, until it
        is told how."""
        sequence = self._streamed
        events = [] if self._kept is None else [self._kept]
        self._kept = None
        for token_id, logprob in zip(update.token_ids, update.logprobs or (), strict=True):
            events.append(self._event(sequence.token(token_id, logprob), logprob))
        if update.outcome is not None:
            end = sequence.end_token(update.outcome)
            if end is not None or not events:
                events.append(self._event(end or sequence.no_token(), None))
            events[-1]["generated_text"] = self._before + sequence.finish()
            if self._parameters.details:
                events[-1]["details"] = self._stream_details(update.outcome, generation)
        elif events and generation.is_ending(update.choice):
            self._kept = events.pop()
        return events

    def _event(self, token: dict[str, Any], logprob: TokenLogprob | None) -> dict[str, Any]:
        event = {"index": self._streamed.num_tokens, "token": token, "generated_text": None, "details": None}
        if self._wants_top and logprob is not None:
            event["top_tokens"] = self._streamed.top_tokens(logprob)
        return event

    def _stream_details(self, outcome: Outcome, generation: Generation) -> dict[str, Any]:
        return {
            "finish_reason": self._reason(outcome),
            "generated_tokens": self._streamed.num_tokens,
            "input_length": len(self._prompt),
            "seed": generation.seed if self._samples else None,
        }

    def _reason(self, outcome: Outcome) -> str:
        """An answer that its deadline has ended is told as "length": clients know no other word."""
        if outcome.finish_reason != "stop":
            return "length"
        return "stop_sequence" if outcome.stop_reason in self._stop else "eos_token"


async def _events(told: _Told, generation: Generation) -> AsyncGenerator[bytes, None]:
    async for update in generation.updates():
        for event in told.events(update, generation):
            yield sse(event)


def _headers(inputs: str, generation: Generation) -> dict[str, str]:
    """Times in milliseconds."""
    journey, now = generation.journey, time.perf_counter()
    began = journey.began or journey.submitted or now
    submitted = min(began, journey.submitted or now)  # the engine may begin before the loop hears that it was asked
    times = {
        "x-compute-time": now - journey.arrived,
        "x-total-time": now - journey.arrived,
        "x-validation-time": submitted - journey.arrived,
        "x-queue-time": began - submitted,
        "x-inference-time": now - began,
        "x-time-per-token": (now - began) / max(1, journey.num_generated),
    }
    counts = {
        "x-compute-characters": len(inputs),
        "x-prompt-tokens": journey.num_prompt,
        "x-generated-tokens": journey.num_generated,
    }
    return {name: str(round(seconds * 1e3)) for name, seconds in times.items()} | {
        name: str(count) for name, count in counts.items()
    }


def _info(server: Server, model: ServedModel) -> dict[str, Any]:
    num_sequences = model.llm.max_sequences
    return {
        "model_id": model.name,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": num_sequences + server.options.max_queue,
        "max_best_of": num_sequences,
        "max_stop_sequences": MAX_STOPS,
        "max_input_tokens": model.context - 1,
        "max_total_tokens": model.context,
        "max_client_batch_size": 1,
        "validation_workers": 1,
        "router": "exl",
        "version": exl.__version__,
    }
