"""An answer of /v1/responses: its items, and the events that tell how they came to be."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from exl.engine.request import Outcome
from exl.parse.parts import Part, Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd
from exl.server.errors import ApiError
from exl.server.generation import Usage
from exl.server.openai.chat_answer import call_id
from exl.server.openai.fields import finish_reason
from exl.server.openai.logprobs import chat_logprob
from exl.server.responses import sse
from exl.text.logprobs import TokenLogprob


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


class ResponseAnswer:
    """Takes parts, keeps the items that they make, and gives the events of each, in OpenAI's order."""

    def __init__(self, echoed: dict[str, Any], with_logprobs: bool) -> None:
        """``echoed``: what the response repeats of its request."""
        self._response: dict[str, Any] = {
            "id": _new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **echoed,
        }
        self._with_logprobs = with_logprobs
        self._logprobs: list[TokenLogprob] = []  # that no text has told yet
        self._told_logprobs: list[Any] = []  # of the open item's text
        self._open: dict[str, Any] | None = None  # the last item, which is not whole
        self._pieces: list[str] = []  # of its text
        self._number = 0

    @property
    def response(self) -> dict[str, Any]:
        return self._response

    def begin(self) -> bytes:
        return self._told("response.created", response=self._response) + self._told(
            "response.in_progress", response=self._response
        )

    def take(self, parts: Sequence[Part], logprobs: Sequence[TokenLogprob] | None) -> bytes:
        """The events of an update. ``logprobs``: of its tokens."""
        if self._with_logprobs and logprobs:
            self._logprobs += logprobs
        return b"".join(map(self._take, parts))

    def end(self, outcome: Outcome | None, is_whole: bool, usage: Usage) -> bytes:
        """The last events. What is not all there is "incomplete"."""
        ended = finish_reason(outcome, is_whole, has_calls=False) == "stop"
        events = b"" if self._response["output"] else self._add_text("message", "response.output_text.delta", "")
        events += self._close(is_whole=ended)
        status = "completed" if ended else "incomplete"
        if not ended:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._response |= {"status": status, "usage": _usage(usage), "timings": usage.timings()}
        self._response["completed_at"] = int(time.time()) if ended else None
        return events + self._told(f"response.{status}", response=self._response)

    def fail(self, error: ApiError) -> bytes:
        told = self._told("error", code=error.code, message=error.message, param=error.param)
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return told + self._told("response.failed", response=self._response)

    def _take(self, part: Part) -> bytes:
        if isinstance(part, Text):
            return self._add_text("message", "response.output_text.delta", part.text)
        if isinstance(part, Reasoning):
            return self._add_text("reasoning", "response.reasoning_text.delta", part.text)
        if isinstance(part, ToolCallBegin):
            new = {"type": "function_call", "id": _new_id("fc"), "call_id": call_id(part), "name": part.name}
            return self._close() + self._begin({**new, "arguments": "", "status": "in_progress"})
        if isinstance(part, ToolCallArguments):
            self._pieces.append(part.text)
            return self._of_item("response.function_call_arguments.delta", delta=part.text)
        assert isinstance(part, ToolCallEnd)
        return self._close(is_whole=True)

    def _add_text(self, kind: str, event: str, text: str) -> bytes:
        events = b""
        if self._open is None or self._open["type"] != kind:
            events = self._close() + self._begin(_new_item(kind)) + self._of_part("added", _new_part(kind))
        self._pieces.append(text)
        more = {}
        if kind == "message":
            told = [chat_logprob(token) for token in self._logprobs]
            self._logprobs = []
            self._told_logprobs += told
            more["logprobs"] = told
        return events + self._of_item(event, content_index=0, delta=text, **more)

    def _begin(self, item: dict[str, Any]) -> bytes:
        told = self._told("response.output_item.added", output_index=len(self._response["output"]), item=dict(item))
        self._response["output"].append(item)
        self._open, self._pieces, self._told_logprobs = item, [], []
        return told

    def _close(self, *, is_whole: bool | None = None) -> bytes:
        """The last events of the item that is open, if there is one. A call that something else follows is not whole;
        texts are."""
        item, text = self._open, "".join(self._pieces)
        if item is None:
            return b""
        if is_whole is None:
            is_whole = item["type"] != "function_call"
        item["status"] = "completed" if is_whole else "incomplete"
        if item["type"] == "function_call":
            item["arguments"] = text
            events = self._of_item("response.function_call_arguments.done", name=item["name"], arguments=text)
        else:
            part = _new_part(item["type"]) | {"text": text}
            more = {}
            if item["type"] == "message":
                more["logprobs"] = part["logprobs"] = self._told_logprobs
            item["content"] = [part]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            events = self._of_item(f"response.{kind}.done", content_index=0, text=text, **more)
            events += self._of_part("done", part)
        events += self._told("response.output_item.done", output_index=self._index, item=item)
        self._open = None
        return events

    @property
    def _index(self) -> int:
        return len(self._response["output"]) - 1

    def _of_item(self, event: str, **values: Any) -> bytes:
        assert self._open is not None
        return self._told(event, item_id=self._open["id"], output_index=self._index, **values)

    def _of_part(self, event: str, part: dict[str, Any]) -> bytes:
        return self._of_item(f"response.content_part.{event}", content_index=0, part=part)

    def _told(self, event: str, **values: Any) -> bytes:
        self._number += 1
        return sse({"type": event, "sequence_number": self._number - 1, **values}, event)


def _new_item(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": kind, "id": _new_id("rs"), "summary": [], "content": [], "status": "in_progress"}
    return {"type": kind, "id": _new_id("msg"), "role": "assistant", "content": [], "status": "in_progress"}


def _new_part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
        "output_tokens": usage.num_generated,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning},
        "total_tokens": usage.num_prompt + usage.num_generated,
    }
