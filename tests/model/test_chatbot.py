"""The chat in a terminal: every command, Ctrl-C during an answer, a pipe, and wrong input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from pexpect import EOF

import exl
from exl.commands.chat_session import SETTINGS, ChatSession
from tests.command_line import run_exl

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llm():
    with exl.load() as llm:
        yield llm


@pytest.fixture
def session(llm):
    said, written = [], []
    session = ChatSession(llm, llm.chat(), written.append, said.append, {"max_tokens": 8})
    session.said, session.written = said, written
    return session


def test_a_message_and_its_answer(session):
    assert session.handle("Hello.")
    text = "".join(session.written)
    assert text.endswith("\n")
    assert text.strip() == session.chat.messages[-1]["content"]
    assert re.fullmatch(
        r"\d+ tokens, [\d.]+ tokens/s \| first after \d+ ms \| context \d+ of 512 \| memory [\d.]+ MB", session.said[-1]
    )


def test_commands(session, tmp_path):
    path = tmp_path / "chat.json"
    session.handle("/system Be kind.")
    assert session.said[-1] == "system prompt: Be kind."
    session.handle("Hello.")
    first = session.chat.messages
    session.handle("Why?")
    session.handle("/undo")
    assert session.said[-1] == "removed: Why?"
    assert session.chat.messages == first
    session.handle("/set temperature 1.5")
    session.handle("/set seed 7")
    assert "temperature 1.5" in session.said[-1]
    session.handle("/retry")
    assert session.chat.messages[0] == first[0]
    assert session.chat.messages != first
    session.handle("/set temperature none")
    assert session.settings == {"max_tokens": 8, "seed": 7}
    session.handle(f"/save {path}")
    session.handle("/reset")
    assert session.chat.messages == []
    assert session.chat.system == "Be kind."
    session.handle(f"/load {path}")
    assert len(session.chat.messages) == 2
    session.said.clear()
    session.handle("/stats")
    assert any("KV cache" in line for line in session.said)
    session.said.clear()
    session.handle("/help")
    shown = {line.split()[0] for line in session.said} - {'"""'}
    assert shown == {
        f"/{name}" for name in ["reset", "undo", "retry", "save", "load", "system", "set", "stats", "help", "quit"]
    }
    assert session.handle("/quit") is False


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/nothing", ["/nothing", "/help"]),
        ("/undo", ["undo", "no message"]),
        ("/retry", ["retry", "no message"]),
        ("/save", ["/save", "name of a file"]),
        ("/load nowhere.json", ["nowhere.json", "cannot be read"]),
        ("/set banana 3", ["banana", *SETTINGS]),
        ("/set temperature hot", ["temperature", "hot", "a number"]),
        ("/set top_k 1.5", ["top_k", "1.5", "a whole number"]),
        ("/set temperature -1", ["temperature", "-1"]),
    ],
)
def test_what_goes_wrong_is_one_line(session, line, words):
    before = session.chat.messages, dict(session.settings)
    assert session.handle(line)
    assert len(session.said) == 1
    assert session.said[0].startswith("error: ")
    assert all(word in session.said[0] for word in words)
    assert (session.chat.messages, session.settings) == before


def test_an_empty_line_is_nothing(session):
    assert session.handle("   ")
    assert session.said == session.written == session.chat.messages == []


@pytest.mark.parametrize("command", [["-m", "exl.cli", "chat"], [str(ROOT / "examples" / "chatbot.py")]])
def test_in_a_pipe(command):
    """Standard output has only the answers, one line each; commands work."""
    lines = "Hello.\n\n/set max_tokens 5\nWhy?\n/quit\nnot read\n"
    done = subprocess.run(
        [sys.executable, *command, "--max-tokens", "6"], input=lines, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    with exl.load() as llm:
        chat = llm.chat()
        expected = [chat.send("Hello.", 6).text, chat.send("Why?", 5).text]
    assert done.stdout == "".join(f"{text}\n" for text in expected)
    assert "no chat template" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--load", "nowhere.json"], ["nowhere.json", "cannot be read"]),
        (["--ram", "banana"], ["ram", "banana"]),
        (["--model", "nobody/nothing-here"], ["nobody/nothing-here"]),
    ],
)
def test_bad_options_are_one_line(args, words):
    done = run_exl("chat", *args)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)


# ---- in a pseudo-terminal -------------------------------------------------------------------------------------------


PROMPT = r"1m>"  # bold


@pytest.fixture
def terminal(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(
        sys.executable,
        ["-m", "exl.cli", "chat", "--max-tokens", "12"],
        env=environment,
        encoding="utf-8",
        timeout=30,
        dimensions=(40, 200),
    )
    child.expect("Ctrl-D leaves")
    child.expect(PROMPT)
    yield child
    child.close(force=True)


STATUS = r"tokens/s \| first after \d+ ms \| context (\d+) of 512"


def test_every_command_in_a_terminal(terminal, tmp_path):
    path = tmp_path / "saved.json"
    for line, answer in (
        ("Hello.", STATUS),
        ("/set temperature 0.7", "temperature 0.7"),
        ("/retry", STATUS),
        ("/stats", "KV cache"),
        ("/system Be kind.", "system prompt: Be kind."),
        (f"/save {path}", "2 messages written"),
        ("/undo", "removed: Hello."),
        ("/reset", "all messages removed"),
        (f"/load {path}", "2 messages from"),
        ("/help", "/quit +leave"),
        ("/nothing", "no such command"),
    ):
        terminal.send(line + "\r")
        terminal.expect(answer)
        terminal.expect(PROMPT)
    terminal.send("/quit\r")
    terminal.expect(EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert "Hello." in (tmp_path / "exl" / "chat" / "history").read_text()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal):
    terminal.send("/set max_tokens 490\r")
    terminal.expect("max_tokens 490")
    terminal.expect(PROMPT)
    for _ in range(5):  # an answer takes one second; on a busy machine it may end before the key is pressed
        terminal.send("Tell me a story.\r")
        # The answer has begun. The line itself is drawn more than once, in fewer words: a Ctrl-C that comes while the
        # terminal still belongs to the prompt is lost.
        terminal.expect("(?:[a-z]+[,.]? ){5}")
        terminal.sendintr()
        if terminal.expect([r"stopped \| context (\d+) of 512", STATUS]) == 0:
            break
        terminal.send("/reset\r")
        terminal.expect("forgotten")
    assert int(terminal.match[1]) < 500
    terminal.send("/set max_tokens 3\r")
    terminal.expect("max_tokens 3")
    terminal.send("Hello.\r")
    terminal.expect(STATUS)
    terminal.sendintr()  # at the prompt: only the line is cleared
    terminal.send("/stats\r")
    terminal.expect("KV cache")
    terminal.expect(PROMPT)
    terminal.sendeof()
    terminal.expect(EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_a_message_of_two_lines(terminal, tmp_path):
    terminal.send("One\\\r")
    terminal.send("two.\r")
    terminal.expect(STATUS)
    path = tmp_path / "two.json"
    terminal.send(f"/save {path}\r")
    terminal.expect("messages written")
    assert "One\\ntwo." in path.read_text()
