"""Conversations at the end of their context: retries, new chats, what is dropped, and answers that go on."""

from __future__ import annotations

import pytest

import exl
from exl.batch import PAGE_SIZE
from exl.errors import ConfigError
from tests.model.test_chat import CHATML, model_with

WARM = {"temperature": 0.7}
CAT = [{"role": "user", "content": "Tell me about a cat"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_with(tmp_path_factory.mktemp("chat") / "chatml", CHATML)


@pytest.fixture(scope="module")
def small(folder):
    with exl.load(folder, context=512) as llm:
        yield llm


@pytest.fixture
def endless(folder):
    """A model that never ends its answer, with a context of four pages."""
    with exl.load(folder, context=4 * PAGE_SIZE, kv_cache="f32") as llm:
        llm._engine.generator.eos_ids = frozenset()
        yield llm


@pytest.mark.parametrize("what", ["retry", "reset", "new chat", "undo", "generate"])
def test_after_an_answer_that_has_filled_the_context(what, endless):
    """Found with ``exl.load().chat()`` and all defaults: the page that was held to be copied was one too many."""
    chat = endless.chat()
    first = chat.send("Tell me about a dog", 1000, seed=1, **WARM)
    assert (first.limit, first.num_prompt_tokens + first.num_tokens) == ("context", 4 * PAGE_SIZE)
    if what == "retry":
        again = chat.retry(1000, seed=2, **WARM)
    elif what == "generate":
        again = endless.generate(endless.chat_prompt(CAT), 1000, reuse_prefix=True)
    else:
        chat.reset() if what == "reset" else chat.undo() if what == "undo" else (chat := endless.chat())
        again = chat.send("Tell me about a cat", 1000, seed=2, **WARM)
    assert again.limit == "context"
    assert again.num_reused_tokens > 5
    pool = endless._engine.generator.pool
    assert pool.num_free == pool.num_pages


@pytest.mark.parametrize("same_prompt", [True, False])
def test_a_page_that_is_reused_in_place_holds_what_a_copy_would(endless, folder, same_prompt):
    def second(llm: exl.LLM) -> exl.Completion:
        llm.chat().send("Tell me about a dog", 1000, temperature=0)
        text = "Tell me about a dog" if same_prompt else "Tell me about a cat"
        return llm.chat().send(text, 1000, temperature=0, top_logprobs=3)

    with exl.load(folder, context=4 * PAGE_SIZE, kv_cache="f32", cache_tokens=16 * PAGE_SIZE) as roomy:
        roomy._engine.generator.eos_ids = frozenset()
        expected, found = second(roomy), second(endless)
    assert found.num_reused_tokens == expected.num_reused_tokens > 5
    assert found.logprobs[0].token_id == expected.logprobs[0].token_id
    assert found.logprobs[0].logprob == pytest.approx(expected.logprobs[0].logprob, abs=1e-3)


def test_a_whole_context_can_be_asked_for(endless):
    for _ in range(3):
        assert endless.generate("One day a dog", 4 * PAGE_SIZE, reuse_prefix=True).limit == "context"


def test_an_answer_takes_half_of_what_is_left(endless):
    chat = endless.chat()
    done = chat.send("Tell me about a dog", temperature=0)
    left = endless.context - done.num_prompt_tokens
    assert (done.limit, done.num_tokens) == ("max_tokens", left // 2)
    for _ in range(2):  # a conversation does not fill the context by its answers alone
        done = chat.send("More", temperature=0)
        assert done.num_prompt_tokens + done.num_tokens < endless.context


def test_drop_oldest_keeps_talking_in_whole_turns(small):
    chat = small.chat("Be kind.", overflow="drop-oldest")
    forgotten = []
    for i in range(12):
        done = chat.send(f"Tell me about dog number {i}.", 20, temperature=0)
        assert done.num_tokens > 0
        forgotten.append(chat.num_forgotten)
        shown = chat.messages[chat.num_forgotten :]
        assert shown[0] == {"role": "user", "content": f"Tell me about dog number {i + 1 - len(shown) // 2}."}
        prompt = small.chat_prompt([{"role": "system", "content": "Be kind."}, *shown[:-1]])
        assert done.num_prompt_tokens == len(prompt)
    assert forgotten[0] == 0
    assert forgotten == sorted(forgotten)
    assert forgotten[-1] > 0
    assert len(set(forgotten)) < len(forgotten)  # half of the context is freed at once, not a turn at each turn
    assert len(chat.messages) == 24  # nothing is lost to the user
    assert chat.retry(20, temperature=0).num_tokens > 0
    while chat.num_forgotten:
        chat.undo()
    chat.reset()
    assert (chat.num_forgotten, chat.num_tokens) == (0, 0)


def test_drop_oldest_cannot_help_one_message_that_is_too_long(small):
    chat = small.chat(overflow="drop-oldest")
    chat.send("Hello.", 5)
    before = chat.messages
    with pytest.raises(ConfigError, match=r"the conversation takes \d+ tokens and the context holds 512"):
        chat.send("dog " * 510)
    assert chat.messages == before
    with pytest.raises(ConfigError, match="overflow: found 'drop', expected 'error' or 'drop-oldest'"):
        small.chat(overflow="drop")


def test_an_answer_that_was_cut_off_goes_on(small):
    whole = small.chat().send("Tell me about a dog", 30, temperature=0)
    chat = small.chat()
    first = chat.send("Tell me about a dog", 12, temperature=0)
    pieces = list(stream := chat.stream_continue(18, temperature=0))
    assert (first.token_ids + stream.completion.token_ids) == whole.token_ids
    assert first.text + "".join(pieces) == whole.text
    assert chat.messages == [
        {"role": "user", "content": "Tell me about a dog"},
        {"role": "assistant", "content": whole.text.strip()},
    ]
    assert stream.completion.num_reused_tokens >= first.num_prompt_tokens
    chat.send("Why?", 5)
    assert len(chat.messages) == 4


def test_an_answer_that_was_stopped_goes_on(small):
    for chat in (small.chat(), exl.Chat.from_json(small, small.chat().to_json())):
        stream = chat.stream("Tell me about a dog", 30, temperature=0)
        said = next(stream) + next(stream)
        stream.close()
        done = chat.continue_answer(5, temperature=0)
        assert chat.messages[-1]["content"] == (said + done.text).strip()
    with pytest.raises(ConfigError, match="continue: found no answer"):
        small.chat().continue_answer()
    with pytest.raises(ConfigError, match="found an answer as the last message"):
        chat.send(None)


def test_messages_begin_a_chat(small):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Why?"},
    ]
    chat = small.chat(messages=messages)
    assert (chat.system, chat.messages) == ("Be kind.", messages[1:])
    done = chat.send(None, 10, temperature=0)
    assert done.num_prompt_tokens == len(small.chat_prompt(messages))
    assert small.complete_chat(messages, 10, temperature=0).text == done.text
    assert "".join(small.stream_chat(messages, 10, temperature=0)) == done.text
    assert small.complete_chat(messages, 10, temperature=0, reuse_prefix=False).num_reused_tokens == 0
    assert small.complete_chat(messages, 10, reuse_prefix=True).num_reused_tokens > 0
    assert small.complete_chat(messages, exl.SamplingParams(max_tokens=3)).num_tokens == 3
    for bad, words in [
        ("Hello", "messages: found 'Hello', expected a list"),
        ({"role": "user"}, "messages: found"),
        (["Hello"], r"messages\[0\]: found 'Hello', expected an object"),
        ([{"content": "Hello"}], r"messages\[0\]: found"),
        ([], "message: found none"),
        (messages[:3], "found an answer as the last message"),
    ]:
        with pytest.raises(ConfigError, match=words):
            small.complete_chat(bad)
    with pytest.raises(ConfigError, match="system: given twice"):
        small.chat("Be short.", messages=messages)


def test_calls_of_tools_are_saved_and_loaded(small, tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "21 degrees", "name": "weather"},
    ]
    chat = small.chat(messages=messages)
    chat.save(tmp_path / "chat.json")
    assert exl.Chat.load(small, tmp_path / "chat.json").messages == messages
