"""The demo by keyboard and by ear, and what depends on the loaded model."""

from __future__ import annotations

import json
import shutil
import sys
import time

import pytest

from exl.checkpoint.hub import BUNDLED_MODEL
from tests.browser.conftest import run
from tests.browser.steps import LONG, MARKS, expect, field, open_tab, send, set_sampling, wait_for_end

pytestmark = MARKS
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture
def talking(worker, tmp_path):
    """The bundled model, loaded with a chat template and half of its context."""
    load_settings = sys.modules["gradio_parts.settings"].load_settings
    folder = tmp_path / "talking"
    shutil.copytree(BUNDLED_MODEL, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    settings = load_settings(str(folder), "auto", "f16", "", "", "256", "stored")
    run(worker, lambda job: worker.load(settings, job))


@pytest.fixture
def slow_reading(server, monkeypatch):
    """The model takes half a second more for each part of a prompt that it reads."""
    conversation = sys.modules["gradio_parts.conversation"]
    plain = conversation.reader

    def slow_reader(job):
        read = plain(job)
        return lambda progress: (time.sleep(0.5), read(progress))

    monkeypatch.setattr(conversation, "reader", slow_reader)


def test_a_base_model_opens_on_the_completion(open_page):
    page = open_page()
    expect(page.get_by_role("tab", name="Completion")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#beginnings")).to_contain_text("Once upon a time")


def test_a_model_that_talks_opens_on_the_chat_with_starters_of_its_kind(talking, open_page):
    page = open_page()
    expect(page.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("button", name="Why is the sky blue?")).to_be_visible()
    open_tab(page, "Completion")
    expect(page.locator("#beginnings")).to_contain_text("The capital of France is")


def test_max_tokens_end_at_the_context(open_page, request):
    page = open_page()
    expect(page.locator("#max-tokens input[type=range]")).to_have_attribute("max", "512")
    set_sampling(page, max_tokens=400)
    request.getfixturevalue("talking")
    expect(page.locator("#max-tokens input[type=range]")).to_have_attribute("max", "256", timeout=LONG)
    expect(field(page, "max-tokens")).to_have_value("256")


def test_ctrl_enter_completes_and_escape_stops(open_page, slow):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=400)
    open_tab(page, "Completion")
    field(page, "prompt").fill("Once there was")
    field(page, "prompt").press("Control+Enter")
    expect(page.locator(".exl-token").nth(2)).to_be_visible(timeout=LONG)
    expect(page.locator("#completion-stats")).to_contain_text("tokens/s")
    page.keyboard.press("Escape")
    expect(page.locator("#completion-stats .exl-stats")).to_have_text("stopped", timeout=LONG)
    assert page.locator(".exl-token").count() < 300


def test_a_beginning_is_chosen(open_page):
    page = open_page()
    page.locator("#beginnings").get_by_text("One day, a little cat").click()
    expect(field(page, "prompt")).to_have_value("One day, a little cat")


def test_tokens_are_one_stop_and_the_arrows_move_between_them(open_page):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=12)
    open_tab(page, "Completion")
    page.locator("#complete").click()
    wait_for_end(page, "#completion-stats")
    expect(page.locator(".exl-token[tabindex='0']")).to_have_count(1)
    page.locator("#complete").focus()
    place = "[...document.querySelectorAll('.exl-token')].indexOf(document.activeElement)"
    page.keyboard.press("Tab")
    assert page.evaluate(place) == 0
    for key, expected in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 11), ("ArrowRight", 11)]:
        page.keyboard.press(key)
        assert page.evaluate(place) == expected, key
        expect(page.locator("#exl-tip .exl-tip-row").first).to_be_visible()
    page.keyboard.press("Tab")
    assert page.evaluate(place) == -1
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(place) == 11  # where it was left
    page.keyboard.press("Home")
    assert page.evaluate(place) == 0


NAMELESS = """() => [...document.querySelectorAll('button, input, textarea')].filter(e => e.offsetParent).filter(e =>
  !(e.ariaLabel || e.title || e.innerText.trim() || e.labels?.length && e.labels[0].innerText.trim() || e.placeholder)
).map(e => e.outerHTML.slice(0, 200))"""


def test_all_buttons_and_fields_have_names(open_page, slow):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=60)
    for name in ("Completion", "Model & memory", "Sampling", "Chat"):
        open_tab(page, name)
        assert page.evaluate(NAMELESS) == [], name
    send(page, "Hello.")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible(timeout=LONG)
    assert page.evaluate(NAMELESS) == []
    wait_for_end(page)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    assert page.evaluate(NAMELESS) == []


def test_an_unknown_model_is_said_at_once(open_page, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    page = open_page()
    open_tab(page, "Model & memory")
    for wrong in ("no such folder", "nobody/nothing"):
        field(page, "model").fill(wrong)
        field(page, "model").press("Enter")
        expect(page.locator("#planned .exl-error")).to_contain_text(f"{wrong}: no such folder here", timeout=LONG)


def test_a_long_prompt_shows_how_far_it_has_been_read(open_page, slow_reading):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=3)
    send(page, "The dog and the cat. " * 30)
    expect(page.locator("#chat-stats .exl-progress")).to_contain_text("Reading the prompt", timeout=LONG)
    told = page.locator("#chat-stats .exl-progress").inner_text()
    tokens, total = (int(word) for word in told.split() if word.isdigit())
    assert 0 <= tokens <= total > 100
    wait_for_end(page)


def test_a_prompt_that_is_being_read_can_be_stopped(open_page, slow_reading, monkeypatch):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=300)
    send(page, "The dog and the cat.")
    expect(page.locator("#message .stop-button")).to_be_visible(timeout=LONG)
    page.locator("#message .stop-button").click()
    expect(page.locator("#chat-stats .exl-stats")).to_have_text("stopped", timeout=LONG)
    expect(field(page, "message")).to_have_value("The dog and the cat.")
    monkeypatch.undo()  # reads at its own pace again
    set_sampling(page, max_tokens=3)
    field(page, "message").press("Enter")  # the model is as good as new
    wait_for_end(page)


def test_a_long_seed_does_not_wrap_the_line(open_page):
    page = open_page()
    set_sampling(page, temperature=1, max_tokens=60, seed=2**63 - 1)
    send(page, "Hello.")
    wait_for_end(page)
    expect(page.locator("#chat-stats")).to_contain_text("cut off by max tokens")
    open_tab(page, "Completion")
    page.locator("#complete").click()
    wait_for_end(page, "#completion-stats")
    for tab, places in (("Completion", ["#completion-stats"]), ("Chat", ["#chat-stats", "#chat-seed"])):
        open_tab(page, tab)
        for place in places:
            line = page.locator(f"{place} .exl-stats")
            assert line.bounding_box()["height"] < 24, place
            assert line.evaluate("e => e.scrollWidth - e.clientWidth") <= 0, place  # and nothing is cut
        expect(page.locator(f"{places[-1]} .exl-stats")).to_contain_text("seed 9223372036854775807")
