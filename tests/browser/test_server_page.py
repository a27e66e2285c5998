"""A person at the server's own page: what they press, what they see, and how it looks."""

from __future__ import annotations

import itertools
import json
import re

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
    wait_until_written,
    watch_text,
    watched_texts,
    words,
)

pytestmark = pytest.mark.browser


# ---- answers


def test_an_answer_streams_and_is_the_servers_own(visit, running, slow):
    page = visit()
    use(page, temperature=0, max_tokens=40)
    watch_text(page)
    say(page, DOG)
    wait_until_ended(page)
    seen = [words(text) for text in watched_texts(page)]
    assert len({text for text in seen if text}) >= 4
    assert all(after.startswith(before) for before, after in itertools.pairwise(seen) if before)
    alone = running.llm.chat().send(DOG, 40, temperature=0)
    assert words(text_of(page)) == words(alone.text)
    strip = page.locator("#strip")
    expect(strip.locator(".made")).to_have_text(f"answer {alone.num_tokens}")
    expect(strip.locator(".prompt")).to_contain_text(f"prompt {alone.num_prompt_tokens}")
    expect(strip.locator(".context")).to_have_text(f"context {alone.num_prompt_tokens + alone.num_tokens} of 512")
    assert re.search(r"[\d.]+ tokens/s\s*first after \d+ ms", strip.inner_text().replace("\n", " "))


def test_escape_stops_and_what_came_can_be_continued(visit, slow):
    page = visit()
    use(page, temperature=0, max_tokens=200)
    say(page, DOG)
    wait_for_words(page)
    page.keyboard.press("Escape")
    wait_until_ended(page)
    stopped = words(text_of(page))
    assert 4 <= len(stopped.split()) < 100
    expect(messages(page).last.locator(".note")).to_contain_text("Stopped.")
    use(page, max_tokens=10)
    page.get_by_role("button", name="Continue").click()
    wait_until_ended(page)
    assert words(text_of(page)).startswith(stopped)
    assert len(words(text_of(page))) > len(stopped) + 10
    expect(messages(page)).to_have_count(1)


def test_a_stop_before_the_first_word_leaves_the_question(visit):
    page = visit()
    page.route(CHAT, lambda route: None)
    say(page, DOG)
    expect(page.locator(".waiting")).to_contain_text("Waiting for the model")
    page.get_by_role("button", name="Stop").click()
    wait_until_ended(page)
    expect(messages(page)).to_have_count(0)
    expect(messages(page, "user")).to_have_count(1)
    page.unroute_all(behavior="ignoreErrors")


def test_another_answer_an_edit_and_a_deletion(visit):
    page = visit()
    use(page, temperature=0, max_tokens=6)
    say(page, DOG)
    wait_until_ended(page)
    first = text_of(page)
    use(page, temperature=5, seed=11)
    page.get_by_role("button", name="Another answer").click()
    wait_until_ended(page)
    expect(messages(page)).to_have_count(1)
    assert text_of(page) != first
    say(page, "And a cat?")
    wait_until_ended(page)
    expect(page.get_by_role("button", name="Edit and send again")).to_have_count(1)  # of the last message only
    page.get_by_role("button", name="Edit and send again").click()
    page.get_by_role("textbox", name="The message").fill("And a bird?")
    page.keyboard.press("Enter")
    wait_until_ended(page)
    assert messages(page, "user").locator(".body").all_inner_texts() == [DOG, "And a bird?"]
    expect(messages(page)).to_have_count(2)
    messages(page, "user").first.get_by_role("button", name="Delete").click()
    assert messages(page, "user").locator(".body").all_inner_texts() == ["And a bird?"]
    expect(messages(page)).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(messages(page)).to_have_count(2)


def test_a_stop_before_another_answer_leaves_the_first(visit):
    page = visit()
    answer_with(page, events({"content": "The first."}))
    say(page, DOG)
    wait_until_ended(page)
    page.route(CHAT, lambda route: None)
    page.get_by_role("button", name="Another answer").click()
    expect(page.locator(".waiting")).to_be_visible()
    page.keyboard.press("Escape")
    wait_until_ended(page)
    assert messages(page).locator(".body").all_inner_texts() == ["The first."]
    page.unroute_all(behavior="ignoreErrors")


def test_thoughts_and_calls_of_tools_are_blocks(visit):
    page = visit()
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    more = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"city"', ': "Pa', 'ris"}')]
    answer_with(
        page,
        events(
            {"reasoning_content": "Let me "},
            {"reasoning_content": "<b>think</b>."},
            {"content": "It is **warm**."},
            {"tool_calls": [call]},
            *({"tool_calls": [piece]} for piece in more),
            reason="tool_calls",
        ),
    )
    say(page, "Hello")
    wait_until_ended(page)
    summary = page.locator(".reasoning summary")
    expect(summary).to_contain_text("Thought for")
    expect(page.locator(".thought")).to_be_hidden()
    summary.click()
    expect(page.locator(".thought")).to_have_text("Let me <b>think</b>.")
    expect(page.locator("article.assistant strong")).to_have_text("warm")
    expect(page.locator(".call summary")).to_have_text("Call of get_weather")
    assert json.loads(page.locator(".call code").inner_text()) == {"city": "Paris"}


def test_the_servers_settings_are_asked_for_as_set(visit):
    page = visit()
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    use(page, temperature=0.7, top_p=0.9, min_p=0.05, max_tokens=3, seed=7, system="Be kind.")
    say(page, DOG)
    wait_until_ended(page)
    expected = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05, "max_tokens": 3, "seed": 7, "model": "stories"}
    assert {name: asked[0][name] for name in expected} == expected
    assert asked[0]["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": DOG}]
    page.get_by_role("button", name="Settings").click()
    page.locator("#set-top_p").fill("7")
    expect(page.locator("small.wrong")).to_be_visible()
    page.keyboard.press("Escape")
    reload(page)
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#set-top_p")).to_have_value("0.9")  # a number that cannot be is not kept


# ---- what the browser keeps


def test_a_reload_finds_the_conversation_and_the_draft(visit, slow):
    page = visit()
    use(page, temperature=0, max_tokens=8)
    say(page, DOG)
    wait_until_ended(page)
    text = text_of(page)
    page.locator("#draft").fill("And then")
    reload(page)
    expect(messages(page)).to_have_count(1)
    assert text_of(page) == text
    expect(page.locator("#draft")).to_have_value("And then")
    expect(page.locator("#strip .made")).to_have_text("answer 8")
    expect(page.locator("#list a")).to_have_text([DOG])


def test_a_reload_in_the_middle_keeps_what_came(visit, slow):
    page = visit()
    use(page, temperature=0, max_tokens=400)
    say(page, DOG)
    wait_for_words(page)
    wait_until_written(page, 4)
    expect(page.locator("article.running")).to_have_count(1)
    reload(page)
    expect(messages(page)).to_have_count(1)
    assert len(text_of(page).split()) >= 4
    expect(messages(page).locator(".note")).to_contain_text("Interrupted")
    expect(page.get_by_role("button", name="Continue")).to_be_visible()


def test_a_browser_that_keeps_nothing_has_conversations_until_they_are_deleted(visit, slow):
    context = visit().context
    context.add_init_script("Object.defineProperty(window, 'indexedDB', { value: undefined })")
    page = visit(context)
    expect(page.locator("#toast")).to_contain_text("This browser keeps nothing for this page")
    use(page, temperature=0, max_tokens=400)
    say(page, "First.")
    wait_for_words(page)
    page.get_by_role("button", name="Stop").click()
    wait_until_ended(page)
    page.get_by_role("button", name="New chat").click()
    say(page, DOG)
    wait_for_words(page)
    page.locator("#list li").filter(has=page.locator("[aria-current]")).hover()
    page.get_by_role("button", name=f"Delete: {DOG}").click()
    wait_until_ended(page)
    expect(page.locator("#list a")).to_have_text(["First."])
    page.get_by_role("link", name="First.").click()
    expect(messages(page)).to_have_count(1)
    expect(page.locator("#list a")).to_have_text(["First."])


def test_tabs_share_the_list_and_lose_nothing(visit):
    one = visit()
    use(one, temperature=0, max_tokens=4)
    two = visit(one.context)
    say(one, "In the first tab.")
    say(two, "In the second tab.")
    for page in (one, two):
        wait_until_ended(page)
        expect(page.locator("#list a")).to_have_count(2)
        assert sorted(page.locator("#list a").all_inner_texts()) == ["In the first tab.", "In the second tab."]
    two.get_by_role("link", name="In the first tab.").click()
    expect(messages(two, "user").locator(".body")).to_have_text("In the first tab.")
    say(two, "Go on.")
    expect(messages(one)).to_have_count(2)  # it sees what the other tab adds
    two.locator("#list li").filter(has=two.locator("[aria-current]")).hover()
    two.get_by_role("button", name="Delete: In the first tab.").click()
    expect(one.locator("#list a")).to_have_text(["In the second tab."])
    expect(one.locator("article")).to_have_count(0)


def test_two_tabs_that_change_one_conversation_make_two_of_it(visit, slow):
    one = visit()
    use(one, temperature=0, max_tokens=4)
    say(one, DOG)
    wait_until_ended(one)
    use(one, max_tokens=400)  # more than both tabs can have got when they are stopped
    two = visit(one.context, one.evaluate("location.pathname + location.hash"))
    expect(messages(two)).to_have_count(1)
    say(one, "The one.")
    wait_for_words(one, 2)
    expect(messages(two, "user")).to_have_count(2)
    expect(messages(two).last.locator(".note")).to_have_text("Another tab is receiving this answer.")
    say(two, "The other.")
    for page in (one, two):
        page.get_by_role("button", name="Stop").click()
        wait_until_ended(page)
    expect(one.locator("#list a")).to_have_count(2)
    kept = set()
    # By their names: the list's order changes once more when this tab hears of the other's end.
    for name in one.locator("#list li").evaluate_all("all => all.map(item => item.dataset.id)"):
        link = one.locator(f'#list li[data-id="{name}"] a')
        link.click()
        expect(link).to_have_attribute("aria-current", "page")
        kept.update(messages(one, "user").locator(".body").all_inner_texts())
    assert kept == {DOG, "The one.", "The other."}


def test_conversations_are_renamed_exported_and_imported(visit, tmp_path):
    page = visit()
    use(page, temperature=0, max_tokens=4, system="Be kind.")
    say(page, DOG)
    wait_until_ended(page)
    page.locator("#list li").hover()
    page.get_by_role("button", name="Rename").click()
    page.get_by_role("textbox", name="Name of the conversation").fill("A dog / its life")
    page.keyboard.press("Enter")
    expect(page.locator("#list a")).to_have_text("A dog / its life")
    page.locator("#list li").hover()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export: A dog").click()
    path = tmp_path / "chat.json"
    download.value.save_as(path)
    from exl.saved_chat import SavedChat, parse_saved

    saved = SavedChat.from_json(parse_saved(path.read_text(encoding="utf-8"), "x"), "x")  # `exl chat` reads it, too
    assert saved.system == "Be kind."
    assert saved.model == "stories"
    assert [set(message) for message in saved.messages] == [{"role", "content"}] * 2
    other = visit()
    other.get_by_role("button", name="Settings").click()
    other.locator("#file").set_input_files([path])
    other.keyboard.press("Escape")
    other.get_by_role("link", name="A dog / its life").click()
    expect(messages(other, "user").locator(".body")).to_have_text(DOG)
    other.locator("#file").set_input_files([{"name": "x.json", "mimeType": "", "buffer": b'{"format": 1}'}])
    expect(other.locator("#toast")).to_contain_text("x.json: it is no saved chat of exl")


# ---- how it looks, and how it is reached

EVIL = """Text <script>hacked=1</script> <img src="https://evil.example/x.png" onerror="hacked=1">

[click](javascript:hacked=1) ![p](https://evil.example/p.png)

```html
<script>hacked=1</script>
```
"""


def test_what_a_model_writes_runs_nothing_and_fetches_nothing(visit):
    page = visit(expected="TrustedHTML")
    answer_with(page, events({"content": EVIL}, {"reasoning_content": "<img src=x onerror=hacked=1>"}))
    say(page, "<img src=x onerror=hacked=1>")
    wait_until_ended(page)
    assert page.evaluate("globalThis.hacked") is None
    assert page.locator("#log script, #log img, #log iframe").count() == 0
    hrefs = page.locator("#log a").evaluate_all("all => all.map(a => a.href)")
    assert hrefs == ["https://evil.example/x.png", "https://evil.example/p.png"]
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = '<p>x</p>'; return '' } catch (e) { return e.name } }"
    )
    assert refused == "TypeError"  # by the policy


def test_it_works_behind_a_prefix(visit, running):
    page = visit()
    asked = []

    def proxied(route):
        asked.append(route.request.url)
        route.continue_(url=route.request.url.replace("/deep/exl", "", 1))

    page.context.route("**/deep/exl/**", proxied)
    page = visit(page.context, "/deep/exl/")
    use(page, max_tokens=4)
    say(page, DOG)
    wait_until_ended(page)
    assert text_of(page)
    assert f"{running.url}/deep/exl/v1/chat/completions" in asked
    expect(page.locator("#list a")).to_have_count(1)


MEASURE = """() => {
  const rgb = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * (top[3] ?? 1) + below[i] * (1 - (top[3] ?? 1)));
  const light = c => { const l = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
  const behind = e => {
    const chain = [];
    for (; e; e = e.parentElement) chain.unshift(rgb(getComputedStyle(e).backgroundColor));
    return chain.reduce((below, top) => over(top, below), [255, 255, 255]); };
  const weak = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    const isSeen = e.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (!walker.currentNode.data.trim() || !isSeen) continue;
    if (e.closest(".hidden, script, style, option, .skip")) continue;
    const under = behind(e), [a, b] = [light(over(rgb(getComputedStyle(e).color), under)), light(under)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) weak.push([walker.currentNode.data, contrast]);
  }
  const wide = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility({visibilityProperty: true})
    && !e.closest("pre, .table, .hidden, .skip, #side") && e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 90));
  const nameless = [...document.querySelectorAll("button, input, textarea, select")]
    .filter(e => e.checkVisibility({visibilityProperty: true}))
    .filter(e => !(e.ariaLabel || e.innerText?.trim() || e.labels?.length)).map(e => e.outerHTML.slice(0, 120));
  return { weak, wide, nameless, scrolls: document.documentElement.scrollWidth > innerWidth };
}"""
FINE = {"weak": [], "wide": [], "nameless": [], "scrolls": False}
RICH = (
    """# Title\n\nA [link](https://example.com), `code` and **bold**.\n\n- one\n- two\n
| a long header | another one | a third | a fourth | and a fifth |\n|--|--|--|--|--|\n| 1 | 2 | 3 | 4 | 5 |\n
```python\nprint("a very long line of code that does not fit the width of a telephone, whatever happens to it")\n```\n
> quoted\n\nAverylongwordwithoutanyspaceinit"""
    + "x" * 120
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)], ids=["desktop", "phone"])
def test_it_fits_and_can_be_read(visit, scheme, size):
    is_phone = size[0] < 500
    page = visit(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, has_touch=is_phone, expected="429"
    )
    assert page.evaluate(MEASURE) == FINE
    usage = {"prompt_tokens": 12345, "completion_tokens": 678, "total_tokens": 13023}
    answer_with(page, events({"reasoning_content": "Hm."}, {"content": RICH}, usage=usage))
    say(page, "Show me all of it. " * 8)
    wait_until_ended(page)
    assert page.evaluate(MEASURE) == FINE
    page.locator(".reasoning summary").click()
    answer_with(page, refusal("the queue is full", "queue_full"), 429)
    say(page, "Again.")
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.evaluate(MEASURE) == FINE
    assert page.locator("#composer").bounding_box()["y"] + page.locator("#composer").bounding_box()["height"] <= size[1]
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate(MEASURE) == FINE
    page.keyboard.press("Escape")
    if is_phone:
        page.get_by_role("button", name="Conversations").click()
        expect(page.get_by_role("navigation", name="Conversations")).to_be_visible()
        page.wait_for_function("() => document.getElementById('side').getAnimations().length === 0")  # it has come in
        assert page.evaluate(MEASURE) == FINE
        page.keyboard.press("Escape")
        expect(page.get_by_role("navigation", name="Conversations")).to_be_hidden()


def test_the_theme_is_chosen_and_kept(visit):
    page = visit(color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_role("button", name="Light or dark").click()
    dark = page.evaluate(paper)
    assert dark != light
    reload(page)
    assert page.evaluate(paper) == dark


def test_by_keyboard_alone(visit):
    page = visit()
    expect(page.locator("#draft")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#draft")).to_have_value("one\ntwo")
    expect(page.locator("article")).to_have_count(0)
    page.locator("#skip").focus()
    expect(page.locator("#skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#draft")).to_be_focused()


def test_reading_further_up_is_not_disturbed(visit, slow):
    page = visit(viewport={"width": 1000, "height": 400})
    use(page, temperature=0, max_tokens=300)
    answer_with(page, events({"content": "line\n\n" * 60}))
    say(page, "First")
    wait_until_ended(page)
    assert page.evaluate(
        "isAtEnd = () => (e => e.scrollHeight - e.scrollTop - e.clientHeight < 4)(document.getElementById('scroll'));"
        "isAtEnd()"
    )
    say(page, DOG)
    wait_for_words(page, 20)
    assert page.evaluate("isAtEnd()")  # it follows
    page.locator("#scroll").hover()
    page.mouse.wheel(0, -600)
    expect(page.get_by_role("button", name="To the latest message")).to_be_visible()
    place = page.evaluate("document.getElementById('scroll').scrollTop")
    page.wait_for_timeout(500)
    assert page.locator("article.running").count() == 1
    assert abs(page.evaluate("document.getElementById('scroll').scrollTop") - place) < 2
    page.get_by_role("button", name="To the latest message").click()
    assert page.evaluate("isAtEnd()")
    page.keyboard.press("Escape")
    wait_until_ended(page)
