"""Conversations: what is computed, what stays cached, and that errors lose nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.errors import ConfigError, ExlError

# A base model knows none of these templates: they only need to render, as text without special tokens.
CHATML = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
FORGETFUL = (  # renders only the last question
    "{% for m in messages[-1:] %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
WITH_TOOLS = "{% for t in tools or [] %}({{ t.name }}){% endfor %}" + CHATML


def model_with(folder: Path, template: str) -> Path:
    shutil.copytree(BUNDLED_MODEL, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with exl.load(model_with(tmp_path_factory.mktemp("chat") / "chatml", CHATML)) as llm:
        yield llm


@pytest.fixture
def computed(monkeypatch):
    """Number of rows of each pass through the model."""
    from exl.engine.runner import Runner

    counts, plain = [], Runner.step

    def step(self, decode, chunks, *rest):
        counts.append(sum(batch.num_rows for batch in (decode, *chunks) if batch is not None))
        return plain(self, decode, chunks, *rest)

    monkeypatch.setattr(Runner, "step", step)
    return counts


def test_a_second_turn_computes_only_what_is_new(llm, computed):
    chat = llm.chat("You tell short stories about animals to children who like them.")
    first = chat.send("Tell me about a dog that finds a ball in the park.", 20)
    before = chat.num_tokens
    computed.clear()
    second = chat.send("And then?", 10)
    new = second.num_prompt_tokens - before
    assert second.num_reused_tokens == before - 1  # all but the last sampled token, which was never run
    assert computed == [new + 1] + [1] * (second.num_tokens - 1 + (second.finish_reason == "stop"))
    assert new < 40 < first.num_prompt_tokens
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_the_prompt_is_what_the_template_says(llm):
    """The tokens that were run read exactly as the template renders the conversation."""
    chat = llm.chat("Be brief.")
    for text in ("Hello there.", "Why?", "How?"):
        done = chat.send(text, 6)
    rendered = llm.chat_prompt([{"role": "system", "content": "Be brief."}, *chat.messages[:-1]])
    assert done.num_prompt_tokens == pytest.approx(len(rendered), abs=4)
    ids = chat._run_ids[: done.num_prompt_tokens]
    assert llm.tokenizer.decode(ids).split() == llm.tokenizer.decode(rendered).split()


def test_the_same_answers_as_without_a_cache(llm):
    """Greedy answers of a chat equal those for a prompt that is computed from its beginning."""
    chat = llm.chat()
    chat.send("Tell me about a cat.", 12)
    done = chat.send("Was it big?", 12)
    ids = chat._run_ids[: done.num_prompt_tokens]
    assert llm.generate(ids, 12).token_ids == done.token_ids


def test_a_template_that_forgets_is_followed(tmp_path):
    with exl.load(model_with(tmp_path / "m", FORGETFUL)) as llm:
        chat = llm.chat()
        chat.send("Tell me about a dog and a cat and a bird.", 10)
        done = chat.send("Hi.", 5)
        assert done.num_prompt_tokens == len(llm.chat_prompt([{"role": "user", "content": "Hi."}]))


def test_streaming_and_stopping_in_the_middle(llm):
    chat = llm.chat()
    pieces = list(stream := chat.stream("Tell me about a frog.", 15))
    assert "".join(pieces) == stream.completion.text
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces).strip()}
    stream = chat.stream("More.", 50)
    said = next(stream) + next(stream)
    stream.close()
    assert chat.messages[-1]["content"] == said.strip()
    assert chat.send("Go on.", 5).num_reused_tokens > 20  # the cache still has the earlier turns


def test_undo_and_retry(llm):
    chat = llm.chat()
    chat.send("One.", 5)
    first = chat.messages
    chat.send("Two.", 5, temperature=1.0, seed=1)
    again = chat.retry(5, temperature=1.0, seed=2)
    assert [m["content"] for m in chat.messages] == [*(m["content"] for m in first), "Two.", again.text.strip()]
    assert chat.retry(5, temperature=1.0, seed=2).text == again.text
    assert chat.undo() == "Two."
    assert chat.messages == first
    assert chat.undo() == "One."
    with pytest.raises(ConfigError, match="undo: found no message"):
        chat.undo()
    with pytest.raises(ConfigError, match="retry: found no message"):
        chat.retry()


def test_a_retry_that_is_given_up_at_once_loses_nothing(llm):
    chat = llm.chat()
    chat.send("One.", 5)
    before = chat.messages
    chat.stream_retry(5, temperature=1.0, seed=2).close()
    assert chat.messages == before
    assert chat.send("Two.", 5).num_reused_tokens > 0


def test_a_full_context_loses_nothing(tmp_path):
    with exl.load(model_with(tmp_path / "m", CHATML), context=100) as llm:
        chat = llm.chat()
        chat.send("Hello.", 5)
        before = chat.messages
        with pytest.raises(ConfigError, match=r"takes \d+ tokens and the context holds 100: undo a turn"):
            chat.send("dog " * 90)
        assert chat.messages == before
        assert chat.send("Bye.", 5).num_tokens == 5


def test_what_is_refused_leaves_the_chat_as_it_was(llm):
    chat = llm.chat()
    chat.send("Hello.", 5)
    before = chat.messages
    for text in ("", "  \n"):
        with pytest.raises(ConfigError, match="expected a text that is not empty"):
            chat.send(text)
    with pytest.raises(ConfigError, match="temperature"):
        chat.send("Hi.", temperature=-1.0)
    with pytest.raises(ConfigError, match="temperature"):
        chat.retry(temperature=-1.0)
    with pytest.raises(TypeError, match="max_new_tokens"):
        chat.send("Hi.", max_new_tokens=5)
    assert chat.messages == before
    with pytest.raises(ConfigError, match="message: found none"):
        llm.chat().send(None)


def test_tools_and_added_messages(tmp_path):
    with exl.load(model_with(tmp_path / "m", WITH_TOOLS)) as llm:
        chat = llm.chat(tools=[{"name": "weather"}])
        chat.add("user", "Is it warm?")
        chat.add("tool", "21 degrees", name="weather")
        done = chat.send(None, 5)
        text = llm.tokenizer.decode(llm.chat_prompt(chat.messages[:-1], tools=[{"name": "weather"}]))
        assert "(weather)" in text and "21 degrees" in text  # noqa: PT018
        assert done.num_prompt_tokens == len(llm.chat_prompt(chat.messages[:-1], tools=[{"name": "weather"}]))
        assert [m["role"] for m in chat.messages] == ["user", "tool", "assistant"]


def test_a_new_system_prompt_counts_from_the_next_turn_on(llm):
    chat = llm.chat("Be kind.")
    chat.send("Hello.", 5)
    chat.system = "Be short and clear."
    done = chat.send("Hello again.", 5)
    prompt = llm.chat_prompt([{"role": "system", "content": "Be short and clear."}, *chat.messages[:-1]])
    assert done.num_prompt_tokens == len(prompt)


def test_a_base_model_gets_a_transcript_and_says_so():
    with exl.load() as llm:
        chat = llm.chat()
        assert chat.is_transcript
        assert "no chat template" in chat.notice
        first = chat.send("Hello.", 10)
        assert first.num_prompt_tokens == len(llm.encode("User: Hello.\nAssistant:"))
        before = chat.num_tokens
        assert chat.send("Why?", 5).num_reused_tokens >= before - 8
        assert "User:" not in chat.messages[-1]["content"]
        with pytest.raises(ConfigError, match="no chat template"):
            llm.chat(tools=[{"name": "x"}])


def test_saved_and_loaded(llm, tmp_path, computed):
    chat = llm.chat("Be kind.")
    chat.send("Hello.", 5)
    chat.save(tmp_path / "chat.json")
    again = exl.Chat.load(llm, tmp_path / "chat.json")
    assert again.messages == chat.messages
    assert again.system == "Be kind."
    assert again.send("And?", 5).text == chat.send("And?", 5).text
    assert list(tmp_path.iterdir()) == [tmp_path / "chat.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", ["JSON"]),
        (b"\xff\xfe", ["UTF-16", "UTF-8"]),
        (b"[" * 100_000, ["JSON"]),
        (b"[]", ['"format": "exl chat"']),
        (b'{"format": "other"}', ["other", "exl chat"]),
        (b'{"format": "exl chat", "version": 9}', ["9", "version 1"]),
        (b'{"format": "exl chat", "version": 1, "messages": {}}', ["a list of messages"]),
        (b'{"format": "exl chat", "version": 1, "messages": [{"role": "user"}]}', ["a role and a content"]),
        (b'{"format": "exl chat", "version": 1, "messages": [7]}', ["7", "a role and a content"]),
        (b'{"format": "exl chat", "version": 1, "system": 7, "messages": []}', ["7", "system"]),
    ],
)
def test_a_damaged_file_is_named(llm, tmp_path, content, words):
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(ExlError) as error:
        exl.Chat.load(llm, path)
    message = str(error.value)
    assert all(word in message for word in [str(path), *words])
    assert len(message.splitlines()) == 1
    assert len(message) < 300


def test_files_that_cannot_be_read_or_written(llm, tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        exl.Chat.load(llm, tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        llm.chat().save(tmp_path / "no" / "folder.json")


def test_repr(llm):
    chat = llm.chat()
    assert repr(chat) == "Chat(chatml, 0 messages, 0 tokens)"
