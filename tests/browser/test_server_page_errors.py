"""The server's page when servers are busy, load, ask for keys, or die."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from tests.browser.chromium import expect
from tests.browser.page_steps import (
    CHAT,
    DOG,
    answer_with,
    events,
    messages,
    refusal,
    reload,
    say,
    text_of,
    use,
    wait_for_words,
    wait_until_ended,
    wait_until_kept,
)

pytestmark = pytest.mark.browser


def test_a_busy_server_is_told_and_asked_again(visit):
    page = visit(expected="429")
    answer_with(page, refusal("the queue is full", "queue_full"), 429, **{"Retry-After": "1"})
    use(page, max_tokens=4)
    say(page, DOG)
    note = page.get_by_role("alert")
    expect(note).to_contain_text("The server is busy: the queue is full")
    wait_until_kept(page)
    reload(page)
    expect(page.get_by_role("alert")).to_contain_text("busy")
    page.get_by_role("button", name="Try again").click()
    wait_until_ended(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(messages(page)).to_have_count(1)
    assert text_of(page)


def test_a_model_that_loads_is_waited_for(visit):
    page = visit(expected="503")
    answer_with(page, refusal("model: 'stories' is loading, 40% of it", "model_loading"), 503)
    use(page, max_tokens=4)
    say(page, DOG)
    expect(page.locator(".waiting")).to_contain_text("40% of it")
    wait_until_ended(page)
    assert text_of(page)


def test_a_key_is_asked_for_and_kept_as_wished(visit):
    page = visit(expected="401")

    def guarded(route):
        if route.request.headers.get("authorization") == "Bearer secret":
            return route.continue_()
        return route.fulfill(status=401, content_type="application/json", body=refusal("wrong key", "invalid_api_key"))

    page.route("**/v1/**", guarded)
    reload(page)
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("This server asks for a key.")
    page.get_by_label("Key", exact=True).fill("guess")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("This key is not right.")
    page.get_by_label("Key", exact=True).fill("secret")
    page.get_by_label("Keep it in this browser").check()
    page.get_by_role("button", name="Use the key").click()
    expect(page.locator("#model")).to_have_value("stories")
    use(page, max_tokens=4)
    say(page, DOG)
    wait_until_ended(page)
    assert text_of(page)
    assert page.evaluate("Object.values(localStorage).includes('secret')")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Forget it").click()
    assert not page.evaluate("[localStorage, sessionStorage].some(area => Object.values(area).includes('secret'))")


def test_a_stream_that_ends_too_early_keeps_what_came(visit):
    page = visit()
    answer_with(page, events({"content": "One day"}, {"content": " a dog"}, reason=None, end=""))
    say(page, DOG)
    expect(page.get_by_role("alert")).to_contain_text("The connection was lost in the middle of the answer.")
    assert text_of(page) == "One day a dog"
    answer_with(page, events({"content": " ran."}))
    page.get_by_role("button", name="Continue").click()
    wait_until_ended(page)
    assert text_of(page) == "One day a dog ran."
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.fixture
def dying():
    """The address of a server that begins an answer, and what lets it die."""
    dies = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listening.accept()
        connection.recv(65536)
        event = b'data: {"choices":[{"index":0,"delta":{"content":"One day"}}]}\n\n'
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + b"%x\r\n%s\r\n" % (len(event), event))
        dies.wait(10)
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/", dies
    dies.set()
    thread.join(10)
    listening.close()


def test_a_server_that_dies_in_the_middle_keeps_what_came(visit, dying):
    page = visit(expected="ERR_")
    page.route(CHAT, lambda route: route.continue_(url=dying[0]), times=1)
    say(page, DOG)
    wait_for_words(page, 2)
    dying[1].set()
    expect(page.get_by_role("alert")).to_contain_text("The connection was lost in the middle of the answer.")
    assert text_of(page) == "One day"


def test_a_server_that_is_not_there_is_told(visit):
    page = visit(expected="ERR_")
    page.route(CHAT, lambda route: route.abort("connectionrefused"), times=1)
    say(page, DOG)
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    use(page, max_tokens=4)
    page.get_by_role("button", name="Try again").click()
    wait_until_ended(page)
    assert text_of(page)


def test_an_error_in_the_stream_is_told_as_text(visit):
    page = visit()
    error = {"error": {"message": "<b>no memory</b>", "code": "out_of_memory"}}
    answer_with(page, events({"content": "One"}, reason=None, end=f"data: {json.dumps(error)}\n\n"))
    say(page, DOG)
    expect(page.get_by_role("alert")).to_contain_text("<b>no memory</b>")
    assert text_of(page) == "One"


def test_another_answer_that_fails_leaves_the_one_before(visit):
    page = visit(expected="429")
    answer_with(page, events({"content": "The first."}))
    say(page, DOG)
    wait_until_ended(page)
    answer_with(page, refusal("full", "queue_full"), 429)
    page.get_by_role("button", name="Another answer").click()
    expect(page.get_by_role("alert")).to_contain_text("busy")
    assert text_of(page) == "The first."
