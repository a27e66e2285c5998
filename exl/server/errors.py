"""What goes wrong with a request: one class with an HTTP status, and each protocol's way of telling it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from exl.errors import (
    CheckpointError,
    ConfigError,
    ConstraintError,
    ExlError,
    MemoryBudgetError,
    NotFiniteError,
    QueueFullError,
    UnsupportedModelError,
)

RETRY_SECONDS = 2  # what a client is told to wait if the queue is full

# OpenAI's and Anthropic's words for a status:
# platform.openai.com/docs/guides/error-codes, docs.anthropic.com/en/api/errors
_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


_FIELD = re.compile(r"\w+(\[\d+\]|\.\w+)*", re.ASCII)  # messages[0].content


class ApiError(Exception):
    """A request is refused or has failed. ``param`` names the field, ``code`` is a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """The client has left before its answer was whole."""


def api_error(error: Exception) -> ApiError:
    """Any error of a request's, as its client is told. What exl did not raise is "internal error": the log has it."""
    if isinstance(error, ApiError):
        return error
    text = str(error)
    if isinstance(error, QueueFullError):
        return ApiError(429, text, code="queue_full", headers={"Retry-After": str(RETRY_SECONDS)})
    if isinstance(error, MemoryBudgetError):
        return ApiError(503, text, code="out_of_memory")
    if isinstance(error, ConfigError | UnsupportedModelError):
        name = text.split(":", 1)[0]
        code = "context_length_exceeded" if "context" in text and "tokens" in text else None
        return ApiError(400, text, code=code, param=name if _FIELD.fullmatch(name) else None)
    if isinstance(error, ConstraintError):
        return ApiError(400, text, code="constraint")
    if isinstance(error, CheckpointError):
        return ApiError(500, text, code="checkpoint")
    if isinstance(error, NotFiniteError):
        return ApiError(500, text, code="not_finite")
    if isinstance(error, ExlError):  # the model was closed, or takes no more requests
        return ApiError(503, text, code="unavailable", headers={"Retry-After": str(RETRY_SECONDS)})
    return ApiError(500, "internal error", code="internal_error")


@contextlib.contextmanager
def told_as(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of what is refused inside begin with the client's own name for a field, where exl has another: ``names``
    has exl's names as keys."""
    try:
        yield
    except (ApiError, ConfigError) as error:
        told = api_error(error)
        name, _, words = told.message.partition(": ")
        if names.get(name, name) == name:
            raise
        field = names[name]
        raise ApiError(told.status, f"{field}: {words}", code=told.code, param=field) from None


def openai_body(error: ApiError) -> dict[str, Any]:
    kind = _OPENAI_TYPES.get(error.status, "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def tgi_body(error: ApiError) -> dict[str, Any]:
    """As text-generation-inference tells it: ``error`` is a text."""
    kinds = {429: "overloaded", 400: "validation", 413: "validation", 422: "validation"}
    return {"error": error.message, "error_type": kinds.get(error.status, "generation")}


_TGI_PATHS = ("/", "/generate", "/generate_stream", "/info")


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """In the words of the protocol whose path was asked, without the server's own prefix."""
    if path.startswith("/v1/messages"):
        return anthropic_body(error)
    return tgi_body(error) if path in _TGI_PATHS else openai_body(error)
