"""Conversations in the demo: what outlasts a reload, several of them, edits, files, and what a chat shows."""

from __future__ import annotations

import json

import pytest

import exl
from tests.browser.steps import (
    LONG,
    MARKS,
    answers,
    expect,
    field,
    forget_stats,
    open_tab,
    send,
    set_sampling,
    wait_for_end,
)

pytestmark = MARKS


def words(text: str) -> str:
    return " ".join(text.split())


def questions(page):
    return page.locator("#chatbot .user.message")


def asked(page) -> list[str]:
    """The user's messages as they are seen: U+2060 cannot be."""
    return [text.replace("\u2060", "").strip() for text in questions(page).all_inner_texts()]


def titles(page):
    return page.locator("#book .exl-open")


def wait_for_words(page, count: int = 25) -> str:
    page.wait_for_function(
        f"[...document.querySelectorAll('#chatbot .bot.message')].at(-1)?.innerText.length > {count}", timeout=LONG
    )
    return words(answers(page).last.inner_text())


def reload(page) -> None:
    page.reload()
    page.locator("#status .exl-status").wait_for()


def stored(page) -> list[dict]:
    """What the browser keeps, the newest first."""
    kept = page.evaluate("Object.keys(localStorage).filter(k => k.startsWith('exl-chat:')).map(k => localStorage[k])")
    return sorted(map(json.loads, kept), key=lambda one: -one["updated"])


@pytest.fixture
def story(open_page):
    """A page with one short conversation."""
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=8)
    send(page, "Tell me about a dog.")
    wait_for_end(page)
    return page


def test_a_reload_in_the_middle_of_an_answer_loses_nothing(open_page, slow, alone):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=120)
    send(page, "Tell me about a dog.")
    before = wait_for_words(page)
    reload(page)
    expect(page.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#chat-stats")).to_contain_text("tokens/s", timeout=LONG)
    assert words(answers(page).last.inner_text()).startswith(before)  # at once, and it goes on
    wait_for_end(page)
    expected = alone.chat().send("Tell me about a dog.", 120, temperature=0)
    assert words(answers(page).last.inner_text()) == words(expected.text)
    expect(questions(page)).to_have_text(["Tell me about a dog."])
    assert [message["role"] for message in stored(page)[0]["chat"]["messages"]] == ["user", "assistant"]
    expect(page.locator(".exl-error")).to_have_count(0)


def test_a_server_that_has_forgotten_the_tab_shows_it_as_far_as_it_came(open_page, slow):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=300)
    send(page, "Tell me about a dog.")
    before = wait_for_words(page)
    page.evaluate("window.addEventListener('pagehide', () => sessionStorage.removeItem('exl-tab'))")
    reload(page)
    expect(questions(page)).to_have_text(["Tell me about a dog."])
    kept = words(answers(page).last.inner_text())
    assert kept.startswith(before)
    set_sampling(page, max_tokens=10)
    page.locator("#continue").click()
    wait_for_end(page)
    assert words(answers(page).last.inner_text()).startswith(kept)
    assert len(words(answers(page).last.inner_text())) > len(kept)
    expect(answers(page)).to_have_count(1)


def test_a_closed_page_finds_its_conversations_again(story):
    text = answers(story).last.inner_text()
    other = story.context.new_page()
    story.close()
    other.goto(story.url)
    other.locator("#status .exl-status").wait_for()
    open_tab(other, "Chat")
    expect(answers(other)).to_have_count(0)  # a new tab begins a new conversation
    titles(other).get_by_text("Tell me about a dog.").click()
    expect(answers(other)).to_have_text([text])


def test_several_conversations(story):
    page = story
    first = answers(page).last.inner_text()
    page.locator("#book .exl-new").click()
    expect(answers(page)).to_have_count(0)
    send(page, "A bird sings.")
    wait_for_end(page)
    expect(titles(page)).to_have_text(["A bird sings.", "Tell me about a dog."])
    titles(page).nth(1).click()
    expect(answers(page)).to_have_text([first])
    expect(page.locator("#book [aria-current]")).to_have_text("Tell me about a dog.")
    page.locator("#book .exl-shown .exl-do-rename").click()
    page.get_by_label("Title").fill("Dogs <b>only</b>")
    page.get_by_label("Title").press("Enter")
    expect(titles(page)).to_have_text(["A bird sings.", "Dogs <b>only</b>"])
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#book .exl-shown .exl-do-delete").click()
    expect(titles(page)).to_have_text(["A bird sings."])
    expect(answers(page)).to_have_count(0)
    page.wait_for_timeout(2000)  # the server has told its changes once more
    reload(page)
    expect(titles(page)).to_have_text(["A bird sings."])


def test_an_answer_goes_on_while_another_conversation_is_shown(open_page, slow, alone):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=200)
    send(page, "Tell me about a dog.")
    wait_for_words(page, 5)
    page.locator("#book .exl-new").click()
    expect(answers(page)).to_have_count(0)
    page.wait_for_timeout(500)
    # Nothing of the other's is shown, not even for a moment: expect() would wait until its end.
    assert page.locator("#chat-stats .exl-wait").count() == answers(page).count() == 0
    expected = words(alone.chat().send("Tell me about a dog.", 200, temperature=0).text)
    page.wait_for_function(
        'Object.values(localStorage).some(kept => kept.includes(\'"cut":"max_tokens"\'))', timeout=LONG
    )
    expect(answers(page)).to_have_count(0)
    (kept,) = stored(page)
    assert words(kept["chat"]["messages"][1]["content"]) == expected
    titles(page).first.click()
    expect(answers(page)).to_have_count(1)
    assert words(answers(page).last.inner_text()) == expected


def test_an_edited_message_is_answered_anew(story, alone):
    page = story
    send(page, "And a cat?")
    wait_for_end(page)
    expect(answers(page)).to_have_count(2)
    forget_stats(page)
    page.get_by_role("button", name="Edit").first.click()
    page.locator("#chatbot textarea").fill("Tell me about a bird.")
    page.get_by_role("button", name="Submit").click()
    expect(questions(page)).to_have_text(["Tell me about a bird."], timeout=LONG)
    wait_for_end(page)
    expected = alone.chat().send("Tell me about a bird.", 8, temperature=0).text
    assert [words(text) for text in answers(page).all_inner_texts()] == [words(expected)]
    assert len(stored(page)[0]["chat"]["messages"]) == 2


def test_an_edited_answer_goes_on(story, alone):
    page = story
    page.get_by_role("button", name="Edit").last.click()
    page.locator("#chatbot textarea").fill("The dog was big and")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#chat-stats .exl-stats")).to_have_count(0, timeout=LONG)  # the server has changed it, too
    expect(answers(page)).to_have_text(["The dog was big and"])
    page.locator("#continue").click()
    wait_for_end(page)
    chat = alone.chat()
    chat.add("user", "Tell me about a dog.")
    chat.add("assistant", "The dog was big and")
    chat.continue_answer(8, temperature=0)
    assert words(answers(page).last.inner_text()) == words(chat.messages[-1]["content"])


def test_files_are_those_of_chat_save(story, alone, tmp_path):
    page, path = story, tmp_path / "chat.json"
    with page.expect_download() as download:
        page.locator("#book .exl-shown .exl-do-export").click()
    assert download.value.suggested_filename == "Tell-me-about-a-dog.json"
    download.value.save_as(path)
    chat = exl.Chat.load(alone, path)
    assert words(chat.messages[1]["content"]) == words(answers(page).last.inner_text())
    again = tmp_path / "again.json"
    chat.save(again)
    assert again.read_bytes() == path.read_bytes()

    chat = alone.chat("Be kind.")
    chat.add("user", "Who is <b>Tim</b>?")
    chat.add("assistant", "A boy.")
    chat.save(path)
    choose(page, path)
    expect(answers(page)).to_have_text(["A boy."])
    assert asked(page) == ["Who is <b>Tim</b>?"]
    expect(field(page, "system")).to_have_value("Be kind.")
    page.locator("#book .exl-new").click()
    expect(answers(page)).to_have_count(0)
    expect(field(page, "system")).to_have_value("Be kind.")  # as it was typed
    titles(page).get_by_text("Tell me about a dog.").click()
    expect(field(page, "system")).to_have_value("")
    expect(titles(page)).to_have_text(["Who is <b>Tim</b>?", "Tell me about a dog."])


def choose(page, path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("#book .exl-import").click()
    chooser.value.set_files(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "wrong.json: not a saved chat: found"),
        (b"[1, 2", "wrong.json: not a saved chat: found"),
        (b'{"format": "exl chat", "version": 9}', "wrong.json: not a saved chat: found '9', expected version 1"),
        (b'{"format": "exl chat", "version": 1, "messages": [7]}', "expected messages with a role and a content"),
    ],
)
def test_a_wrong_file_is_one_message(story, tmp_path, content, told):
    path = tmp_path / "wrong.json"
    path.write_bytes(content)
    choose(story, path)
    expect(story.locator("#chat-notice .exl-error")).to_contain_text(told)
    expect(answers(story)).to_have_count(1)
    expect(titles(story)).to_have_count(1)


def test_what_a_user_types_stays_text(story):
    page = story
    typed = "<script>document.title = 'x'</script> <img src=x onerror=\"document.title = 'y'\"> <b>bold</b> &lt; `<i>`"
    send(page, typed)
    wait_for_end(page)
    assert asked(page)[-1] == typed.replace("`", "")
    assert page.locator("#chatbot .user.message :is(script, img, b)").count() == 0
    assert page.title() == "exl"
    page.get_by_role("button", name="Edit").nth(2).click()
    assert page.locator("#chatbot textarea").input_value().replace("\u2060", "") == typed
    assert stored(page)[0]["chat"]["messages"][2]["content"] == typed


def test_formulas_are_shown(story):
    page = story
    page.get_by_role("button", name="Edit").last.click()
    page.locator("#chatbot textarea").fill(
        r"$a^2$, \(b^2\), $$c^2$$, \[d^2\], `$e^2$`; it costs $5 and then $6 <b>x</b>"
    )
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#chatbot .bot.message .katex")).to_have_count(4, timeout=LONG)
    expect(page.locator("#chatbot .bot.message code")).to_have_text("$e^2$")
    shown = answers(page).last.inner_text().replace("\u2060", "")
    assert "it costs $5 and then $6 <b>x</b>" in shown


def test_no_picture_from_elsewhere_is_shown(story):
    page = story  # whose requests to other hosts are errors
    page.get_by_role("button", name="Edit").last.click()
    page.locator("#chatbot textarea").fill("![a picture](http://192.0.2.1/x.png) that is all")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#chatbot .bot.message img")).to_have_count(1, timeout=LONG)
    assert page.locator("#chatbot .bot.message img").evaluate("e => e.naturalWidth") == 0


def test_a_starter_begins_a_conversation(open_page):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=4)
    open_tab(page, "Chat")
    page.get_by_role("button", name="Tell me a story about a dog.").click()
    wait_for_end(page)
    expect(questions(page)).to_have_text(["Tell me a story about a dog."])


def test_escape_stops_and_the_answer_goes_on_when_asked(open_page, slow):
    page = open_page()
    set_sampling(page, temperature=0, max_tokens=300)
    send(page, "Tell me about a dog.")
    before = wait_for_words(page)
    page.keyboard.press("Escape")
    expect(page.locator("#chat-stats .exl-stats")).to_have_text("stopped", timeout=LONG)
    set_sampling(page, max_tokens=10)
    page.locator("#continue").click()
    wait_for_end(page)
    assert words(answers(page).last.inner_text()).startswith(before)
    expect(page.locator("#chat-stats")).to_contain_text("cut off by max tokens")


def test_the_oldest_messages_are_forgotten_and_that_is_said_once(open_page, alone, tmp_path):
    page, path = open_page(), tmp_path / "long.json"
    chat = alone.chat()
    for _ in range(8):
        chat.add("user", "Tell me about the dog and the cat. " * 4)
        chat.add("assistant", "The dog and the cat went to the park and played all day. " * 3)
    chat.save(path)
    assert chat.num_tokens > 512
    set_sampling(page, temperature=0, max_tokens=8)
    open_tab(page, "Chat")
    choose(page, path)
    expect(answers(page)).to_have_count(8)
    send(page, "And then?")
    wait_for_end(page)
    expect(page.locator("#chat-notice .exl-note")).to_contain_text("the oldest")
    expect(answers(page)).to_have_count(9)
    send(page, "And then?")
    expect(answers(page)).to_have_count(10)
    wait_for_end(page)
    expect(page.locator("#chat-notice .exl-note")).to_have_count(0)


def test_the_full_storage_of_a_browser_is_said(story):
    page = story
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    send(page, "More.")
    wait_for_end(page)
    expect(page.locator("#book .exl-full")).to_be_visible()
