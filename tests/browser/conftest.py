"""The demo's server in this process, a browser, and pages that must not ask for anything from elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch

import exl
from tests.slow_tokens import slow_tokens

ROOT = Path(__file__).parents[2]
SECONDS_A_TOKEN = 0.02  # slow enough for a person, or a test, to press Stop


@pytest.fixture(scope="session")
def server():
    """(url, worker) of the demo with the model that ships with exl."""
    sys.path.insert(0, str(ROOT / "examples"))
    import gradio_demo
    from gradio_parts.settings import load_settings
    from gradio_parts.worker import Worker

    first = load_settings(str(gradio_demo.BUNDLED_MODEL), "auto", "f16", "", "", "", "stored")
    worker = Worker()
    run(worker, lambda job: torch.set_num_threads(1))
    run(worker, lambda job: worker.load(first, job))
    page = gradio_demo.Page(worker, [], first)
    _, url, _ = gradio_demo.launch(page, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    yield url, worker
    page.blocks.close(verbose=False)
    worker.close()
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture
def worker(server):
    """With the bundled model as it was loaded first, whatever the test does with it."""
    _, worker = server
    first = worker.settings
    yield worker
    if worker.settings != first:
        run(worker, lambda job: worker.load(first, job))


def run(worker, work) -> None:
    job = worker.submit(work, alone=True)
    for _ in job.watch():
        pass
    assert job.failure is None, job.failure


@pytest.fixture(scope="module")
def alone():
    """The same model by itself."""
    with exl.load() as llm:
        yield llm


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    from tests.browser.chromium import CHROMIUM

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, browser, worker):
    """``open_page(**context)``: a page with a session of its own, once it is ready."""
    url, _ = server
    contexts, wrong = [], []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if is_foreign(request.url, url) else None)
        page.on("requestfailed", lambda request: wrong.remove(request.url) if request.failure == "csp" else None)
        page.goto(url)
        page.locator("#status .exl-status").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []  # errors of scripts, and requests to other hosts that the page's own policy did not stop


def is_foreign(requested: str, url: str) -> bool:
    return requested.startswith(("http", "ws")) and urlparse(requested).hostname != urlparse(url).hostname


@pytest.fixture
def slow(monkeypatch):
    """Tokens take their time."""
    slow_tokens(monkeypatch, SECONDS_A_TOKEN)


@pytest.fixture(scope="session")
def running():
    """A server of the bundled model."""
    for name in ("fastapi", "uvicorn", "httpx"):
        pytest.importorskip(name)
    from tests.server.running import RunningServer

    with RunningServer() as server:
        yield server


@pytest.fixture
def visit(running, browser):
    """``visit(context=None, path="/", **options)`` opens the page; at the end nothing may have gone wrong unseen."""
    contexts, wrong, allowed = [], [], []

    def visit(context=None, path="/", expected=None, **options):
        """``expected``: a pattern of the console's errors that the test brings about itself."""
        if context is None:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
            contexts.append(context)
        if expected:
            allowed.append(expected)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("request", lambda request: wrong.append(request.url) if is_foreign(request.url, running.url) else None)
        page.goto(running.url + path)
        page.locator("html[data-ready]").wait_for(state="attached")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [text for text in wrong if not any(re.search(pattern, text) for pattern in allowed)] == []
