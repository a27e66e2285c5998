"""The demo with ``--url``: the chat of a server's model, in a browser."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from exl.errors import ConfigError
from exl.http_client import ServerError
from tests.browser.conftest import ROOT
from tests.browser.steps import LONG, MARKS, answers, expect, field, send, set_sampling, wait_for_end
from tests.server.scripted import ScriptedServer, stream
from tests.slow_tokens import slow_tokens

pytestmark = MARKS


@pytest.fixture(scope="module")
def demo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import gradio_demo

        yield gradio_demo


def given(url: str, *models: str, **options: object) -> argparse.Namespace:
    return argparse.Namespace(
        url=url, models=list(models), **{"kv_cache": None, "ram": None, "api_key_file": None, **options}
    )


@pytest.fixture(scope="module")
def serve(demo):
    """``serve(url)``: the address of a demo that talks with this server."""
    open_pages, workers = [], []

    def serve(url: str) -> str:
        worker, first = demo.from_server(given(url))
        workers.append(worker)
        open_pages.append(demo.Page(worker, [], first))
        return demo.launch(open_pages[-1], "127.0.0.1", None, prevent_thread_lock=True, quiet=True)[1]

    yield serve
    for page in open_pages:
        page.blocks.close(verbose=False)
    for worker in workers:
        worker.close()


@pytest.fixture
def visit(browser):
    contexts = []

    def visit(url: str):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 800}))
        page = contexts[-1].new_page()
        page.goto(url)
        page.locator("#status .exl-status").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def url(serve, running):
    return serve(running.url)


def test_answers_are_the_servers_own(visit, url, running):
    page = visit(url)
    expect(page.locator("#status")).to_contain_text(f"stories{running.url} · context 512")
    tabs = page.get_by_role("tab")
    expect(tabs).to_have_text(["Chat", "Sampling"])  # what a server cannot do is not there
    set_sampling(page, temperature=0, max_tokens=20)
    send(page, "Tell me about a dog.")
    wait_for_end(page)
    alone = running.llm.chat().send("Tell me about a dog.", 20, temperature=0)
    assert " ".join(answers(page).last.inner_text().split()) == " ".join(alone.text.split())
    expect(page.locator("#chat-stats")).to_contain_text("20 tokens")
    expect(page.locator("#chat-stats")).to_contain_text("of 512")
    page.locator("#continue").click()
    page.wait_for_function("document.querySelector('#chatbot .bot.message').innerText.length > 42", timeout=LONG)
    page.reload()
    expect(answers(page)).to_have_count(1)


def test_an_answer_is_stopped(visit, url, running, monkeypatch):
    slow_tokens(monkeypatch, 0.03)
    page = visit(url)
    set_sampling(page, temperature=0, max_tokens=400)
    send(page, "Tell me about a dog.")
    page.wait_for_function("document.querySelector('#chatbot .bot.message')?.innerText.length > 15", timeout=LONG)
    page.locator("#message .stop-button").click()
    expect(page.locator("#chat-stats")).to_have_text("stopped", timeout=LONG)
    until = time.monotonic() + 10
    while running.llm.stats().running:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_what_came_of_a_broken_answer_is_kept(visit, serve):
    with ScriptedServer() as server:
        server.script = [stream({"content": "One"}, {"content": " day"}, end="")]
        page = visit(serve(server.url))
        send(page, "Hello.")
        expect(page.locator("#chat-notice")).to_contain_text("ended the stream too early", timeout=LONG)
        expect(answers(page).last).to_contain_text("One day")
        expect(page.locator("#continue")).to_be_enabled()
        expect(field(page, "message")).to_have_value("")


@pytest.mark.parametrize(
    ("args", "error", "expected"),
    [
        (given("http://127.0.0.1:9"), ServerError, "connection refused"),
        (given("nowhere"), ConfigError, "--url: found 'nowhere'"),
        (given("http://127.0.0.1:9", ram="4GB"), ConfigError, "--ram: found it with --url"),
        (given("http://127.0.0.1:9", kv_cache="q8"), ConfigError, "--kv-cache: found it with --url"),
        (given("http://127.0.0.1:9", "a", "b"), ConfigError, "models: found 2 with --url"),
        (given("http://127.0.0.1:9", api_key_file=Path("/nowhere")), ConfigError, "--api-key-file: /nowhere"),
    ],
)
def test_what_does_not_go_together_is_refused(demo, args, error, expected):
    with pytest.raises(error, match=expected):
        demo.from_server(args)


def test_a_model_cannot_be_loaded_over_a_servers(demo, running):
    worker, _ = demo.from_server(given(running.url, "stories"))
    job = worker.submit(
        lambda job: worker.load(
            sys.modules["gradio_parts.settings"].load_settings("x", "auto", "f16", "", "", "", "stored"), job
        ),
        alone=True,
    )
    for _ in job.watch():
        pass
    assert "loads its models itself" in job.failure
