"""What a person does at the server's page, what a server answers in a test, and how a test waits."""

from __future__ import annotations

import json

from tests.browser.chromium import expect

DOG = "Tell me about a dog."
CHAT = "**/v1/chat/completions"


def use(page, **values) -> None:
    """Settings of the requests to come."""
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"#set-{name}").fill(str(value))
    page.keyboard.press("Escape")


def say(page, text: str) -> None:
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def messages(page, kind: str = "assistant"):
    return page.locator(f"article.{kind}")


def text_of(page) -> str:
    return messages(page).last.locator(".body").inner_text()


def reload(page) -> None:
    page.reload()
    page.locator("html[data-ready]").wait_for(state="attached")


def wait_until_ended(page) -> None:
    expect(page.locator("article.running")).to_have_count(0)
    expect(page.locator("#send")).to_be_visible()
    wait_until_kept(page)


def wait_until_kept(page) -> None:
    """The browser's own storage has what the page shows: a reload finds it."""
    expect(page.locator("#list")).to_have_attribute("aria-busy", "false")


def wait_until_written(page, count: int) -> None:
    """The browser's own storage has a conversation that ends with so many words."""
    from tests.server.running import wait_until

    wait_until(lambda: any(len(text.split()) >= count for text in page.evaluate(LAST_WRITTEN)))


# ``wait_for_function`` takes the promise itself for true.
LAST_WRITTEN = """() => new Promise((resolve, reject) => {
  const opened = indexedDB.open(`exl ${location.pathname}`);
  opened.onerror = () => reject(opened.error);
  opened.onsuccess = () => {
    const found = opened.result.transaction("chats").objectStore("chats").getAll();
    found.onerror = () => reject(found.error);
    found.onsuccess = () => {
      opened.result.close();
      resolve(found.result.map(chat => chat.messages.at(-1).content));
    };
  };
})"""


def watch_text(page) -> None:
    """From now on ``watched_texts`` collects what the last answer shows, each change of it: a test that looks again and
    again misses some on a busy machine."""
    page.evaluate(
        """() => {
          globalThis.watchedTexts = [];
          new MutationObserver(() => {
            const text = document.querySelector("article.running:last-of-type .body")?.innerText;
            if (text && text !== watchedTexts.at(-1)) watchedTexts.push(text);
          }).observe(document.getElementById("log"), { childList: true, characterData: true, subtree: true });
        }"""
    )


def watched_texts(page) -> list[str]:
    return page.evaluate("watchedTexts")


def wait_for_words(page, count: int = 4) -> str:
    page.wait_for_function(
        "count => (document.querySelector('article.running .body')?.innerText.split(' ').length ?? 0) >= count",
        arg=count,
    )
    return text_of(page)


def words(text: str) -> str:
    return " ".join(text.split())


def events(*deltas: dict, reason: str | None = "stop", usage: dict | None = None, end: str = "data: [DONE]\n\n") -> str:
    """A stream of the server's as text."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    if reason:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if usage:
        chunks.append({"choices": [], "usage": usage})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def answer_with(page, body: str, status: int = 200, times: int | None = 1, **headers: str) -> None:
    """The next requests for an answer get this one, not the server's."""
    kind = "text/event-stream" if status == 200 else "application/json"
    page.route(
        CHAT,
        lambda route: route.fulfill(status=status, headers={"Content-Type": kind, **headers}, body=body),
        times=times,
    )


def refusal(message: str, code: str) -> str:
    return json.dumps({"error": {"message": message, "type": "x", "param": None, "code": code}})
