"""A Hugging Face hub on 127.0.0.1, as far as huggingface_hub needs it. Records the requests and the bytes sent."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 1 << 16
ORG = "somebody"  # who has the repositories of most tests


@dataclass
class Hub:
    """``repos``: repository id -> folder. ``fault``: what the server does wrong with safetensors files."""

    repos: dict[str, Path]
    tokens: dict[str, str] = field(default_factory=dict)  # of gated repositories, by repository id
    fault: str = ""
    sent: dict[str, int] = field(default_factory=dict)  # bytes of bodies, by file name; "api" for the API
    ranges: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # first and last byte, by file name
    authorizations: set[str | None] = field(default_factory=set)
    endpoint: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/cdn/"):
            assert self.headers.get("Authorization") is None, "a token has left the hub"
        else:
            self.hub.authorizations.add(self.headers.get("Authorization"))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, kind, revision = match.groups()
            if self._allowed(repo, revision or "main"):
                self._answer_api(self.hub.repos[repo], repo, kind)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = match.groups()
            if self._allowed(repo, revision, COMMIT):
                elsewhere = f"http://localhost:{self.server.server_address[1]}/cdn/{repo}/{name}"
                self._answer_file(self.hub.repos[repo] / name, elsewhere)
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._answer_body(self.hub.repos[match[1]] / match[2])
        else:
            self._error(404, "EntryNotFound")

    def _allowed(self, repo: str, revision: str, *known: str) -> bool:
        if repo not in self.hub.repos:
            self._error(401, "RepoNotFound")
        elif repo in self.hub.tokens and self.headers.get("Authorization") != f"Bearer {self.hub.tokens[repo]}":
            self._error(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        elif revision not in ("main", "v1", COMMIT):
            self._error(404, "RevisionNotFound")
        else:
            return True
        return False

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer_api(self, folder: Path, repo: str, kind: str | None) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        sizes = [path.stat().st_size for path in files]
        if kind == "tree":
            answer: object = [
                {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}
                for name, size in zip(names, sizes, strict=True)
            ]
        else:
            siblings = [{"rfilename": name, "size": size} for name, size in zip(names, sizes, strict=True)]
            answer = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._send("api", body)

    def _answer_file(self, path: Path, elsewhere: str) -> None:
        if not path.is_file():
            self._error(404, "EntryNotFound")
            return
        large = path.suffix == ".safetensors"  # as on the hub, large files are on another host
        if not large and self.command == "GET":
            self._answer_body(path)
            return
        self.send_response(302 if large else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(path.name.encode()).hexdigest()}"')
        if large:
            self.send_header("X-Linked-Size", str(path.stat().st_size))
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(path.name.encode()).hexdigest()}"')
            self.send_header("Location", elsewhere)
        self.send_header("Content-Length", "0" if large else str(path.stat().st_size))
        self.end_headers()

    def _answer_body(self, path: Path) -> None:
        size = path.stat().st_size
        fault = self.hub.fault if path.suffix == ".safetensors" else ""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or fault == "ignores ranges":
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            with open(path, "rb") as file:
                while self.command == "GET" and (block := file.read(BLOCK)):
                    self._send(path.name, block)
            return
        first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        self.hub.ranges.setdefault(path.name, []).append((first, last))
        with open(path, "rb") as file:
            file.seek(first)
            body = file.read(last + 1 - first)
        if fault == "fails once" and len(self.hub.ranges[path.name]) == 1:
            self._error(503, "Later")
            return
        told = first + 1 if fault == "wrong range" else first
        total = size + len(self.hub.ranges[path.name]) if fault == "wrong total" else size
        self.send_response(206)
        if fault != "no range":
            self.send_header("Content-Range", f"bytes {told}-{last}/{total}")
        if fault == "gzip":
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        if fault == "too much":
            body += bytes(1000)
        if fault == "too little":
            body = body[:-1]
        num_bytes = len(body) + (1 if fault == "cut off" else 0)
        self.send_header("Content-Length", str(num_bytes))
        if fault == "cut off":
            self.close_connection = True
        self.end_headers()
        self._send(path.name, body)

    def _send(self, name: str, body: bytes) -> None:
        with self.hub.lock:
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(body)
        try:
            self.wfile.write(body)
        except OSError:  # the client closed the connection early
            self.close_connection = True
            raise
