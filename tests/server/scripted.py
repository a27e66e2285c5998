"""A server that answers what a test tells it to: what a real one does too rarely, or never should."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        self.server.owner.answer(self, None)

    def do_POST(self) -> None:
        self.server.owner.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


class ScriptedServer:
    """A context manager. ``script`` has the answers to the next POSTs; ``model`` is the one of ``/v1/models``."""

    def __init__(self) -> None:
        self.script: list[Answer] = []
        self.models: list[Answer] = []  # the next answers to /v1/models, before ``model``
        self.model: dict[str, Any] = {"id": "scripted", "max_model_len": 100}
        self.asked: list[dict[str, Any]] = []  # bodies of POSTs
        self.headers: list[dict[str, str]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.owner = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    def answer(self, handler: Handler, body: Any) -> None:
        self.headers.append(dict(handler.headers))
        if body is not None:
            self.asked.append(body)
            self.script.pop(0)(handler)
        elif self.models:
            self.models.pop(0)(handler)
        else:
            models(self.model)(handler)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def models(*found: dict[str, Any]) -> Answer:
    return lambda handler: handler.reply(200, json.dumps({"object": "list", "data": found}).encode())


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    body = {"error": {"message": message, "type": "x", "param": None, "code": code}}
    return lambda handler: handler.reply(status, json.dumps(body).encode(), **headers)


def raw(data: bytes, status: int = 200) -> Answer:
    return lambda handler: handler.reply(status, data, "text/event-stream")


def stream(*deltas: dict[str, Any], usage: dict[str, Any] | None = None, end: str = "data: [DONE]\n\n") -> Answer:
    """Each delta in a chunk of its own. ``end=""``: the stream breaks off."""
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    if end:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if usage is not None:
        chunks.append({"choices": [], "usage": usage})
    return raw(("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end).encode())
