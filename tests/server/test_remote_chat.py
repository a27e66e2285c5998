"""Conversations over HTTP, held against the same conversations with the model itself; and servers that fail."""

from __future__ import annotations

import queue
import socket
import time

import pytest

from exl.chat import Chat
from exl.errors import ConfigError
from exl.http_client import HttpClient, ServerError
from exl.remote_chat import RemoteModel
from tests.server.scripted import ScriptedServer, models, raw, refusal, stream
from tests.slow_tokens import slow_tokens

DOG = "Tell me about a dog."
GREEDY = {"temperature": 0.0, "max_tokens": 20}


@pytest.fixture(scope="module")
def remote(running):
    return RemoteModel.connect(running.url)


@pytest.fixture
def scripted():
    with ScriptedServer() as server:
        yield server


def connected(server):
    return RemoteModel.connect(server.url)


def text_of(stream) -> str:
    return "".join(stream)


def test_a_conversation_is_the_models_own(running, remote):
    chat, alone = remote.chat("A story."), running.llm.chat("A story.")
    for ask, ask_alone in (
        (lambda: chat.stream(DOG, **GREEDY), lambda: alone.send(DOG, **GREEDY)),
        (lambda: chat.stream_continue(**GREEDY), lambda: alone.continue_answer(**GREEDY)),
        (lambda: chat.stream_retry(**GREEDY), lambda: alone.retry(**GREEDY)),
    ):
        answer = ask()
        text, expected = text_of(answer), ask_alone()
        assert text.split() == expected.text.split()
        done = answer.completion
        assert (done.num_tokens, done.limit, done.finish_reason) == (20, "max_tokens", "length")
        assert done.num_prompt_tokens == expected.num_prompt_tokens
        assert done.tokens_per_second > 0
        assert chat.messages == alone.messages
        assert chat.num_tokens == done.num_prompt_tokens + 20
    assert chat.undo() == alone.undo() == DOG
    assert chat.messages == []
    assert chat.num_tokens is None


def test_the_model_is_described(running, remote):
    assert (remote.name, remote.context, remote.url) == ("stories", 512, running.url)


@pytest.mark.parametrize("suffix", ["/", "/v1", "/v1/"])
def test_addresses_as_people_write_them(running, suffix):
    assert RemoteModel.connect(running.url + suffix).url == running.url


def test_saved_conversations_are_interchangeable(running, remote, tmp_path):
    chat = remote.chat("Be kind.")
    text_of(chat.stream(DOG, **GREEDY))
    chat.save(tmp_path / "remote.json")
    loaded = Chat.load(running.llm, tmp_path / "remote.json")
    assert (loaded.system, loaded.messages, loaded.written_with) == ("Be kind.", chat.messages, "stories")
    loaded.send("And then?", **GREEDY)
    loaded.save(tmp_path / "local.json")
    back = remote.load_chat(tmp_path / "local.json")
    assert (back.system, back.messages) == ("Be kind.", loaded.messages)
    text_of(back.stream("Why?", **GREEDY))
    assert len(back.messages) == 6


def test_an_answer_that_is_closed_is_kept_and_frees_the_server(running, remote, monkeypatch):
    slow_tokens(monkeypatch, 0.05)
    chat = remote.chat()
    with chat.stream(DOG, temperature=0.0, max_tokens=400) as answer:
        begun = next(answer) + next(answer)
    assert list(answer) == []
    assert [message["content"] for message in chat.messages] == [DOG, begun.strip()]
    until = time.monotonic() + 5  # all of it would take 20 seconds
    while running.llm.stats().running:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_close_before_the_first_piece_leaves_everything_as_it_was(remote):
    chat = remote.chat()
    chat.stream(DOG, **GREEDY).close()
    assert chat.messages == []


def test_the_oldest_turns_are_left_out_when_the_context_is_full(remote):
    chat = remote.chat(overflow="drop-oldest")
    for i in range(4):
        chat.add("user", f"{i} " + "The cat and the dog. " * 22)
        chat.add("assistant", "Yes.")
    answer = chat.stream("Why?", **GREEDY)
    assert text_of(answer)
    assert chat.num_forgotten > 0
    assert chat.messages[chat.num_forgotten]["role"] == "user"
    assert len(chat.messages) == 10  # all are kept
    assert answer.completion.num_prompt_tokens < 512
    full = remote.chat(messages=chat.messages)
    with pytest.raises(ServerError, match="the context holds 512"):
        text_of(full.stream("Why?", **GREEDY))
    assert len(full.messages) == 10


def test_room_is_made_before_answers_become_short(scripted):
    scripted.script = [
        stream({"content": "one"}, usage={"prompt_tokens": 70, "completion_tokens": 10}),
        stream({"content": "two"}),
    ]
    chat = connected(scripted).chat(overflow="drop-oldest")
    text_of(chat.stream("first", max_tokens=9))
    text_of(chat.stream("second"))
    assert [message["content"] for message in scripted.asked[1]["messages"]] == ["second"]
    assert scripted.asked[1]["max_tokens"] == 10  # half of what is left


def test_thoughts_stand_between_tags_and_are_not_sent_back(scripted):
    usage = {"prompt_tokens": 9, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}
    scripted.script = [
        stream(
            {"role": "assistant"},
            {"reasoning_content": "I "},
            {"reasoning_content": "think."},
            {"content": "Yes."},
            usage=usage,
        ),
        stream({"content": "No."}),
    ]
    chat = connected(scripted).chat("Be brief.")
    answer = chat.stream("Is it?", seed=3, stop=["x"])
    assert text_of(answer) == "<think>\nI think.\n</think>\n\nYes."
    assert answer.completion.num_reused_tokens == 4
    assert scripted.asked[0]["seed"] == 3
    assert scripted.asked[0]["stop"] == ["x"]
    text_of(chat.stream("And now?"))
    assert scripted.asked[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And now?"},
    ]


def test_a_model_that_loads_is_waited_for(scripted):
    loading = {"id": "scripted", "status": {"value": "loading", "progress": 0.45}}
    scripted.models = [models(loading)]
    said: list[str] = []
    remote = RemoteModel.connect(scripted.url, wait=said.append)
    assert said == ["the server is loading scripted: 45%"]
    scripted.script = [
        refusal(503, "model: 'scripted' is loading, 50% of it", "model_loading", Retry_After="0"),
        stream({"content": "Here."}),
    ]
    said.clear()
    assert text_of(remote.chat().stream("Hello", on_wait=said.append)) == "Here."
    assert "model: 'scripted' is loading, 50% of it" in said


def test_a_stop_while_a_model_loads_is_no_error(scripted):
    scripted.script = [refusal(503, "model: 'scripted' is loading", "model_loading", Retry_After="60")]
    chat = connected(scripted).chat()

    def stop(text):
        if "loading" in text:
            answer.close()

    answer = chat.stream("Hello", on_wait=stop)
    assert list(answer) == []
    assert chat.messages == []
    assert len(scripted.asked) == 1


def test_whoever_waits_can_end_it(scripted):
    def silent(handler):
        handler.reply(200, b": ping\n\n", "text/event-stream")
        handler.rfile.read(1)  # until the client has left

    scripted.script = [silent]

    def enough(text):
        raise KeyboardInterrupt

    chat = connected(scripted).chat()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(chat.stream("Hello", on_wait=enough))
    assert time.monotonic() - began < 5
    assert chat.messages == []


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("", "the server ended the stream too early"),
        ('data: {"error": {"message": "no memory", "code": "out_of_memory"}}\n\n', "no memory"),
        ("data: {broken\n\n", "expected JSON"),
        ("data: []\n\n", "expected an object"),
    ],
)
def test_what_came_of_a_broken_answer_is_kept(scripted, end, expected):
    scripted.script = [stream({"content": "One "}, {"content": "day"}, end=end), stream({"content": " more."})]
    chat = connected(scripted).chat()
    with pytest.raises(ServerError, match=f"{expected}.*; what came of the answer is kept"):
        text_of(chat.stream("Hello"))
    assert chat.messages[-1] == {"role": "assistant", "content": "One day"}
    assert text_of(chat.stream_continue()) == " more."
    assert chat.messages[-1]["content"] == "One day more."
    assert scripted.asked[1]["continue_final_message"] is True
    assert scripted.asked[1]["messages"][-1] == {"role": "assistant", "content": "One day"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (refusal(429, "the queue is full", "queue_full"), "the queue is full"),
        (refusal(401, "no"), "the server asks for an API key: --api-key-file"),
        (raw(b"<html>", 502), "the server answers with status 502"),
        (raw(b'{"error": "as TGI tells it"}', 422), "as TGI tells it"),
        (raw(b"", 200), "the server ended the stream too early"),
    ],
)
def test_a_refusal_is_told_and_changes_nothing(scripted, answer, expected):
    scripted.script = [answer]
    chat = connected(scripted).chat()
    with pytest.raises(ServerError, match=expected) as error:
        text_of(chat.stream("Hello"))
    assert "is kept" not in str(error.value)
    assert chat.messages == []


def test_the_key_is_sent(scripted):
    remote = RemoteModel.connect(scripted.url, "secret")
    scripted.script = [stream({"content": "Yes."}), refusal(401, "no")]
    text_of(remote.chat().stream("Hello"))
    assert {headers["Authorization"] for headers in scripted.headers} == {"Bearer secret"}
    with pytest.raises(ServerError, match="the server does not take this API key"):
        text_of(remote.chat().stream("Hello"))


@pytest.mark.parametrize(
    ("answer", "error", "expected"),
    [
        (raw(b"<html>hello"), ServerError, "found no JSON, expected a server of OpenAI's protocol"),
        (raw(b"[]"), ServerError, "found no models"),
        (models(), ServerError, "found no models"),
        (models({"id": 3}), ServerError, "found no models"),
        (models({"id": "a"}, {"id": "b"}), ConfigError, "--model: found 'c', the server at .* has 'a', 'b'"),
    ],
)
def test_servers_that_are_none(scripted, answer, error, expected):
    scripted.models = [answer]
    with pytest.raises(error, match=expected):
        RemoteModel.connect(scripted.url, name="c")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://a:b@host",
        "http://host/?x=1",
        "http://[::1",
        "http://two..dots",
        "http://host/\u00e9",
    ],
)
def test_addresses_that_are_none(url):
    with pytest.raises(ConfigError, match=r"--url: found .*, expected an address such as http://127\.0\.0\.1:8000"):
        HttpClient(url)


def test_a_key_that_no_header_can_carry():
    with pytest.raises(ConfigError, match="printable ASCII"):
        HttpClient("http://host", "a\r\nX: b")


def test_nobody_listens_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ServerError, match=f"http://127.0.0.1:{port}: connection refused"):
        RemoteModel.connect(f"http://127.0.0.1:{port}")


def test_something_else_listens_there():
    with socket.create_server(("127.0.0.1", 0)) as other:
        reader = HttpClient(f"http://127.0.0.1:{other.getsockname()[1]}").post_events("/v1/chat/completions", {})
        with pytest.raises(queue.Empty):
            reader.next(0.01)
        connection, _ = other.accept()
        connection.sendall(b"SSH-2.0-x\r\n")
        connection.close()
        with pytest.raises(ServerError, match="the connection failed"):
            reader.next(10)


def test_options_that_a_server_does_not_take_are_refused(remote):
    with pytest.raises(ConfigError, match="prompt_progress: a server's chat does not take it"):
        remote.chat().stream(DOG, prompt_progress=print)
    with pytest.raises(ServerError, match="temperature"):
        text_of(remote.chat().stream(DOG, temperature=-1.0))
