"""A person at the demo, in a real browser: what they press, what they see, and what they get wrong."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.units import format_bytes
from tests.browser.steps import (
    LONG,
    MARKS,
    answers,
    expect,
    field,
    open_tab,
    seen_while,
    send,
    set_sampling,
    wait_for_end,
)

ROOT = Path(__file__).parents[2]
pytestmark = MARKS


def test_an_answer_streams_and_its_speed_is_shown(open_page, slow, alone):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=60)
    send(page, "Tell me about a dog.")
    texts = [text.strip() for text in seen_while(page, answers(page), "#chat-stats") if text.strip(" …")]
    assert len(texts) >= 4
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    expected = alone.chat().send("Tell me about a dog.", 60, temperature=0)
    assert " ".join(answers(page).last.inner_text().split()) == " ".join(expected.text.split())
    stats = page.locator("#chat-stats").inner_text()
    assert re.search(
        rf"[\d.]+ tokens/s.*{expected.num_tokens} tokens.*first after \d+ ms.*context \d+ of 512", stats, re.DOTALL
    )
    assert page.locator("#chat-seed").inner_text() != f"seed {expected.seed}"  # each its own


def test_stop_keeps_what_was_said(open_page, slow):
    page = open_page()
    set_sampling(page, temperature=1.2, max_tokens=400, seed=4)
    send(page, "Tell me a long story.")
    page.wait_for_function("document.querySelector('#chatbot .bot.message')?.innerText.length > 15", timeout=LONG)
    page.locator("#message .stop-button").click()
    expect(page.locator("#chat-stats")).to_have_text("stopped", timeout=LONG)
    text = answers(page).last.inner_text()
    assert 15 < len(text) < 1000
    page.wait_for_timeout(500)
    assert answers(page).last.inner_text() == text
    set_sampling(page, max_tokens=3)
    send(page, "And then?")
    wait_for_end(page)
    assert answers(page).count() == 2


def test_a_slider_is_used(open_page):
    page = open_page()
    slider = page.locator("#max-tokens input[type=range]")
    slider.press("Home")
    for _ in range(4):
        slider.press("ArrowRight")
    expect(field(page, "max-tokens")).to_have_value("5")
    send(page, "Hello, little cat.")
    wait_for_end(page)
    expect(page.locator("#chat-stats")).to_contain_text("5 tokens")


def test_undo_and_retry(open_page):
    page = open_page()
    open_tab(page, "Chat")
    for name in ("retry", "undo", "continue"):
        expect(page.locator(f"#{name}")).to_be_disabled()  # there is nothing to do it with
    set_sampling(page, temperature=1, max_tokens=6)
    send(page, "One day.")
    wait_for_end(page)
    first = answers(page).last.inner_text()
    seed = page.locator("#chat-seed span").inner_text()
    page.locator("#retry").click()
    expect(page.locator("#chat-seed span")).not_to_have_text(seed, timeout=LONG)
    expect(answers(page)).to_have_count(1)
    assert answers(page).last.inner_text() != first
    page.locator("#undo").click()
    expect(field(page, "message")).to_have_value("One day.")
    expect(answers(page)).to_have_count(0)
    for name in ("retry", "undo", "continue"):
        expect(page.locator(f"#{name}")).to_be_disabled()


def plan_row(page, card: str, purpose: str) -> str:
    return page.locator(f"{card} tr").filter(has_text=purpose).inner_text()


def bar(page, card: str) -> dict[str, str]:
    parts = page.locator(f"{card} .exl-part")
    return dict(parts.evaluate_all("parts => parts.map(p => [p.title.split(':')[0], p.style.width])"))


def test_another_cache_type_is_planned_then_loaded(open_page, worker):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=6)
    send(page, "A word.")
    wait_for_end(page)
    open_tab(page, "Model & memory")
    assert page.locator("#planned .exl-card").count() == 0
    before = bar(page, "#in-memory")

    def cache_bytes(kind: str) -> str:
        return format_bytes(
            next(line.num_bytes for line in exl.plan(kv_cache=kind).lines if line.purpose == "KV cache")
        )

    assert cache_bytes("f16") in plan_row(page, "#in-memory", "KV cache")
    field(page, "kv-cache").click()
    page.get_by_role("option", name="q4", exact=True).click()
    expect(page.locator("#planned .exl-card")).to_be_visible()  # before it is loaded
    assert cache_bytes("q4") in plan_row(page, "#planned", "KV cache")
    assert cache_bytes("f16") in plan_row(page, "#in-memory", "KV cache")
    assert worker.settings.options["kv_cache"] == "f16"
    old = worker.llm
    page.locator("#load-button").click()
    expect(page.locator("#load-notice")).to_have_text("stories is loaded", timeout=LONG)
    expect(page.locator("#status")).to_contain_text("q4 cache")
    assert cache_bytes("q4") in plan_row(page, "#in-memory", "KV cache")
    assert bar(page, "#in-memory") == bar(page, "#planned") != before
    assert "closed" in repr(old)
    send(page, "Another word.")  # the conversation goes on with the model as it is now
    expect(answers(page)).to_have_count(2)
    wait_for_end(page)
    expect(page.locator("#chatbot .user.message")).to_have_count(2)


def test_alternatives_of_a_token(open_page, alone):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=30)
    open_tab(page, "Completion")
    field(page, "prompt").fill("Lily had a <b>red</b> ball")
    page.locator("#complete").click()
    wait_for_end(page, "#completion-stats")
    expected = alone.generate("Lily had a <b>red</b> ball", 30, temperature=0, top_logprobs=5)
    tokens = page.locator(".exl-token")
    assert tokens.count() == expected.num_tokens
    shown = page.locator(".exl-tokens").evaluate("e => e.textContent").replace("⏎", "")
    assert shown == "Lily had a <b>red</b> ball" + expected.text
    for i in (0, 11, expected.num_tokens - 1):
        tokens.nth(i).hover()
        expect(page.locator("#exl-tip")).to_be_visible()
        rows = page.locator("#exl-tip .exl-tip-row")
        assert rows.count() == 5
        told = [row.split() for row in rows.all_inner_texts()]
        for (text, share, _), other in zip(told, expected.logprobs[i].alternatives, strict=True):
            assert text == other.text.replace(" ", "␣").replace("\n", "⏎")
            assert float(share) == pytest.approx(100 * other.probability, abs=0.06)
        box, window = page.locator("#exl-tip").bounding_box(), page.viewport_size
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= window["width"]
        assert box["y"] + box["height"] <= window["height"]
    page.locator("#status").hover()
    expect(page.locator("#exl-tip")).to_have_count(0)


def test_what_is_wrong_is_said_in_a_line_and_the_model_stays(open_page, worker, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    damaged = tmp_path / "damaged"
    shutil.copytree(BUNDLED_MODEL, damaged)
    (damaged / "tokenizer.json").write_text('{"model": ')
    before = worker.llm
    page = open_page()
    send(page, "  ")
    expect(page.locator("#chat-notice")).to_have_text("message: found nothing, expected a text to answer")
    set_sampling(page, seed="x")
    send(page, "Hello.")
    expect(page.locator("#chat-notice")).to_contain_text("seed: found 'x', expected a whole number")
    expect(field(page, "message")).to_have_value("Hello.")
    set_sampling(page, seed="-1")
    field(page, "message").press("Enter")
    expect(page.locator("#chat-notice")).to_contain_text("seed: found -1, expected an integer from 0", timeout=LONG)
    expect(field(page, "message")).to_have_value("Hello.")
    set_sampling(page, seed="", max_tokens=3)
    open_tab(page, "Model & memory")

    def refused(name: str, value: str, told: str | re.Pattern[str], where: str = "#planned") -> None:
        was = field(page, name).input_value()
        field(page, name).fill(value)
        field(page, name).press("Enter")
        page.locator("#load-button").click()
        expect(page.locator(f"{where} .exl-error")).to_contain_text(told, timeout=LONG)
        assert "\n" not in page.locator(f"{where} .exl-error").inner_text().strip()
        field(page, name).fill(was)
        field(page, name).press("Enter")

    refused("ram", "banana", "ram: found 'banana', expected a size such as '6GB'")
    refused("ram", "1MB", re.compile(r"needs \d+\.\d\d MB with every layer streamed, the budget is 1\.00 MB"))
    refused("context", "many", "context: found 'many', expected a number of tokens")
    refused("vram", "x", "vram: found 'x'")
    refused("model", "nobody/nothing", "nobody/nothing: no such folder here, and ")
    refused("model", "no such folder", "no such folder: no such folder here, and not a Hugging Face repository id")
    assert worker.llm is before  # it was not even closed
    refused("model", str(damaged), "stories is loaded again, as it was.", "#load-notice")
    assert worker.llm is not None
    assert "Traceback" not in page.locator("body").inner_text()
    send(page, "Hello.")
    wait_for_end(page)


def test_two_tabs_are_answered_at_once(open_page, slow, alone):
    prompts = ["Once there was a cat", "The big red truck"]
    pages = [open_page(), open_page()]
    for page, prompt in zip(pages, prompts, strict=True):
        set_sampling(page, temperature=0, max_tokens=50)
        open_tab(page, "Completion")
        field(page, "prompt").fill(prompt)
    pages[0].locator("#complete").click()
    expect(pages[0].locator(".exl-token").nth(2)).to_be_visible(timeout=LONG)
    pages[1].locator("#complete").click()
    expect(pages[1].locator(".exl-token").nth(2)).to_be_visible(timeout=LONG)
    expect(pages[0].locator("#stop-completion")).to_be_visible()  # it is still being written
    for page, prompt in zip(pages, prompts, strict=True):
        wait_for_end(page, "#completion-stats")
        shown = page.locator(".exl-tokens").evaluate("e => e.textContent").replace("⏎", "")
        assert shown == prompt + alone.generate(prompt, 50, temperature=0).text


def test_who_waits_for_a_model_may_leave(open_page, worker):
    page, gate = open_page(), threading.Event()
    loading = worker.submit(lambda job: gate.wait(60), alone=True)
    set_sampling(page, max_tokens=3)
    send(page, "My turn?")
    expect(page.locator("#chat-stats")).to_have_text("Waiting for the model: 1 request is before yours")
    page.locator("#message .stop-button").click()
    expect(field(page, "message")).to_have_value("My turn?")
    expect(answers(page)).to_have_count(0)
    gate.set()
    for _ in loading.watch():
        pass
    field(page, "message").press("Enter")
    wait_for_end(page)
    expect(answers(page)).to_have_count(1)


CONTRAST = """e => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  let back = [0, 0, 0, 0];
  for (let at = e; at && back[3] < 255; at = at.parentElement) back = rgba(getComputedStyle(at).backgroundColor);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const [a, b] = [light(rgba(getComputedStyle(e).color)), light(back)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(scheme, open_page):
    page = open_page(color_scheme=scheme)

    def is_dark() -> bool:
        return page.evaluate("document.body.classList.contains('dark')")

    assert is_dark() == (scheme == "dark")
    set_sampling(page, max_tokens=60, seed=1)
    send(page, "")
    open_tab(page, "Completion")
    page.locator("#complete").click()
    wait_for_end(page, "#completion-stats")
    for selector in (
        ".exl-error",
        "#status span",
        "#completion-stats span",
        ".exl-legend em",
        *map(".exl-token.p{}".format, range(5)),
    ):
        found = page.locator(selector).first
        assert found.evaluate(CONTRAST) >= 4.5, selector  # WCAG 2.2, level AA
    page.locator("#theme-toggle").click()
    assert is_dark() == (scheme != "dark")
    page.reload()
    page.locator("#status .exl-status").wait_for()
    page.wait_for_timeout(700)
    assert is_dark() == (scheme != "dark")  # the choice is kept


def test_a_phone(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True)
    set_sampling(page, max_tokens=20, temperature=0)
    open_tab(page, "Model & memory")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out
    open_tab(page, "Completion")
    page.locator("#complete").click()
    wait_for_end(page, "#completion-stats")
    page.locator(".exl-token").nth(3).tap()
    expect(page.locator("#exl-tip")).to_be_visible()
    box = page.locator("#exl-tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


def test_a_model_that_is_not_there_is_said_before_anything_is_served():
    command = [sys.executable, str(ROOT / "examples" / "gradio_demo.py"), "no such folder"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=180)
    assert done.returncode == 1
    assert (
        done.stderr == "error: no such folder: no such folder here, and not a Hugging Face repository id (owner/name)\n"
    )
