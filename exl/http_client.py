"""A client for servers that speak OpenAI's protocol: JSON, and streams of server-sent events. Python's own HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from exl.errors import ConfigError, ExlError

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 600.0  # without a byte, after which a stream is given up; exl's server sends a sign each 15
_MAX_LINE = 1 << 24  # bytes
_MAX_JSON = 1 << 24


class ServerError(ExlError):
    """A server refuses, fails, or is not there. ``status`` is 0 if it has not answered; ``code`` is its own word."""

    def __init__(self, message: str, status: int = 0, code: str = "", wait: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.wait = wait  # seconds, after which it asks to be asked again


class HttpClient:
    """Requests to the server at ``url``, a connection for each. Thread-safe."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """``url``: ``http://host:port``, with the prefix of a proxy if there is one; a ``/v1`` at its end does not
        matter. Raises ``ConfigError``."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")
            parts.path.encode("ascii")
        except ValueError:
            raise _bad_url(url) from None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or parts.username:
            raise _bad_url(url)
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("API key: found characters that no header can carry, expected printable ASCII")
        self._is_tls, self._host, self._port = parts.scheme == "https", host, port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{self._prefix}"
        self._key = key

    def get(self, path: str) -> Any:
        """The JSON at a path such as ``/v1/models``. Raises ``ServerError``."""
        with self._told(path):
            connection, response = self._ask("GET", path, None, CONNECT_SECONDS)
            with contextlib.closing(connection):
                return self._json(response.read(_MAX_JSON), path)

    def post_events(self, path: str, body: object) -> EventReader:
        """Begins a request that is answered by a stream. Returns at once: errors come out of the reader."""
        return EventReader(self, path, json.dumps(body).encode())

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        seconds: float,
        opened: Callable[[socket.socket], None] | None = None,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """``opened`` is called with the socket. Raises ``ServerError`` for a status that is no success, else what
        Python raises."""
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(seconds)
            if opened is not None:
                opened(connection.sock)
            headers = {"Accept": "application/json, text/event-stream", "Connection": "close"}
            if body is not None:
                headers["Content-Type"] = "application/json"
            if self._key is not None:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.request(method, self._prefix + path, body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise self._refusal(response)
            return connection, response
        except BaseException:
            connection.close()
            raise

    def _refusal(self, response: http.client.HTTPResponse) -> ServerError:
        status = response.status
        try:
            told = json.loads(response.read(_MAX_JSON))["error"]
            text, code = (told, "") if isinstance(told, str) else (str(told["message"]), str(told.get("code") or ""))
        except (ValueError, KeyError, TypeError, http.client.HTTPException):
            text, code = f"the server answers with status {status}", ""
        if status in (401, 403):
            needs = "does not take this API key" if self._key else "asks for an API key: --api-key-file"
            text = f"{self.url}: the server {needs}"
        return ServerError(text, status, code, _seconds(response.headers.get("Retry-After", "0")))

    def _json(self, data: bytes, path: str) -> Any:
        try:
            return json.loads(data)
        except ValueError:
            raise ServerError(f"{self.url}{path}: found no JSON, expected a server of OpenAI's protocol") from None

    @contextlib.contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """Python's errors as one line."""
        try:
            yield
        except ConnectionRefusedError:
            raise ServerError(f"{self.url}: connection refused: is a server running there?") from None
        except socket.gaierror:
            raise ServerError(f"{self.url}: no such host: {self._host}") from None
        except TimeoutError:
            raise ServerError(f"{self.url}{path}: the server does not answer") from None
        except ssl.SSLError as error:
            raise ServerError(f"{self.url}: no secure connection: {error.reason or error}") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.url}{path}: the connection failed: {error or type(error).__name__}") from None


class EventReader:
    """The data of a stream's events, read in a thread, so that whoever waits for them can be interrupted. The format:
    html.spec.whatwg.org/multipage/server-sent-events.html"""

    def __init__(self, client: HttpClient, path: str, body: bytes) -> None:
        self._client, self._path, self._body = client, path, body
        self._items: queue.Queue[str | ExlError | None] = queue.Queue()
        self._socket: socket.socket | None = None
        self._closed = False
        self._lock = threading.Lock()
        threading.Thread(target=self._read_all, name="exl-events", daemon=True).start()

    def next(self, seconds: float) -> str | None:
        """The next event's data. Raises ``queue.Empty`` if none comes in so many seconds, ``EOFError`` at the end of
        the stream, ``ServerError`` for what went wrong."""
        item = self._items.get(timeout=seconds)
        if item is None:
            raise EOFError
        if isinstance(item, ExlError):
            raise item
        return item

    def close(self) -> None:
        """Ends the request, if it has not ended: the server stops to generate."""
        with self._lock:
            self._closed = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _opened(self, sock: socket.socket) -> None:
        with self._lock:
            self._socket = sock
            if self._closed:
                raise ConnectionAbortedError

    def _read_all(self) -> None:
        try:
            with self._client._told(self._path):
                asked = self._client._ask("POST", self._path, self._body, SILENT_SECONDS, self._opened)
                connection, response = asked
                with contextlib.closing(connection), contextlib.closing(response):
                    for data in _events(response):
                        self._items.put(data)
            self._items.put(None)
        except ExlError as error:
            self._items.put(error)
        finally:
            with self._lock:
                self._socket = None


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    data: list[str] = []
    while line := response.readline(_MAX_LINE):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if text.startswith("data:"):
            data.append(text[5:].removeprefix(" "))
        elif not text and data:
            yield "\n".join(data)
            data = []


def _seconds(text: str) -> float:
    """Of a Retry-After, which may also be a date: then 0."""
    try:
        return min(60.0, float(text))
    except ValueError:
        return 0.0


def _bad_url(url: str) -> ConfigError:
    return ConfigError(f"--url: found {url!r}, expected an address such as http://127.0.0.1:8000")
