"""Who may ask, and when: keys, pages of other sites, and a server that is about to end. Holds for every route."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from exl.server.errors import RETRY_SECONDS, ApiError
from exl.server.options import ServerOptions
from exl.server.state import Server

# Without a key: whether the server lives, and the page, which holds nothing of anybody's.
_OPEN_PATHS = ("/health", "/")
_READING = ("GET", "HEAD", "OPTIONS")
_DRAINING = "the server is about to end and takes no more requests"


class Prefix:
    """Takes ``--root-path`` off, if the proxy before the server has not. All others see the server's own paths."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"] if scope["type"] == "http" else ""
        if self._prefix and (path == self._prefix or path.startswith(f"{self._prefix}/")):
            scope = {**scope, "path": path[len(self._prefix) :] or "/", "raw_path": None}
        await self._app(scope, receive, send)


class Gate:
    """Raises ``ApiError`` before a route is looked for: 401, 403, and 503 while the server drains."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server
        self._keys = Keys(server.options.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        reads = scope["method"] in _READING
        if self._keys:
            if not (reads and scope["path"] in _OPEN_PATHS) and not self._keys.admit(scope["headers"]):
                text = "the API key is missing or wrong: expected it in Authorization: Bearer KEY, or in x-api-key"
                raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": 'Bearer realm="exl"'})
        else:
            _check_origin(scope["headers"], self._server.options)
        if self._server.draining and not reads:
            headers = {"Retry-After": str(RETRY_SECONDS), "Connection": "close"}
            raise ApiError(503, _DRAINING, code="draining", headers=headers)


class Keys:
    """The keys of a server; false if it has none. Only their hashes are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether one of the headers holds a key. Takes the same time for every wrong one."""
        admitted = False
        for name, value in headers:
            if name == b"authorization":
                scheme, _, given = value.partition(b" ")
                if scheme.lower() != b"bearer":
                    continue
            elif name == b"x-api-key":
                given = value
            else:
                continue
            digest = _digest(given.strip())
            for known in self._digests:
                admitted |= hmac.compare_digest(known, digest)
        return admitted


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _check_origin(headers: Iterable[tuple[bytes, bytes]], options: ServerOptions) -> None:
    """A server without keys on the loopback address is for programs of this machine. A page in its browser could get
    there, too, if its site's name is made to lead to 127.0.0.1 (DNS rebinding); browsers say where a page is from."""
    if "*" in options.cors_origins or not is_loopback(options.host):
        return
    for name, value in headers:
        if name != b"origin" or value == b"null":
            continue
        origin = value.decode("latin-1")
        if origin not in options.cors_origins and not _is_local(urlsplit(origin).hostname or ""):
            text = f"origin: found {origin!r}, which this server does not know: see --cors-origin and --api-key"
            raise ApiError(403, text, code="origin_not_allowed")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_local(host: str) -> bool:
    """Whether no name server decides where this leads."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return True
