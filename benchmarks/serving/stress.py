"""Many clients for minutes: some leave, some send rubbish, and every stream that ends is the text that its request has
alone."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import exl
from benchmarks.serving.client import Address, Answer, get, head, send_raw, stream
from benchmarks.serving.process import Resources, ServerProcess
from exl.load_test import percentile
from exl.request_options import RequestOptions

LEAVE, RUBBISH = 1 / 3, 1 / 10
PROMPT_WORDS = (1, 120)
_PAGES_FREE = "exl_cache_pages_free"


@dataclass(frozen=True)
class Known:
    """A request whose answer is known."""

    body: dict[str, Any]
    text: str
    finish_reason: str


@dataclass
class Report:
    """What came of all clients together."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # what each wrong answer was; none is expected
    first: list[float] = field(default_factory=list)  # seconds until a stream's first piece
    between: list[float] = field(default_factory=list)  # between two pieces
    before: Resources | None = None
    after: Resources | None = None
    pages: tuple[int, int] | None = None  # free before, and after
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        found: dict[str, Any] = {"seconds": round(self.seconds, 1), **self.counts, "wrong": len(self.wrong)}
        for name, values in (("first", self.first), ("between", self.between)):
            for percent in (50, 95, 99):
                found[f"{name}_p{percent}_ms"] = round(1e3 * percentile(values, percent), 2) if values else None
        for name, resources in (("before", self.before), ("after", self.after)):
            if resources is not None:
                found[name] = {
                    "rss_mb": round(resources.rss_bytes / 1e6, 1),
                    "threads": resources.num_threads,
                    "files": resources.num_files,
                }
        return found | {"pages_free": self.pages}


def known_requests(model: Path, count: int, seed: int, texts: Sequence[str]) -> list[Known]:
    """Random requests, each answered by an engine that has nothing else to do. ``texts``: what prompts are taken of."""
    rng, found = random.Random(seed), []
    with exl.load(model, "cpu", max_sequences=1) as llm:
        for i in range(count):
            options: RequestOptions = {
                "max_tokens": rng.randint(1, 160),
                "temperature": rng.choice((0.0, 0.7, 1.2)),
                "seed": i,
            }
            if rng.random() < 0.3:
                options["stop"] = [rng.choice((" the", ".", "and"))]
            words = rng.choice(texts).split()
            prompt = " ".join(words[: rng.randint(*PROMPT_WORDS)])
            answer = llm.generate(prompt, **options)
            found.append(Known({"prompt": prompt, **options}, answer.text, answer.finish_reason))
    return found


def rubbish(rng: random.Random) -> bytes:
    """A request that nobody can answer."""
    path = "/v1/completions"
    good = {"prompt": "Once", "max_tokens": 4}
    bodies: list[bytes] = [
        b"",
        b"{",
        b"[" * 50_000,
        b'{"prompt": "\\ud800", "max_tokens": 1}',
        b'{"prompt": "a", "max_tokens": 1e400}',
        bytes(rng.randrange(256) for _ in range(200)),
        json.dumps({**good, "n": 10**9}).encode(),
        json.dumps({**good, "temperature": "hot"}).encode(),
        json.dumps({**good, "unheard_of": True}).encode(),
        json.dumps({**good, "model": "no such model"}).encode(),
        json.dumps({**good, "regex": "(" * 5_000}).encode(),
        json.dumps({"prompt": "a " * 20_000}).encode(),
    ]
    body = rng.choice(bodies)
    kind = rng.randrange(5)
    if kind == 0:
        return head(path, len(body) + 100) + body  # the rest never comes
    if kind == 1:
        return bytes(rng.randrange(256) for _ in range(300))
    if kind == 2:
        return head(f"/v1/{'x' * rng.randrange(1, 3000)}", len(body)) + body
    return head(path, len(body)) + body


async def one_client(
    address: Address, known: Sequence[Known], report: Report, rng: random.Random, until: float
) -> None:
    while time.monotonic() < until:
        chance = rng.random()
        if chance < RUBBISH:
            status = re.match(rb"HTTP/1\.1 (\d+)", await send_raw(address, rubbish(rng), ends=rng.random() < 0.25))
            report.counts[f"rubbish_{status[1].decode() if status else 'closed'}"] += 1
            if status and int(status[1]) in (200, 500):
                report.wrong.append(f"rubbish was answered with {int(status[1])}")
            continue
        request = rng.choice(known)
        leave_after = rng.randint(0, 40) if chance < RUBBISH + LEAVE else None
        answer = await stream(address, request.body, leave_after)
        if leave_after is not None and not answer.is_whole:
            report.counts["left"] += 1
            if not request.text.startswith(answer.text):
                report.wrong.append(f"{request.body}: {answer.text!r} does not begin {request.text!r}")
            continue
        _check(report, request, answer)


def _check(report: Report, request: Known, answer: Answer) -> None:
    report.counts["answered"] += 1
    expected = (200, True, None, request.text, request.finish_reason)
    found = (answer.status, answer.is_whole, answer.error, answer.text, answer.finish_reason)
    if found != expected:
        report.wrong.append(f"{request.body}: found {found}, expected {expected}")
    if answer.arrivals:
        report.first.append(answer.arrivals[0])
        report.between += [later - before for before, later in zip(answer.arrivals, answer.arrivals[1:], strict=False)]


async def figure(address: Address, name: str) -> int:
    """Of ``/metrics``: of all models together."""
    _, body = await get(address, "/metrics")
    values = re.findall(rf"^{name}(?:\{{[^}}]*\}})? ([0-9.e+]+)$".encode(), body, re.MULTILINE)
    if not values:
        raise RuntimeError(f"/metrics has no {name}")
    return int(sum(map(float, values)))


async def run_stress(
    server: ServerProcess,
    known: Sequence[Known],
    num_clients: int,
    seconds: float,
    seed: int,
    tell: Callable[[Report], None] = lambda report: None,
) -> Report:
    """``tell`` is called every ten seconds."""
    report, address = Report(), server.address

    async def crowd(duration: float, seed: int) -> None:
        until = time.monotonic() + duration
        rngs = [random.Random(f"{seed} {i}") for i in range(num_clients)]
        await asyncio.gather(*(one_client(address, known, report, rng, until) for rng in rngs))

    async def teller() -> None:
        while True:
            await asyncio.sleep(10.0)
            tell(report)

    telling = asyncio.ensure_future(teller())
    try:
        # What a server makes once, it makes in the first seconds: buffers of the allocator, threads, compiled grammars.
        await crowd(min(20.0, seconds / 4), seed)
        await _rest(address)
        report.before, before = server.resources, await figure(address, _PAGES_FREE)
        began = time.monotonic()
        await crowd(seconds, seed + 1)
        report.seconds = time.monotonic() - began
        await _rest(address)
        report.after, report.pages = server.resources, (before, await figure(address, _PAGES_FREE))
    finally:
        telling.cancel()
    return report


async def _rest(address: Address) -> None:
    """Until the server has noticed that clients have left."""
    for _ in range(100):
        if not await figure(address, "exl_sequences_running") + await figure(address, "exl_sequences_waiting"):
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(3.0)  # then it has given memory back, too
