"""An answer of /v1/chat/completions, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

from exl.parse.parts import Part, Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd
from exl.server.generation import Choice, Generation, Update
from exl.server.openai.fields import counts_of, finish_reason
from exl.server.openai.logprobs import chat_logprob, chat_logprobs
from exl.server.responses import json_bytes, sse
from exl.server.served import ServedModel
from exl.text.logprobs import TokenLogprob


def call_id(part: ToolCallBegin) -> str:
    """The model's own, or a new one."""
    return part.call_id or f"call_{uuid.uuid4().hex[:24]}"


@dataclass
class _Streamed:
    """What was told of one choice."""

    begin: bytes  # of a chunk, up to its delta
    content: bytes  # of a chunk of content, up to its text
    began: bool = False
    has_calls: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)  # that no chunk has told yet


class ChatAnswer:
    """Chunks are put together from pieces that are serialized once, since that is most of what a token costs."""

    def __init__(self, model: ServedModel, wants_usage: bool) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        self._chunk_head = self._head | {"object": "chat.completion.chunk"}
        self._wants_usage = wants_usage
        self._streamed: dict[int, _Streamed] = {}
        # ``usage`` is null in all chunks but the last, if it was asked for.
        self._close = b'}],"usage":null}\n\n' if wants_usage else b"}]}\n\n"
        self._plain = b'},"logprobs":null,"finish_reason":null' + self._close
        self._num_ended = 0

    def whole(self, choices: Sequence[Choice], generation: Generation) -> dict[str, Any]:
        shown = [_choice(i, choice) for i, choice in enumerate(choices)]
        found = {**self._head, "choices": shown, **counts_of(generation.usage)}
        if (prompt := generation.prompt_logprobs()) is not None:
            found["prompt_logprobs"] = [None if one is None else chat_logprob(one) for one in prompt]
        return found

    def chunks(self, update: Update, generation: Generation) -> bytes:
        """All that an update brings, as it is sent; nothing if it holds all back."""
        told = self._streamed.get(update.choice) or self._of(update.choice)
        found = []
        if not told.began:
            told.began = True
            found.append(self._chunk(told, {"role": "assistant", "content": ""}))
        if update.logprobs:
            told.logprobs += update.logprobs
        for part in update.parts:
            if isinstance(part, Text) and not told.logprobs:
                text = encode_basestring(part.text).encode("utf-8", "replace")
                found.append(told.content + text + self._plain)
            elif (delta := _delta(part)) is not None:
                found.append(self._chunk(told, delta))
            told.has_calls |= isinstance(part, ToolCallEnd)
        if update.outcome is not None:
            self._num_ended += 1
            reason = finish_reason(update.outcome, update.is_whole, told.has_calls)
            last = self._num_ended == generation.num_choices and not self._wants_usage
            found.append(self._chunk(told, {}, reason, generation.usage.timings() if last else None))
        return b"".join(found)

    def end(self, generation: Generation) -> bytes:
        """The chunk with the usage, if it was asked for."""
        if not self._wants_usage:
            return b""
        return sse({**self._chunk_head, "choices": [], **counts_of(generation.usage)})

    def _of(self, choice: int) -> _Streamed:
        begin = b"data: " + json_bytes(self._chunk_head)[:-1] + b',"choices":[{"index":%d,"delta":' % choice
        told = self._streamed[choice] = _Streamed(begin, begin + b'{"content":')
        return told

    def _chunk(
        self, told: _Streamed, delta: dict[str, Any], reason: str | None = None, timings: dict[str, Any] | None = None
    ) -> bytes:
        rest: dict[str, Any] = {"logprobs": None, "finish_reason": reason}
        if told.logprobs:
            rest["logprobs"] = chat_logprobs(told.logprobs)
            told.logprobs = []
        close = self._close
        if timings is not None:
            close = b'}],"timings":' + json_bytes(timings) + b"}\n\n"
        return told.begin + json_bytes(delta) + b"," + json_bytes(rest)[1:-1] + close


def _choice(index: int, choice: Choice) -> dict[str, Any]:
    has_calls = any(isinstance(part, ToolCallEnd) for part in choice.parts)
    return {
        "index": index,
        "message": _message(choice.parts),
        "logprobs": None if choice.logprobs is None else chat_logprobs(choice.logprobs),
        "finish_reason": finish_reason(choice.outcome, choice.is_whole, has_calls),
    }


def _message(parts: Sequence[Part]) -> dict[str, Any]:
    """Content is null in an answer that only calls tools."""
    text = "".join(part.text for part in parts if isinstance(part, Text))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = tool_calls(parts)
    found: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if reasoning:
        found["reasoning_content"] = reasoning
    if calls:
        found["tool_calls"] = calls
    return found


def tool_calls(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """All calls, that of a broken end too, as it was streamed."""
    found: dict[int, dict[str, Any]] = {}
    for part in parts:
        if isinstance(part, ToolCallBegin):
            function = {"name": part.name, "arguments": ""}
            found[part.index] = {"id": call_id(part), "type": "function", "function": function}
        elif isinstance(part, ToolCallArguments):
            found[part.index]["function"]["arguments"] += part.text
    return list(found.values())


def _delta(part: Part) -> dict[str, Any] | None:
    if isinstance(part, Text):
        return {"content": part.text}
    if isinstance(part, Reasoning):
        return {"reasoning_content": part.text}
    if isinstance(part, ToolCallBegin):
        function = {"name": part.name, "arguments": ""}
        return {"tool_calls": [{"index": part.index, "id": call_id(part), "type": "function", "function": function}]}
    if isinstance(part, ToolCallArguments):
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
    return None
