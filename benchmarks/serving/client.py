"""A client that costs little, since it shares its processors with the server: HTTP by hand over asyncio's streams."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

_DATA = b"data: "
_LIMIT = 1 << 20  # bytes of a line


@dataclass
class Answer:
    """What came of one request."""

    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    arrivals: list[float] = field(default_factory=list)  # of ``time.perf_counter``, of each piece of text
    usage: dict[str, Any] | None = None
    is_whole: bool = False  # the stream came to its own end


@dataclass(frozen=True)
class Address:
    host: str
    port: int


def head(path: str, length: int, method: str = "POST") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: exl\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()


async def stream(address: Address, body: dict[str, Any], leave_after: int | None = None) -> Answer:
    """A streamed completion. ``leave_after``: the connection is cut after so many pieces."""
    answer, began = Answer(), time.perf_counter()
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=_LIMIT)
    try:
        data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        writer.write(head("/v1/completions", len(data)) + data)
        await writer.drain()
        answer.status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if answer.status != 200:
            answer.error = (await reader.read()).decode()
            return answer
        async for event in _events(reader):
            if event == b"[DONE]":
                answer.is_whole = True
                break
            _take(answer, json.loads(event))
            if leave_after is not None and len(answer.arrivals) >= leave_after:
                writer.transport.abort()  # as a browser that is closed: no orderly goodbye
                break
    finally:
        writer.close()
    answer.arrivals = [arrived - began for arrived in answer.arrivals]
    return answer


def _take(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = json.dumps(event["error"])
    for choice in event.get("choices", ()):
        if choice["text"]:
            answer.arrivals.append(time.perf_counter())
            answer.text += choice["text"]
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    answer.usage = event.get("usage") or answer.usage


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Data of server-sent events in a chunked body, each of them on one line."""
    while line := await reader.readline():
        if line.startswith(_DATA):
            yield line[len(_DATA) :].strip()


async def send_raw(address: Address, data: bytes, ends: bool, wait: float = 5.0) -> bytes:
    """Whatever comes back of these bytes within so many seconds; b"" if nothing does. ``ends``: the sending half of the
    connection is closed behind them, which a server may take for a client that leaves."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(data)
        await writer.drain()
        if ends:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(4096), wait)
    except (asyncio.TimeoutError, ConnectionError):
        return b""
    finally:
        writer.close()


async def get(address: Address, path: str) -> tuple[int, bytes]:
    """Status and body."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(head(path, 0, "GET"))
        await writer.drain()
        found, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return int(found.split()[1]), body
    finally:
        writer.close()
