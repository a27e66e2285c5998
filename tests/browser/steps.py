"""What a person does at the demo, and how a test waits for what they see."""

from __future__ import annotations

import pytest

from tests.browser.chromium import HOW, expect

pytest.importorskip("gradio", reason=f"gradio is not installed: {HOW}")
MARKS = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::Warning:gradio")]
LONG = 30_000  # milliseconds; what is waited for is there in one or two seconds on an idle machine


def field(page, name: str):
    return page.locator(f"#{name} textarea, #{name} input:not([type=range])").first


# Gradio gives a tab's fields their first values again one animation frame after it shows them for the first time: what
# is typed within that frame, which no person can, is lost.
A_FEW_FRAMES = """() => new Promise(done => {
  const wait = frames => frames ? requestAnimationFrame(() => wait(frames - 1)) : done();
  wait(5);
})"""
A_FIELD_OF = {"Chat": "message", "Completion": "prompt", "Sampling": "temperature", "Model & memory": "ram"}


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    expect(field(page, A_FIELD_OF[name])).to_be_visible()
    page.evaluate(A_FEW_FRAMES)


def set_sampling(page, **values) -> None:
    open_tab(page, "Sampling")
    for name, value in values.items():
        field(page, name.replace("_", "-")).fill(str(value))
        field(page, name.replace("_", "-")).press("Tab")


def forget_stats(page) -> None:
    """Takes away what was told of an answer before, so that ``wait_for_end`` waits for the next."""
    page.evaluate("document.querySelector('#chat-stats .exl-stats')?.remove()")


def send(page, text: str) -> None:
    open_tab(page, "Chat")
    forget_stats(page)
    field(page, "message").fill(text)
    field(page, "message").press("Enter")


def answers(page):
    return page.locator("#chatbot .bot.message")


def wait_for_end(page, stats: str = "#chat-stats") -> None:
    expect(page.locator(f"{stats} .exl-stats")).to_contain_text("tokens/s", timeout=LONG)


def seen_while(page, locator, stats: str) -> list[str]:
    """The texts that are seen one after the other until the end."""
    texts = []
    while page.locator(f"{stats} .exl-stats").count() == 0:
        text = locator.last.inner_text() if locator.count() else ""
        if not texts or text != texts[-1]:
            texts.append(text)
        page.wait_for_timeout(40)
    return texts
