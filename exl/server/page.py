"""The page to talk to the server: GET ``/``, one HTML document that asks for nothing but this server's own routes.

Its parts are files in ``page/``, put together when the server starts. The policy names the hashes of its one script and
its one style, so that nothing else in it can run, whatever a model writes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from exl.server.state import Server

BODIES: tuple[type[BaseModel], ...] = ()
_FOLDER = Path(__file__).parent / "page"
# One module, main.js last: it runs when everything else is defined.
_SCRIPTS = ("markdown.js", "store.js", "api.js", "message.js", "answers.js", "list.js", "main.js")


@dataclass(frozen=True)
class Page:
    """A document and the headers that it is sent with."""

    body: bytes
    compressed: bytes  # by gzip
    headers: dict[str, str]


def build_page() -> Page:
    """Reads the files. The headers: developer.mozilla.org/docs/Web/HTTP/Reference/Headers/Content-Security-Policy"""
    style = _read("style.css")
    script = "\n".join(map(_read, _SCRIPTS))
    document = _read("index.html").replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).encode()
    policy = (
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "img-src data:",  # the icon
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Where browsers know it, text that is given to be parsed as HTML is an error.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "ETag": f'"{hashlib.sha256(document).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",  # it is asked for again each time, and is then a 304
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Page(document, gzip.compress(document, mtime=0), headers)


def router(server: Server) -> APIRouter:
    """Open to everybody, also with API keys: the page asks for the key and sends it with its requests."""
    routes = APIRouter()
    page = build_page()

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def show(request: Request) -> Response:
        if page.headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=page.headers)
        body, headers = page.body, page.headers
        if _takes_gzip(request.headers.get("accept-encoding", "")):
            body, headers = page.compressed, {**page.headers, "Content-Encoding": "gzip"}
        return Response(body, headers=headers, media_type="text/html; charset=utf-8")

    return routes


def _takes_gzip(accepted: str) -> bool:
    codings = [part.split(";") for part in accepted.lower().split(",")]
    return any(
        name.strip() == "gzip" and all(one.strip() not in ("q=0", "q=0.0") for one in rest) for name, *rest in codings
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
