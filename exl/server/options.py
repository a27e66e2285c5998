"""How a server behaves, checked. Quick to import."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exl.errors import ConfigError

_ORIGIN = re.compile(r"https?://[^/\s]+")


@dataclass(frozen=True)
class ServerOptions:
    """Checked when made: ``ConfigError`` names the option, what was found and what was expected."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_keys: tuple[str, ...] = ()  # one of them is needed; none: everybody may ask
    served_names: tuple[str, ...] = ()  # by which clients may call the model; none: the folder's name
    models_dir: Path | None = None  # each folder in it with a config.json is a model
    idle_unload: float | None = None  # seconds without a request, after which a model is unloaded; None: never
    max_queue: int = 512  # requests that wait beyond those that run
    max_tokens: int | None = None  # new tokens a request; None: what the context leaves
    timeout: float | None = None  # seconds a request; what there is by then is its answer. None: any time
    drain_seconds: float = 30.0  # how long SIGTERM waits for what runs
    max_body: int = 16 << 20  # bytes
    header_timeout: float = 10.0  # seconds in which a request's headers must come
    body_timeout: float = 30.0  # seconds without a byte of a body that is not whole
    write_timeout: float = 60.0  # seconds in which a client that reads nothing is given up
    keep_alive: float = 30.0  # seconds that a connection may be idle between two requests
    max_connections: int = 4096
    cors_origins: tuple[str, ...] = ()  # that browsers' pages may come from, or ("*",)
    root_path: str = ""  # the prefix under which a proxy publishes the server
    tls_cert: Path | None = None
    tls_key: Path | None = None
    log_format: str = "text"  # or "json"
    log_file: Path | None = None  # None: standard error
    log_prompts: bool = False
    metrics_compat: tuple[str, ...] = ()  # "vllm": its names for the same figures, too
    trace: bool = False  # spans go to the process's own OpenTelemetry provider
    otlp_endpoint: str | None = None  # spans go to this collector: http://localhost:4318/v1/traces
    tool_format: str = "auto"  # see exl.parse.choose
    reasoning_format: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise ConfigError(f"host: found {self.host!r}, expected a name or an address")
        _check_whole("port", self.port, 0, 65535)
        _check_whole("max_queue", self.max_queue, 0)
        _check_whole("max_body", self.max_body, 1024)
        _check_whole("max_connections", self.max_connections, 1)
        if self.max_tokens is not None:
            _check_whole("max_tokens", self.max_tokens, 1)
        for name in ("drain_seconds", "header_timeout", "body_timeout", "write_timeout", "keep_alive"):
            _check_seconds(name, getattr(self, name))
        for name in ("timeout", "idle_unload"):
            if getattr(self, name) is not None:
                _check_seconds(name, getattr(self, name))
        if not all(self.api_keys) or any(key != key.strip() for key in self.api_keys):
            raise ConfigError("api_keys: found an empty key or white space around one, expected keys without")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls: found one of certificate and key, expected both or none")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"cors_origins: found {origin!r}, expected * or one such as https://chat.example.com")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"otlp_endpoint: found {self.otlp_endpoint!r}, expected http://... or https://...")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path: found {self.root_path!r}, expected a path such as /exl")
        _check_one("log_format", self.log_format, ("text", "json"))
        for name in self.metrics_compat:
            _check_one("metrics_compat", name, ("vllm",))


def _check_whole(name: str, value: object, low: int, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}: found {value!r}, expected a whole number from {low} to {high}")


def _check_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: found {value!r}, expected a number of seconds above 0")


def _check_one(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: found {value!r}, expected {' or '.join(known)}")
