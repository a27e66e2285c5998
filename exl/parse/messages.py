"""Messages with tool calls, as OpenAI's clients send them, in the form that a chat template reads.

In OpenAI's protocol a call's arguments are JSON text. Most templates want the object instead, as transformers documents
it; some write the text as it is, and fail on an object. Which one, and a few other things, is found out by rendering
and reading the template once.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from exl.errors import ConfigError
from exl.text.chat_template import ChatTemplate

_KEY = "xkeyx"
_PROBE_ID = "abcdefghi"
_NINE = "IDs should be alphanumeric strings with length"  # Mistral's templates, of 2024 and 2025
_KIMI = "<|tool_call_argument_begin|>"
_KIMI_ID = re.compile(r"functions\.[^:]+:\d+")
_ALPHANUMERIC = string.digits + string.ascii_letters


@dataclass(frozen=True)
class MessageForms:
    """How a chat template reads tool calls and their results. Cheap to make, but made once for a model."""

    arguments_as_text: bool = False  # it writes a call's arguments as they are
    ids: Literal["any", "nine", "kimi"] = "any"  # nine letters and digits; functions.name:0
    developer: bool = True  # it knows this role; else its messages are the system's
    tool_responses: bool = False  # results stand in the message with the calls: Gemma 4's first templates

    @classmethod
    def of(cls, template: ChatTemplate | None) -> MessageForms:
        if template is None:
            return cls()
        try:
            written = template.literal_text
        except ConfigError:  # broken: rendering it will say so
            return cls()
        return cls(
            arguments_as_text=_wants_text(template),
            ids="nine" if _NINE in written else "kimi" if _KIMI in written else "any",
            developer="developer" in written,
            tool_responses="tool_responses" in template.source_text and "tool_call_id" not in template.source_text,
        )

    def fit(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Copies of messages in the template's form; what has nothing to do with tools stays as it is.

        A tool's result gets the ``name`` of its function, if it has none and its ``tool_call_id`` is that of an earlier
        call. ``function_call`` and the role ``function``, which came before ``tool_calls``, become these. Raises
        ``ConfigError`` that names the place for calls of another shape, and for arguments that are no JSON object.
        """
        if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
            raise ConfigError(f"messages: found {type(messages).__name__}, expected a list of objects")
        known: dict[str, tuple[str, str]] = {}  # by the id that the client uses: the name, and the template's id
        fitted: list[dict[str, Any]] = []
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise ConfigError(f"messages[{i}]: found {type(message).__name__}, expected an object")
            made = _modern(dict(message), known)
            if made.get("role") == "developer" and not self.developer:
                made["role"] = "system"
            if made.get("tool_calls"):
                made["tool_calls"] = self._calls(made["tool_calls"], f"messages[{i}].tool_calls", known)
            else:
                made.pop("tool_calls", None)  # templates ask whether it is there
            if made.get("role") == "tool":
                _name_result(made, known)
                if self.tool_responses and _joined_to_calls(made, fitted):
                    continue
            fitted.append(made)
        return fitted

    def _calls(self, calls: Any, where: str, known: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
        if isinstance(calls, str | bytes) or not isinstance(calls, Sequence):
            raise ConfigError(f"{where}: found {type(calls).__name__}, expected a list of objects")
        return [self._call(call, f"{where}[{i}]", known) for i, call in enumerate(calls)]

    def _call(self, call: Any, where: str, known: dict[str, tuple[str, str]]) -> dict[str, Any]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str) or not name:
            raise ConfigError(f'{where}: found no function with a name, expected {{"function": {{"name": ...}}}}')
        if not isinstance(client_id := call.get("id"), str | None):
            raise ConfigError(f"{where}.id: found {client_id!r}, expected a text")
        arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
        made: dict[str, Any] = {"type": "function", **call}
        made["function"] = {**function, "arguments": arguments}
        if self.arguments_as_text:
            made["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
        if client_id is not None or self.ids != "any":
            made["id"] = self._id(client_id or "", name, len(known))
            known[client_id or made["id"]] = name, made["id"]
        return made

    def _id(self, client_id: str, name: str, index: int) -> str:
        if self.ids == "nine" and not (len(client_id) == 9 and client_id.isascii() and client_id.isalnum()):
            number = int.from_bytes(hashlib.sha256(f"{index}:{client_id}".encode("utf-8", "replace")).digest(), "big")
            return "".join(_ALPHANUMERIC[number // 62**i % 62] for i in range(9))
        if self.ids == "kimi" and not _KIMI_ID.fullmatch(client_id):
            return f"functions.{name}:{index}"
        return client_id


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    if arguments is None or arguments == "":
        return {}
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}; expected the text of a JSON object") from None
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: found {type(found).__name__}, expected the text of a JSON object")
    return dict(found)


def _modern(message: dict[str, Any], known: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """A message with ``tool_calls`` in the place of ``function_call``."""
    call = message.get("function_call")
    if isinstance(call, Mapping) and not message.get("tool_calls"):
        del message["function_call"]
        message["tool_calls"] = [{"id": f"call_{len(known)}", "type": "function", "function": dict(call)}]
    if message.get("role") == "function":
        named = [call_id for call_id, (name, _) in known.items() if name == message.get("name")]
        message |= {"role": "tool", **({"tool_call_id": named[-1]} if named else {})}
    return message


def _name_result(message: dict[str, Any], known: Mapping[str, tuple[str, str]]) -> None:
    name, call_id = known.get(message.get("tool_call_id") or "", (None, None))
    if name is not None:
        message["tool_call_id"] = call_id
        if not message.get("name"):
            message["name"] = name


def _joined_to_calls(result: Mapping[str, Any], fitted: list[dict[str, Any]]) -> bool:
    """Puts a result into the message that holds the calls. False if none does."""
    if not fitted or not fitted[-1].get("tool_calls"):
        return False
    content = result.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    response = {"name": result.get("name") or "unknown", "response": content or ""}
    fitted[-1]["tool_responses"] = [*fitted[-1].get("tool_responses", ()), response]
    return True


def _wants_text(template: ChatTemplate) -> bool:
    """Whether arguments must be text: an object fails, or comes out in Python's notation, and text does not."""
    as_object = _rendered(template, {_KEY: "x"})
    if as_object is not None and f"'{_KEY}'" not in as_object:
        return False
    as_text = _rendered(template, json.dumps({_KEY: "x"}))
    return as_text is not None and f'"{_KEY}"' in as_text


def _rendered(template: ChatTemplate, arguments: Any) -> str | None:
    """A short conversation with a call that has these arguments; None if the template refuses it or leaves them out."""
    function = {"name": "f", "arguments": arguments}
    tool = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {"type": "object"}}}
    asked = {"role": "user", "content": "x"}
    calls = [{"id": _PROBE_ID, "type": "function", "function": function}]
    for content in (None, ""):
        called = {"role": "assistant", "content": content, "tool_calls": calls}
        for messages in (
            [asked, called, {"role": "tool", "tool_call_id": _PROBE_ID, "name": "f", "content": "x"}],
            [asked, called],
        ):
            try:
                text = template.render(messages, add_generation_prompt=False, tools=[tool])
            except ConfigError:
                continue
            if _KEY in text:
                return text
    return None
