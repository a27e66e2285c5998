"""Who may ask: keys, pages of other sites, prefixes of proxies, certificates."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import subprocess

import httpx
import pytest

from exl.errors import ConfigError
from exl.server.app import create_app
from exl.server.gate import Keys
from exl.server.models import Models
from exl.server.options import ServerOptions
from exl.server.run import check_tls
from exl.server.state import Server
from tests.server.running import RunningServer

CHAT = "/v1/chat/completions"


class Asked:
    """An application without a model, asked without a socket."""

    def __init__(self, **options) -> None:
        self.server = Server(ServerOptions(**options), Models("stories", lambda tell: None))
        self._transport = httpx.ASGITransport(create_app(self.server), client=("10.0.0.7", 5))

    def __call__(self, method, path, headers=None, **more):
        async def ask():
            async with httpx.AsyncClient(transport=self._transport, base_url="http://server") as client:
                return await client.request(method, path, headers=headers, **more)

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def locked():
    return Asked(api_keys=("first-key", "second key ü"))


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer first-key"},
        {"x-api-key": "first-key"},
        {"authorization": "Bearer wrong", "x-api-key": "first-key"},
        {"authorization": "Basic abc", "x-api-key": "first-key"},
        {b"x-api-key": "second key ü".encode()},
    ],
)
def test_each_key_opens(locked, headers):
    assert locked("GET", "/v1/models", headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer first-ke"},
        {"authorization": "Bearer first-key2"},
        {"authorization": "first-key"},
        {"authorization": "Basic first-key"},
        {"authorization": "Bearer"},
        {"x-api-key": ""},
        {b"x-api-key": b"\xff\xfe"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("POST", CHAT),
        ("POST", "/"),
        ("POST", "/health"),
        ("GET", "/health/"),
        ("GET", "/%2Fhealth"),
        ("GET", "/nowhere"),
    ],
)
def test_nothing_else_opens(locked, method, path, headers):
    reply = locked(method, path, headers)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"].startswith("Bearer")
    assert "first-key" not in reply.text


def test_each_protocol_is_refused_in_its_own_words(locked):
    assert locked("POST", CHAT).json()["error"]["type"] == "authentication_error"
    assert locked("POST", "/v1/messages").json()["error"] == {
        "type": "authentication_error",
        "message": "the API key is missing or wrong: expected it in Authorization: Bearer KEY, or in x-api-key",
    }
    assert locked("POST", "/generate").json()["error_type"] == "generation"


def test_health_is_open(locked):
    assert locked("GET", "/health").status_code != 401


def test_every_key_is_compared_whichever_fits(monkeypatch):
    compared = []
    monkeypatch.setattr("exl.server.gate.hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert Keys(["a", "b", "c"]).admit([(b"x-api-key", b"a")])
    assert len(compared) == 3
    assert {len(digest) for pair in compared for digest in pair} == {32}  # of one length, whatever was sent


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:8000", "http://[::1]:1", "null"])
def test_pages_of_this_machine_may_ask_a_server_without_keys(origin):
    assert Asked()("GET", "/v1/models", {"origin": origin}).status_code == 200


def test_pages_of_other_names_may_not():
    """A name that was made to lead to 127.0.0.1 looks like the server's own to a browser."""
    headers = {"origin": "http://rebound.example:8000", "host": "rebound.example:8000"}
    reply = Asked()("GET", "/v1/models", headers)
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "origin_not_allowed"
    assert Asked(api_keys=("k",))("GET", "/v1/models", {**headers, "x-api-key": "k"}).status_code == 200
    assert Asked(host="0.0.0.0")("GET", "/v1/models", headers).status_code == 200


def test_cors_is_off_unless_named():
    asked = Asked()
    preflight = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in asked("OPTIONS", CHAT, preflight).headers
    assert "access-control-allow-origin" not in asked("GET", "/v1/models", preflight).headers


def test_a_named_origin_may_ask_with_a_key():
    asked = Asked(cors_origins=("https://chat.example.com",), api_keys=("k",))
    headers = {
        "origin": "https://chat.example.com",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    reply = asked("OPTIONS", CHAT, headers)  # a browser sends no key with it
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "https://chat.example.com"
    assert "authorization" in reply.headers["access-control-allow-headers"].lower()
    refused = asked("GET", "/v1/models", {"origin": "https://chat.example.com"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://chat.example.com"  # the page can read why
    other = asked("OPTIONS", CHAT, {**headers, "origin": "https://other.example.com"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("path", ["/exl/v1/models", "/v1/models"])
def test_a_prefix_may_be_taken_off_by_the_proxy_or_not(path):
    asked = Asked(root_path="/exl")
    assert asked("GET", path).json()["data"][0]["id"] == "stories"


def test_a_prefix_changes_neither_errors_nor_the_key():
    asked = Asked(root_path="/exl", api_keys=("k",))
    assert asked("POST", "/exl/v1/messages").json()["type"] == "error"  # Anthropic's shape
    assert asked("GET", "/exl/health").status_code != 401
    assert asked("GET", "/exlhealth").status_code == 401
    document = asked("GET", "/exl/openapi.json", {"x-api-key": "k"}).json()
    assert document["servers"] == [{"url": "/exl"}]
    assert CHAT in document["paths"]


def test_a_prefix_like_the_servers_own_paths_is_refused():
    with pytest.raises(ConfigError, match=r"root_path: found '/v1', with which the server's own path /v1/"):
        Asked(root_path="/v1")


def test_while_it_drains_it_tells_but_takes_nothing(locked):
    locked.server.draining = True
    try:
        key = {"x-api-key": "first-key"}
        reply = locked("POST", CHAT, key)
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "2"
        assert reply.json()["error"]["code"] == "draining"
        assert locked("GET", "/health").json() == {"status": "draining"}
        assert locked("GET", "/metrics", key).status_code == 200
        assert locked("POST", CHAT).status_code == 401  # who has no key hears nothing else
    finally:
        locked.server.draining = False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_keys": ("",)}, "api_keys: found an empty key"),
        ({"cors_origins": ("chat.example.com",)}, "cors_origins: found 'chat.example.com'"),
        ({"cors_origins": ("https://a.example/x",)}, "cors_origins"),
        ({"root_path": "exl"}, "root_path: found 'exl'"),
        ({"otlp_endpoint": "localhost"}, "otlp_endpoint: found 'localhost'"),
        ({"max_body": 0}, "max_body: found 0"),
        ({"max_connections": 0}, "max_connections: found 0"),
        ({"header_timeout": 0}, "header_timeout: found 0"),
        ({"drain_seconds": float("inf")}, "drain_seconds: found inf"),
        ({"log_format": "xml"}, "log_format: found 'xml', expected text or json"),
        ({"metrics_compat": ("tgi",)}, "metrics_compat: found 'tgi', expected vllm"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        ServerOptions(**options)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    return folder


def test_files_of_tls_are_checked_at_the_start(certificate, tmp_path):
    cert, key = certificate / "cert.pem", certificate / "key.pem"
    options = ServerOptions(tls_cert=cert, tls_key=key)
    check_tls(options)
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    with pytest.raises(ConfigError, match=r"tls_key: .*missing.pem: No such file"):
        check_tls(dataclasses.replace(options, tls_key=tmp_path / "missing.pem"))
    with pytest.raises(ConfigError, match=r"tls_cert, tls_key: .*wrong.pem.*expected a certificate and its key"):
        check_tls(dataclasses.replace(options, tls_cert=wrong))
    with pytest.raises(ConfigError, match="found one of certificate and key"):
        ServerOptions(tls_cert=cert)


def test_answers_come_over_tls(certificate, running_with_tls):
    verified = ssl.create_default_context(cafile=certificate / "cert.pem")
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    assert running_with_tls.url.startswith("https://")
    reply = httpx.post(running_with_tls.url + CHAT, json=asked, verify=verified)
    assert reply.status_code == 200
    with pytest.raises(httpx.TransportError):  # plain HTTP gets nothing
        httpx.get(running_with_tls.url.replace("https", "http") + "/health")


@pytest.fixture(scope="module")
def running_with_tls(certificate):
    cert, key = certificate / "cert.pem", certificate / "key.pem"
    with pytest.MonkeyPatch.context() as patch:
        context = ssl.create_default_context(cafile=cert)
        patch.setattr("tests.server.running.httpx", httpx.Client(verify=context))
        patch.setattr(httpx.Client, "TransportError", httpx.TransportError, raising=False)
        with RunningServer(tls_cert=cert, tls_key=key) as server:
            yield server


@pytest.mark.parametrize(
    ("options", "warns"),
    [({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_keys": ("key",)}, False), ({}, False)],
)
def test_an_open_address_without_a_key_is_warned_of(options, warns):
    with RunningServer(**options) as server:
        assert any("warning: there is no API key" in line for line in server.lines) == warns
