"""Bodies that no client should send: the right status, an error in the protocol's words that names what is wrong, and a
server that answers the next request."""

from __future__ import annotations

import json
import shutil
import threading
import time

import httpx
import pytest

from exl.checkpoint.hub import BUNDLED_MODEL
from tests.server.raw import ask, head, post, wait_for_idle
from tests.server.running import RunningServer

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me of a dog."}]
ASKED = {"messages": MESSAGES, "max_tokens": 3}


@pytest.fixture(autouse=True)
def _lives(running):
    yield
    assert httpx.post(running.url + CHAT, json=ASKED).status_code == 200
    wait_for_idle(running)


def body(**fields) -> bytes:
    return json.dumps({**ASKED, **fields}).encode()


def with_field(name: str, value: str) -> bytes:
    """``value`` as it is written."""
    return b'{"messages":[{"role":"user","content":"x"}],"max_tokens":3,"%s":%s}' % (name.encode(), value.encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"not json",
        b'{"messages": [}',
        b"\xef\xbb\xbf{}",
        b"\x00",
        b'{"messages": "\xff\xfe"}',
        b'{"messages": "\\ud800"}',
        with_field("temperature", "NaN"),
        with_field("temperature", "-Infinity"),
        b'{"messages": [{"role": "user", "content": NaN}]}',
        with_field("n", "9" * 10_000),
        b'{"messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    ],
    ids=range(14),
)
def test_what_is_no_json(running, data):
    reply = ask(running.url, post(CHAT, data))
    assert reply.status == 400
    assert reply.error["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b"[]", None),
        (b"null", None),
        (b'"x"', None),
        (b"{}", "messages"),
        (b'{"messages": 1}', "messages"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [1]}', "messages[0]"),
        (body(n="3"), "n"),
        (body(n=True), "n"),
        (body(n=10**30), "n"),
        (body(temperature="hot"), "temperature"),
        (with_field("temperature", "1e999"), "temperature"),
        (body(stream="yes"), "stream"),
        (body(model=5), "model"),
        (body(logit_bias={"a": 1}), "logit_bias"),
        (body(logit_bias=[1]), "logit_bias"),
        (body(unheard_of=1), "unheard_of"),
        (with_field("\\u0000", "1"), "'\\x00'"),
        (body(**{"x" * 100_000: 1}), None),
    ],
    ids=range(19),
)
def test_what_does_not_fit(running, data, param):
    reply = ask(running.url, post(CHAT, data))
    assert reply.status == 400
    assert param is None or reply.error["param"] == param
    assert len(reply.body) < 1000


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 10**9},
        {"n": 0},
        {"n": -1},
        {"max_tokens": -1},
        {"max_tokens": 2**31},
        {"temperature": -1},
        {"top_p": 2},
        {"logit_bias": {str(10**9): 1}},
        {"stop": ["x"] * 100_000},
        {"stop": ""},
        {"num_beams": 10**9},
        {"choices": []},
        {"regex": "("},
        {"regex": "a", "grammar": "start: A"},
        {"grammar": "%llguidance {"},
        {"shift_keep": 10**9, "overflow": "shift"},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_what_the_engine_refuses(running, fields):
    reply = ask(running.url, post(CHAT, body(**fields)))
    assert reply.status == 400
    assert next(iter(fields)).rstrip("s") in reply.error["message"]


def test_a_prompt_longer_than_the_context(running):
    reply = ask(running.url, post(CHAT, body(messages=[{"role": "user", "content": "word " * 100_000}])))
    assert reply.status == 400
    assert reply.error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("content", ["\x00", "\x00" * 100, "�", "‮" * 50, "<|im_start|>system", "\U0001f600" * 50])
def test_strange_text_is_text(running, content):
    assert ask(running.url, post(CHAT, body(messages=[{"role": "user", "content": content}]))).status == 200


def test_of_two_equal_keys_the_last_counts_as_in_every_reader_of_json(running):
    data = b'{"max_tokens":100,"messages":[{"role":"user","content":"x"}],"max_tokens":3}'
    reply = ask(running.url, post(CHAT, data))
    assert json.loads(reply.body)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_a_body_that_is_not_called_json(running, kind):
    reply = ask(running.url, post(CHAT, body(), content_type=kind))
    assert reply.status == 415
    assert reply.error["code"] == "unsupported_media_type"


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_a_body_that_is_called_json(running, kind):
    assert ask(running.url, post(CHAT, body(), content_type=kind)).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/models/%ff%fe", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("TRACE", "/health", 405),
        ("GET", f"/{'a' * 5000}", 404),
        ("GET", "/?" + "a=b&" * 5000, None),  # the page, if there is one
    ],
)
def test_paths_and_methods(running, method, path, status):
    reply = ask(running.url, head(method, path))
    assert status is None or reply.status == status
    if status is not None and reply.status >= 400:
        assert reply.error["type"] in ("not_found_error", "invalid_request_error")
        assert len(reply.body) < 1000


def test_an_unknown_model(running):
    reply = ask(running.url, post(CHAT, body(model="../../../etc/passwd")))
    assert reply.status == 404
    assert reply.error["code"] == "model_not_found"


def test_an_upgrade_to_a_web_socket_is_no_way_in(running):
    data = head("GET", "/v1/models", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    assert ask(running.url, data).status in (200, 400)


REFERENCES = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(10_000)} | {"d10000": {"type": "string"}}
EXPLODING = {
    "chain": json.dumps({"$ref": "#/$defs/d0", "$defs": REFERENCES}),
    "loop": '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}',
    "enum": json.dumps({"enum": [f"value {i}" for i in range(30_000)]}),
    "pattern": '{"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}',
    "products": json.dumps({"allOf": [{"anyOf": [{"minimum": i}, {"maxLength": i}]} for i in range(40)]}),
    "away": '{"$ref": "http://127.0.0.1:1/schema.json"}',
    "file": '{"$ref": "file:///etc/passwd"}',
    "deep": '{"type":"array","items":' * 180 + '{"type":"string"}' + "}" * 180,
    "large": json.dumps({"enum": ["x" * 1000] * 1000}),
}


@pytest.mark.parametrize("name", EXPLODING)
def test_schemas_that_explode(running, name):
    """Refused by name, or compiled within seconds; none is fetched from anywhere."""
    pytest.importorskip("llguidance")
    began = time.monotonic()
    reply = ask(running.url, post(CHAT, body(grammar=None, regex=None, **schema_field(EXPLODING[name]))))
    assert time.monotonic() - began < 20
    if reply.status != 200:
        assert reply.status == 400
        assert reply.error["message"].startswith(("json_schema", "response_format", "the body is no JSON: recursion"))
    assert (name in ("away", "file", "products", "large")) <= (reply.status == 400)


def schema_field(schema: str) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": json.loads(schema)}}}


def test_regular_expressions_that_explode_hold_nobody_up(running):
    """While many are compiled, others are answered: they wait for neither thread nor lock."""
    pytest.importorskip("llguidance")
    hard = [body(regex=f"(x{{{2000 + i}}}){{1,90}}") for i in range(16)]
    threads = [threading.Thread(target=ask, args=(running.url, post(CHAT, data))) for data in hard]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    assert httpx.post(running.url + CHAT, json=ASKED).status_code == 200
    assert time.monotonic() - began < 5
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    """A server whose model's template fails in the ways that templates do."""
    folder = tmp_path_factory.mktemp("models") / "templated"
    shutil.copytree(BUNDLED_MODEL, folder)
    template = """{%- for m in messages -%}
        {%- if m.content == 'raise' -%}{{ raise_exception('no such role here') }}{%- endif -%}
        {%- if m.content == 'missing' -%}{{ nothing.at.all }}{%- endif -%}
        {%- if m.content == 'type' -%}{{ 1 + 'x' }}{%- endif -%}
        {%- if m.content == 'escape' -%}{{ ''.__class__.__mro__[1].__subclasses__() }}{%- endif -%}
        {%- if m.content == 'long' -%}{%- for i in range(10**9) -%}x{%- endfor -%}{%- endif -%}
        {{ m.content }}
    {%- endfor -%}"""
    (folder / "chat_template.jinja").write_text(template)

    def load(progress):
        import exl

        return exl.load(folder, device="cpu", max_sequences=4, progress=progress)

    with RunningServer(load=load) as server:
        yield server


@pytest.mark.parametrize("content", ["raise", "missing", "type", "escape", "long"])
def test_errors_of_templates(templated, content):
    reply = ask(templated.url, post(CHAT, body(messages=[{"role": "user", "content": content}])))
    assert reply.status == 400
    assert "template" in reply.error["message"]
    assert httpx.post(templated.url + CHAT, json=ASKED).status_code == 200


def test_a_full_queue_is_told_with_a_time(tmp_path):
    def load(progress):
        import exl

        return exl.load(device="cpu", max_sequences=1, max_queue=1, progress=progress)

    asked = {"messages": MESSAGES, "max_tokens": 400, "stream": True}
    with RunningServer(load=load) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", CHAT, json=asked) as first:
            lines = first.iter_lines()
            next(lines)
            with client.stream("POST", CHAT, json=asked) as second:
                assert second.status_code == 200
                refused = client.post(CHAT, json=ASKED)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
        wait_for_idle(server)
        assert client.post(CHAT, json=ASKED).status_code == 200


def test_limits_of_the_server_hold_for_each_request():
    with RunningServer(max_tokens=5, timeout=0.5) as server:
        url = server.url + CHAT
        refused = httpx.post(url, json={"messages": MESSAGES, "max_tokens": 6})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == "max_tokens: found 6, this server allows 5"
        reply = httpx.post(url, json={"messages": MESSAGES})
        assert reply.json()["usage"]["completion_tokens"] == 5
