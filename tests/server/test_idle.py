"""A server that nobody asks: it gives memory back once, and then does nothing."""

from __future__ import annotations

import time

import httpx

from exl.server import run
from tests.server.running import RunningServer, wait_until


def test_freed_memory_goes_back_once_when_requests_have_ended(monkeypatch):
    trims = []
    monkeypatch.setattr(run, "_IDLE_SECONDS", 0.1)
    monkeypatch.setattr(run, "trim_heap", lambda: trims.append(time.monotonic()))
    with RunningServer() as server:
        wait_until(lambda: len(trims) > 0)  # after the questions for its health
        time.sleep(0.5)
        before = len(trims)
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "Once", "max_tokens": 2})
        wait_until(lambda: len(trims) > before)
        time.sleep(0.5)
        assert len(trims) == before + 1
