"""An answer of /v1/messages, whole or as events (docs.anthropic.com/en/docs/build-with-claude/streaming)."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from json.encoder import encode_basestring  # type: ignore[attr-defined]
from typing import Any

from pydantic_core import from_json

from exl.engine.request import Outcome
from exl.parse.parts import Part, Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd
from exl.server.generation import Choice, Generation, Update, Usage
from exl.server.responses import sse

PING = sse({"type": "ping"}, "ping")
# Nobody checks it: thinking comes back as the client has it. Clients want the field.
_SIGNATURE = "exl"


class MessageAnswer:
    """Blocks begin and end with the parts of the answer: neighbours of one kind are one block."""

    def __init__(self, model: str, stop_sequences: Sequence[str], omits_thinking: bool) -> None:
        self._model, self._id = model, f"msg_{uuid.uuid4().hex[:24]}"
        self._stop, self._omits_thinking = stop_sequences, omits_thinking
        self._index = -1  # of the block that was begun last
        self._open: str | None = None  # the type of the block that is open
        self._has_calls = False

    def whole(self, choice: Choice, usage: Usage) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = []
        arguments: list[str] = []  # of the last call
        for part in choice.parts:
            if self._begins(part):
                blocks.append(self._begin(part))
                arguments.clear()
            if isinstance(part, Text):
                blocks[-1]["text"] += part.text
            elif isinstance(part, Reasoning):
                blocks[-1]["signature"] = _SIGNATURE
                blocks[-1]["thinking"] += "" if self._omits_thinking else part.text
            elif isinstance(part, ToolCallArguments):
                arguments.append(part.text)
                blocks[-1]["input"] = _input("".join(arguments))
            elif isinstance(part, ToolCallEnd):
                self._end_call()
        return {**self._message(blocks), **self._stopped(choice.outcome, choice.is_whole), "usage": _usage(usage)}

    def start(self, num_prompt: int) -> bytes:
        """Sent at once; how much of the prompt the cache had is told at the end."""
        usage = {
            "input_tokens": num_prompt,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        message = {**self._message([]), "stop_reason": None, "stop_sequence": None, "usage": usage}
        return sse({"type": "message_start", "message": message}, "message_start") + PING

    def events(self, update: Update, generation: Generation) -> bytes:
        """All that an update brings, as it is sent; nothing if it holds all back."""
        found: list[bytes] = []
        for part in update.parts:
            if self._begins(part):
                found.append(self._close())
                block = self._begin(part)
                start = {"type": "content_block_start", "index": self._index, "content_block": block}
                found.append(sse(start, "content_block_start"))
            if isinstance(part, Text):
                found.append(self._delta("text_delta", "text", part.text))
            elif isinstance(part, Reasoning) and not self._omits_thinking:
                found.append(self._delta("thinking_delta", "thinking", part.text))
            elif isinstance(part, ToolCallArguments):
                found.append(self._delta("input_json_delta", "partial_json", part.text))
            elif isinstance(part, ToolCallEnd):
                found.append(self._close())
                self._end_call()
        if update.outcome is not None:
            found.append(self._close())
            delta = self._stopped(update.outcome, update.is_whole)
            end = {"type": "message_delta", "delta": delta, "usage": _usage(generation.usage)}
            found += [sse(end, "message_delta"), sse({"type": "message_stop"}, "message_stop")]
        return b"".join(found)

    def _message(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": blocks}

    def _begins(self, part: Part) -> bool:
        """Whether a part begins another block."""
        if isinstance(part, Text):
            return self._open != "text"
        if isinstance(part, Reasoning):
            return self._open != "thinking"
        return isinstance(part, ToolCallBegin)

    def _begin(self, part: Part) -> dict[str, Any]:
        self._index += 1
        if isinstance(part, ToolCallBegin):
            self._open = "tool_use"
            call_id = part.call_id or f"toolu_{uuid.uuid4().hex[:24]}"
            return {"type": "tool_use", "id": call_id, "name": part.name, "input": {}}
        if isinstance(part, Reasoning):
            self._open = "thinking"
            return {"type": "thinking", "thinking": "", "signature": ""}
        self._open = "text"
        return {"type": "text", "text": ""}

    def _end_call(self) -> None:
        self._open, self._has_calls = None, True

    def _close(self) -> bytes:
        """The end of the block that is open, if one is."""
        if self._open is None:
            return b""
        end = sse({"type": "content_block_stop", "index": self._index}, "content_block_stop")
        if self._open == "thinking":
            end = self._delta("signature_delta", "signature", _SIGNATURE) + end
        self._open = None
        return end

    def _delta(self, kind: str, key: str, text: str) -> bytes:
        """Put together by hand, since there is one for each token."""
        written = encode_basestring(text).encode("utf-8", "replace")
        head = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,' % self._index
        return head + b'"delta":{"type":"%b","%b":%b}}\n\n' % (kind.encode(), key.encode(), written)

    def _stopped(self, outcome: Outcome | None, is_whole: bool) -> dict[str, Any]:
        """An answer that its deadline has ended, and one that the model has ended inside a tool call, are told as
        "max_tokens": clients know no other word for what is not all there, and do not run half a call."""
        reason, sequence = "max_tokens", None
        if outcome is not None and outcome.limit == "context":
            reason = "model_context_window_exceeded"
        elif outcome is not None and outcome.finish_reason == "stop" and is_whole:
            reason = "tool_use" if self._has_calls else "end_turn"
            if outcome.stop_reason in self._stop:
                reason, sequence = "stop_sequence", outcome.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence}


def _input(text: str) -> Any:
    """Of a call that was cut off, as much as there is, as the client's own reader of streams has it."""
    return from_json(text, allow_partial=True) if text.strip() else {}


def _usage(usage: Usage) -> dict[str, Any]:
    """All tokens of the prompt are the sum of the three kinds of input."""
    return {
        "input_tokens": usage.num_prompt - usage.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached,
        "output_tokens": usage.num_generated,
        "output_tokens_details": {"thinking_tokens": usage.num_reasoning},
    }
