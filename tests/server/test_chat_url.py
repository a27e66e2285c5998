"""``exl chat --url``: the terminal's chat with a running server."""

from __future__ import annotations

import os
import re
import sys

import pytest

from tests.command_line import run_exl
from tests.server.scripted import ScriptedServer, models, refusal, stream
from tests.slow_tokens import slow_tokens

pexpect = pytest.importorskip("pexpect")
STATUS = r"20 tokens, [\d.]+ tokens/s \| first after \d+ ms \| context (\d+) of 512 \| cut off by max_tokens"


@pytest.fixture
def slow(monkeypatch):
    """Tokens take their time, so that an answer can be stopped."""
    slow_tokens(monkeypatch, 0.03)


def test_in_a_pipe(running, tmp_path):
    path = tmp_path / "chat.json"
    lines = f"Tell me about a dog.\n/continue\n/undo\nHello.\n/save {path}\n/stats\n/quit\n"
    done = run_exl("chat", "--url", running.url, "--max-tokens", 20, "--temperature", 0, stdin=lines)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert said[0] == f"stories | {running.url} | context 512"
    assert [bool(re.match(STATUS, line)) for line in said[1:3]] == [True, True]
    assert said[3] == "removed: Tell me about a dog."
    assert said[5] == f"2 messages written to {path}"
    assert said[-1] == f"stories at {running.url}"
    alone = running.llm.chat().send("Tell me about a dog.", 20, temperature=0)
    assert done.stdout.split()[: len(alone.text.split()) - 1] == alone.text.split()[:-1]
    again = run_exl("chat", "stories", "--url", running.url, "--load", path, "--max-tokens", 5, stdin="And then?\n")
    assert again.returncode == 0, again.stderr


def test_in_a_terminal(running, slow, tmp_path):
    child = pexpect.spawn(
        sys.executable,
        ["-m", "exl.cli", "chat", "--url", running.url, "--max-tokens", "300", "--temperature", "0"],
        env={**os.environ, "TERM": "xterm", "XDG_CACHE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"},
        encoding="utf-8",
        timeout=30,
        dimensions=(40, 200),
    )
    try:
        child.expect(f"stories \\| {re.escape(running.url)} \\| context 512")
        child.expect("Ctrl-D leaves")
        child.expect("1m>")  # bold
        child.send("Tell me about a dog.\r")
        child.expect("scared")
        child.sendintr()
        child.expect(r"stopped \| context 512")
        child.expect("1m>")  # bold
        child.send("/set max_tokens 20\r")
        child.expect("max_tokens 20")
        child.send("/continue\r")
        child.expect(STATUS.partition(" of 512")[0])
        child.expect("1m>")  # bold
        child.send("/bye\r")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
    finally:
        child.close(force=True)


def test_a_server_that_loads_is_waited_for_and_its_key_is_read(tmp_path):
    keys = tmp_path / "key"
    keys.write_text("\nsecret \nother\n")
    with ScriptedServer() as server:
        server.models = [models({"id": "m", "status": {"value": "loading", "progress": 0.2}})] * 2
        server.script = [stream({"content": "Hello."}), refusal(429, "the queue is full")]
        done = run_exl("chat", "--url", server.url, "--api-key-file", keys, stdin="Hi\nAnd?\n")
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert done.returncode == 0
    assert done.stdout == "Hello.\n"
    assert done.stderr.count("exl: the server is loading m: 20%") == 1
    assert "error: the queue is full" in done.stderr


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--url", "http://127.0.0.1:9", "--ram", "4GB"), "--ram: found it with --url"),
        (("--url", "http://127.0.0.1:9", "--kv-cache", "q8"), "--kv-cache: found it with --url"),
        (("--url", "nowhere"), "--url: found 'nowhere', expected an address such as http://127.0.0.1:8000"),
        (("--url", "http://127.0.0.1:9"), "http://127.0.0.1:9: connection refused: is a server running there?"),
        (("--url", "http://127.0.0.1:9", "--api-key-file", "/nowhere/key"), "--api-key-file: /nowhere/key"),
        (("--api-key-file", "/nowhere/key"), "--api-key-file: goes along with --url"),
    ],
)
def test_what_does_not_go_together_is_refused(args, expected):
    done = run_exl("chat", *args)
    assert done.returncode == 1
    assert done.stderr.startswith(f"exl: error: {expected}")
    assert done.stderr.count("\n") == 1


def test_an_empty_key_file_is_refused(tmp_path):
    (tmp_path / "key").write_text("\n \n")
    done = run_exl("chat", "--url", "http://127.0.0.1:9", "--api-key-file", tmp_path / "key")
    assert "found no key, expected one in its first line" in done.stderr
