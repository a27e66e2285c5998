"""Anthropic's protocol: what is refused, with its name and in Anthropic's shape, and what changes nothing."""

from __future__ import annotations

import pytest

HELLO = [{"role": "user", "content": "Tell me of a dog."}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def refused(plain_chatting, body, status=400):
    response = plain_chatting.post("/v1/messages", json={"model": "chat", "max_tokens": 4, "messages": HELLO, **body})
    assert response.status_code == status, response.text
    found = response.json()
    assert found["type"] == "error"
    return found["error"]["message"]


def test_max_tokens_is_needed(plain_chatting):
    response = plain_chatting.post("/v1/messages", json={"model": "chat", "messages": HELLO})
    assert response.json()["error"] == {"type": "invalid_request_error", "message": "max_tokens: field required"}


def _user(*blocks):
    return {"messages": [{"role": "user", "content": list(blocks)}]}


_UNKNOWN_REF = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]}
_IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (_user(_IMAGE), "messages[0].content[0]: this model reads no images: the block 'image'"),
        (_user({"type": "document", "source": {}}), "messages[0].content[0]: this model reads no documents"),
        (_user({"type": "search_result"}), "messages[0].content[0]: this model reads no search results"),
        (_user({"type": "server_tool_use"}), "messages[0].content[0]: expected no block 'server_tool_use' here"),
        (_user({"text": "a"}), "messages[0].content[0].type: field required"),
        (_user({"type": "text"}), "messages[0].content[0].text: field required"),
        (_user({"type": "text", "text": "a", "bold": 1}), "messages[0].content[0].bold: unknown field"),
        (
            _user({"type": "tool_use", "id": "a", "name": "b", "input": {}}),
            "messages[0]: expected no block 'tool_use' in a message of role 'user'",
        ),
        (
            _user({"type": "tool_result", "tool_use_id": "a", "content": [_IMAGE]}),
            "messages[0].content[0].content[0]: this model reads no images",
        ),
        (_user({"type": "tool_result", "tool_use_id": "a"}), "messages[0].content: found the result of 'a'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role: input should be 'user'"),
        ({"messages": []}, "messages: list should have at least 1 item"),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": "a "}]},
            "messages: the last one, an",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}]}]},
            "messages: found thinking in the last one",
        ),
        ({"system": [_IMAGE]}, "system[0]: this model reads no images"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0]: this server has no tools",
        ),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema: field required"),
        ({"tools": [WEATHER, WEATHER]}, "tools: found the function 'get_weather' twice"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading: the model sees all tools"),
        ({"tools": [{**WEATHER, "input_examples": [{}]}]}, "tools[0].input_examples: templates have no place"),
        ({"tools": [{**WEATHER, "allowed_callers": ["a"]}]}, "tools[0].allowed_callers: only the model calls tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice: expected a name if the type is 'tool'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "b"}}, "tool_choice: found"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: found 'required', expected no tool_choice without tools"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type: input should be 'enabled'"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type: input should be 'json_schema'"),
        ({"mcp_servers": [{}]}, "mcp_servers: this server calls no others"),
        ({"container": "a"}, "container: this server runs no code"),
        ({"speed": "fast"}, "speed: there is one speed"),
        ({"inference_geo": "eu"}, "inference_geo: this server is where it is"),
        ({"diagnostics": {}}, "diagnostics: the cache is not explained"),
        ({"context_management": {"edits": [{"type": "compact"}]}}, "context_management: conversations are not edited"),
        ({"n": 2}, "n: unknown field"),
        ({"max_tokens": -1}, "max_tokens: input should be greater than or equal to 0, found -1"),
        ({"temperature": -1}, "temperature: found -1"),
        ({"timeout": -1}, "timeout: input should be greater than 0, found -1"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}},
            "output_config.format: ",
        ),
        (
            {"tools": [{**WEATHER, "input_schema": _UNKNOWN_REF}], "tool_choice": {"type": "any"}},
            "tools: at ",
        ),
        ({"stop_sequences": [""]}, "stop: found a string of 0 characters"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(plain_chatting, body, message):
    assert refused(plain_chatting, body).startswith(message)


def test_what_changes_nothing_is_taken(plain_chatting):
    body = {
        "metadata": {"user_id": "a"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "mcp_servers": [],
        "tools": [{**WEATHER, "type": "custom", "cache_control": {"type": "ephemeral"}, "eager_input_streaming": True}],
    }
    response = plain_chatting.post("/v1/messages", json={"max_tokens": 2, "messages": HELLO, **body})
    assert response.status_code == 200, response.text
