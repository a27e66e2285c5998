"""The chat in a terminal: every command, Ctrl-C during an answer, a pipe, and wrong input."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from pexpect import EOF

import exl
from exl.commands.chat_partner import LocalModel
from exl.commands.chat_session import SETTINGS, ChatSession
from exl.commands.terminal import run_terminal
from exl.sampling_params import BIASES, FLAG, IDS, INTEGER, NUMBER, OPTIONS, TEXTS
from tests.command_line import run_exl, without_compiling

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llm():
    with exl.load() as llm:
        yield llm


@pytest.fixture
def session(llm):
    said, written = [], []
    session = ChatSession(LocalModel(llm), llm.chat(), written.append, said.append, {"max_tokens": 8})
    session.said, session.written = said, written
    return session


def test_a_message_and_its_answer(session):
    assert session.handle("Hello.")
    text = "".join(session.written)
    assert text.endswith("\n")
    assert text.strip() == session.chat.messages[-1]["content"]
    assert re.fullmatch(
        r"8 tokens, [\d.]+ tokens/s \| first after \d+ ms \| context \d+ of 512 \| memory [\d.]+ MB"
        r" \| cut off by max_tokens: /continue goes on",
        session.said[-1],
    )
    session.handle("/continue")
    assert "".join(session.written).replace("\n", "").strip() == session.chat.messages[-1]["content"]
    assert len(session.chat.messages) == 2


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
    shown = [line.split()[0] for line in session.said]
    names = ["reset", "undo", "retry", "continue", "save", "load", "system", "set", "stats", "help", "quit"]
    assert shown == [*(f"/{name}" for name in names), '"""']
    assert session.handle("/quit") is False


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/nothing", ["/nothing", "/help", '"""']),
        ("/nothing at all", ["/nothing", "/help"]),
        ("/", ["/:", "/help"]),
        ("/continue", ["continue", "no answer"]),
        ("/undo", ["undo", "no message"]),
        ("/retry", ["retry", "no message"]),
        ("/save", ["/save", "name of a file"]),
        ("/load nowhere.json", ["nowhere.json", "cannot be read"]),
        ("/set banana 3", ["banana", *SETTINGS]),
        ("/set temperature hot", ["temperature", "hot", "a number"]),
        ("/set top_k 1.5", ["top_k", "1.5", "a whole number"]),
        ("/set temperature -1", ["temperature", "-1"]),
        ("/set banned_tokens five", ["banned_tokens", "five", "token ids, such as"]),
        ("/set logit_bias 5", ["logit_bias", "5", "biases, such as"]),
        ("/set ignore_eos maybe", ["ignore_eos", "maybe", "on or off"]),
    ],
)
def test_what_goes_wrong_is_one_line(session, line, words):
    before = session.chat.messages, dict(session.settings)
    assert session.handle(line)
    assert len(session.said) == 1
    assert session.said[0].startswith("error: ")
    assert all(word in session.said[0] for word in words)
    assert (session.chat.messages, session.settings) == before


def test_other_names_of_commands(session):
    session.handle("Hello.")
    first = session.chat.messages
    session.handle("/set temperature 1.5")
    session.handle("/set seed 7")
    session.handle("/regen")
    assert session.chat.messages[0] == first[0]
    assert session.chat.messages != first
    session.handle("/clear")
    assert session.chat.messages == []
    session.handle("/?")
    assert any(line.startswith("/retry") and "/regen" in line for line in session.said)
    for name in ("/bye", "/exit", "/quit", "/quit now"):
        assert session.handle(name) is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/usr/share/dict has words.", "/usr/share/dict has words."),
        ("/etc/passwd", "/etc/passwd"),
        ("// is a comment", "// is a comment"),
        ('"""/help"""', "/help"),
        ('"""\nTwo\n\nlines.\n"""', "Two\n\nlines."),
    ],
)
def test_lines_that_are_messages(session, line, message):
    session.handle(line)
    assert session.chat.messages[0] == {"role": "user", "content": message}
    assert len(session.chat.messages) == 2


def test_every_option_can_be_set(session):
    written = {NUMBER: "0.5", INTEGER: "3", FLAG: "on", IDS: "7,5", BIASES: "5=-2,17=0.5", TEXTS: "the end"}
    meant = {NUMBER: 0.5, INTEGER: 3, FLAG: True, IDS: (7, 5), BIASES: {5: -2.0, 17: 0.5}, TEXTS: ("the end",)}
    values = {name: (written[option.kind], meant[option.kind]) for name, option in OPTIONS.items()}
    values |= {"dry_base": ("2", 2.0), "repetition_penalty": ("1.1", 1.1), "stop": ("the end", "the end")}
    assert values.keys() == set(SETTINGS)
    for name, (typed, value) in values.items():
        session.handle(f"/set {name} {typed}")
        assert session.settings[name] == value
        assert f"{name} {value}" in session.said[-1]
    session.handle("Hello.")
    assert session.last.num_tokens <= 3
    for name in values:
        session.handle(f"/set {name} none")
    assert session.settings == {}
    assert "typical_p" not in session.said[-1]
    assert "temperature none" in session.said[-1]


def test_a_stop_text(session):
    session.handle("/set max_tokens 60")
    session.handle("Hello.")
    whole = session.chat.messages[-1]["content"]
    word = whole.split()[3]
    session.handle(f"/set stop {word}")
    session.handle("/retry")
    assert session.chat.messages[-1]["content"] == whole[: whole.index(word)].strip()
    assert session.last.finish_reason == "stop"


def test_a_chat_of_another_model_says_so(session, tmp_path):
    path = tmp_path / "chat.json"
    session.handle("Hello.")
    session.handle(f"/save {path}")
    session.handle(f"/load {path}")
    assert session.said[-1] == f"2 messages from {path}"
    path.write_text(path.read_text().replace('"stories"', '"another-7b"'))
    session.handle(f"/load {path}")
    assert session.said[-1] == f"{path} was written with another-7b: stories goes on with its messages"
    told = run_exl("chat", "--load", path, "--max-tokens", "3", stdin="Why?\n").stderr
    assert "was written with another-7b" in told
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as some editors save it
    session.handle(f"/load {path}")
    assert session.said[-1] == f"{path} was written with another-7b: stories goes on with its messages"


def test_old_turns_are_dropped_and_that_is_said_once(llm):
    said = []
    chat = llm.chat(overflow="drop-oldest")
    session = ChatSession(LocalModel(llm), chat, lambda piece: None, said.append, {"max_tokens": 60})
    for i in range(12):
        session.handle(f"Tell me more about number {i} please.")
    assert chat.num_forgotten > 2
    assert len(chat.messages) == 24
    assert not any(line.startswith("error") for line in said)
    assert len([line for line in said if "context is full" in line]) == 1


def test_overflow_is_an_option():
    lines = "Tell me a long story about a dog and a cat.\n" * 9
    args = ["chat", "--context", "128", "--max-tokens", "40", "--temperature", "0"]
    dropping, refusing = run_exl(*args, stdin=lines), run_exl(*args, "--overflow", "error", stdin=lines)
    assert dropping.stderr.count("the context is full: the model is not shown the oldest") == 1
    assert "error" not in dropping.stderr
    assert "error: context: " in refusing.stderr
    wrong = run_exl("chat", "--overflow", "banana")
    assert (wrong.returncode, "overflow: found 'banana'" in wrong.stderr) == (1, True)


def test_the_model_is_named_at_the_start():
    told = run_exl("chat", "--context", "64").stderr.splitlines()[0]
    assert re.fullmatch(r"stories \| 4-bit llama \| cpu \| memory [\d.]+ MB \| context 64", told)


def test_ctrl_c_while_a_prompt_is_read(llm):
    """The conversation is as it was, the model is free for the next message."""
    said = []
    session = ChatSession(
        LocalModel(llm), llm.chat(), lambda piece: None, said.append, {"max_tokens": 8}, interactive=True
    )
    session.handle("Hello.")
    before, begin = session.chat.messages, session.chat.stream

    def interrupted(text, prompt_progress, **options):
        def report(progress):
            os.kill(os.getpid(), signal.SIGINT)
            prompt_progress(progress)

        return begin(text, prompt_progress=report, **options)

    session.chat.stream = interrupted
    session.handle("A long message.")
    assert said[-1].startswith("stopped | context")
    assert session.chat.messages == before
    session.chat.stream = begin
    session.handle("Another.")
    assert len(session.chat.messages) == 4
    piped = ChatSession(LocalModel(llm), llm.chat(), lambda piece: os.kill(os.getpid(), signal.SIGINT), said.append, {})
    with pytest.raises(KeyboardInterrupt):
        piped.handle("Hello.")


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, asyncio.CancelledError])
def test_ctrl_c_at_the_prompt_is_no_end(session, monkeypatch, interrupt):
    """prompt_toolkit raises either, by whether its event loop has just begun."""
    prompt_toolkit = pytest.importorskip("prompt_toolkit")
    lines = iter([interrupt(), "/help", EOFError()])

    class Prompt:
        def __init__(self, **options):
            pass

        def prompt(self, *args, **options):
            line = next(lines)
            if isinstance(line, BaseException):
                raise line
            return line

    monkeypatch.setattr(prompt_toolkit, "PromptSession", Prompt)
    handled = []
    monkeypatch.setattr(session, "handle", lambda line: handled.append(line) or True)
    run_terminal(session)
    assert handled == ["/help"]


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


def test_a_message_of_several_lines_in_a_pipe():
    done = run_exl("chat", "--max-tokens", "4", stdin='"""One\n/two\nthree."""\nWhy?\n')
    assert done.returncode == 0
    assert done.stdout.count("\n") == 2
    unfinished = run_exl("chat", stdin='"""One\ntwo\n')
    assert unfinished.returncode == 1
    assert 'found """ without an end' in unfinished.stderr


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


def test_triple_quotes_in_a_terminal(terminal, tmp_path):
    terminal.send('"""One\r/two\rthree."""\r')
    terminal.expect(STATUS)
    path = tmp_path / "three.json"
    terminal.send(f"/save {path}\r")
    terminal.expect("messages written")
    assert "One\\n/two\\nthree." in path.read_text()


def test_the_tab_key_completes(terminal, tmp_path):
    (tmp_path / "saved-conversation.json").write_text("x")
    for typed, completed, rest, answer in (
        ("/und\t", "/und.*?o", "", "undo: found no message"),
        ("/set repe\t", "tition_penalty", "1.5", "repetition_penalty 1.5"),
        (f"/load {tmp_path}/saved-c\t", "onversation.json", "", "json:.*?not.*?a.*?saved.*?chat"),
    ):
        terminal.send(typed)
        terminal.expect(completed)  # the completion comes from a task of its own: Enter would be quicker
        terminal.send(rest + "\r")
        terminal.expect(answer)
        terminal.expect(PROMPT)


def test_answers_are_wrapped_at_the_present_width(terminal, tmp_path):
    terminal.send("/set max_tokens 60\r")
    terminal.expect("max_tokens 60")
    for width in (60, 44):
        terminal.setwinsize(40, width)
        terminal.send("Tell me a story.\r")
        terminal.expect("goes on")  # the end of the status line
        answer = terminal.before.rpartition("\x1b[?2004l")[2].partition("\x1b")[0]
        lines = answer.strip().split("\r\n")
        path = tmp_path / f"{width}.json"
        terminal.send(f"/save {path}\r")
        terminal.expect("written")
        said = json.loads(path.read_text())["messages"][-1]["content"]
        shown = [played(line) for line in lines]
        assert "".join(" ".join(shown).split()) == "".join(said.split())
        assert width - 16 < max(map(len, shown)) < width
        assert all(len(line) < width for line in shown)


def played(line: str) -> str:
    """What stands on a terminal's line after backspaces and returns to its beginning."""
    cells = []
    at = 0
    for character in line:
        if character in "\b\r":
            at = at - 1 if character == "\b" else 0
        else:
            cells[at:] = [character, *cells[at + 1 :]]
            at += 1
    return "".join(cells).rstrip()


def test_generate_shows_the_prompt_dim_in_a_terminal():
    child = pexpect.spawn(
        sys.executable,
        ["-m", "exl.cli", "generate", "Once upon a time", "--max-tokens", "30", "--temperature", "0"],
        env={**os.environ, "TERM": "xterm"},
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 40),
    )
    child.expect(EOF)
    child.close()
    assert child.exitstatus == 0
    before, rest = without_compiling(child.before).split("\x1b[22m")
    # What a slow load has shown is erased, what a slow prompt has shown is overwritten.
    assert played(before.rpartition("\x1b[2K")[2]) == "\x1b[2mOnce upon a time"
    piped = run_exl("generate", "Once upon a time", "--max-tokens", "30", "--temperature", "0").stdout
    *lines, status = ("Once upon a time" + rest).strip().split("\r\n")
    assert "30 tokens" in status
    assert "".join("".join(map(played, lines)).split()) == "".join(("Once upon a time" + piped).split())
    assert all(len(played(line)) < 40 for line in lines)
