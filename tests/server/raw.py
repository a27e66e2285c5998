"""Requests on a bare socket: what no HTTP client would send."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.server.running import SECONDS


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's shape, all of whose keys are there."""
        found = json.loads(self.body)["error"]
        assert found.keys() == {"message", "type", "param", "code"}
        assert isinstance(found["message"], str)
        assert found["message"]
        return found


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    parts = urlsplit(url)
    found = socket.socket()
    if receive_buffer is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    found.settimeout(SECONDS)
    found.connect((parts.hostname, parts.port))
    return found


def head(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: test", *headers, "", ""]).encode("latin-1")


def post(path: str, body: bytes, *headers: str, content_type: str = "application/json") -> bytes:
    return head("POST", path, f"Content-Type: {content_type}", f"Content-Length: {len(body)}", *headers) + body


def read_reply(connection: socket.socket, has_body: bool = True) -> Reply | None:
    """A whole answer with a Content-Length; None: the connection was closed without one."""
    data = b""
    while b"\r\n\r\n" not in data:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            piece = b""
        if not piece:
            assert not data
            return None
        data += piece
    top, _, body = data.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while has_body and len(body) < int(headers["content-length"]):
        piece = connection.recv(65536)
        assert piece, "the connection was closed in the middle of an answer"
        body += piece
    return Reply(int(first.split()[1]), headers, body)


def ask(url: str, data: bytes) -> Reply:
    """Sends bytes on a new connection, whether or not the server reads them, and returns its answer."""
    with connect(url) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer came first
            connection.sendall(data)
        reply = read_reply(connection)
    assert reply is not None
    return reply


def is_closed(connection: socket.socket) -> bool:
    """Waits for the other end to close."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def wait_for_idle(running: Any) -> None:
    """Until no request is under way: neither in the engine nor in the server."""
    for _ in range(int(SECONDS / 0.02)):
        stats = running.llm.stats()
        if stats.running == stats.waiting == 0 and running.server.num_open == 0:
            return
        time.sleep(0.02)
    raise AssertionError(f"{running.llm.stats()}, {running.server.num_open} HTTP requests")
