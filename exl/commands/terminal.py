"""A chat in a terminal, or in a pipe."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from exl.commands import common
from exl.commands.chat_input import QUOTES, is_open, join_quoted
from exl.commands.chat_session import FILE_COMMANDS, SETTINGS, ChatSession
from exl.commands.standard_streams import input_lines, write
from exl.commands.word_wrap import WordWrap, columns
from exl.user_cache import user_cache_folder

if TYPE_CHECKING:
    from exl.commands.chat_partner import AnyChat, Partner

HINT = (
    f"/? shows the commands; {QUOTES} begins and ends a message of several lines; Ctrl-C stops an answer; Ctrl-D leaves"
)


def is_terminal() -> bool:
    return common.is_terminal(sys.stdin) and common.is_terminal(sys.stdout)


def run_chat(
    partner: Partner, chat: AnyChat, settings: dict[str, Any], *notices: str | None, overflow: str = "drop-oldest"
) -> None:
    """Talks until the user leaves, in a terminal or a pipe.

    ``settings``: options of each request. ``notices``: what to say at the start. ``overflow``: of chats that /load
    makes.
    """
    terminal = is_terminal()
    say = say_dim if terminal else common.say
    show = WordWrap(write, columns).write if common.is_terminal(sys.stdout) else write
    session = ChatSession(partner, chat, show, say, settings, overflow, interactive=terminal)
    for line in (partner.describe(), chat.notice, *notices, HINT if terminal else None):
        if line is not None:
            say(line)
    if terminal:
        run_terminal(session)
    else:
        run_piped(session)


def run_piped(session: ChatSession) -> None:
    """Reads one message or command per line from standard input; writes answers to standard output."""
    for line in join_quoted(input_lines("messages, one on each line")):
        if not session.handle(line):
            return


def run_terminal(session: ChatSession) -> None:
    """Reads lines with history, line editing and completion until /bye or Ctrl-D. Ctrl-C clears the line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import FormattedText

    prompt = PromptSession(
        history=_history(),
        key_bindings=_keys(),
        multiline=True,
        completer=_completer(session),
        complete_while_typing=False,
    )
    while True:
        try:
            line = prompt.prompt(FormattedText([("bold", "> ")]), prompt_continuation="  ")
        except (KeyboardInterrupt, asyncio.CancelledError):  # the second just when the prompt's event loop begins
            continue
        except EOFError:
            return
        try:
            if not session.handle(line.strip()):
                return
        except KeyboardInterrupt:  # Ctrl-C was pressed twice, while a long prompt was computed
            session.say("stopped")


def _keys():
    """Enter sends, unless triple quotes are open; Alt-Enter, and Enter after a backslash, begin a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(session: ChatSession):
    """The Tab key: commands, then the names of settings or of files, as the command takes them."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    files = PathCompleter(expanduser=True)

    class LineCompleter(Completer):
        def get_completions(self, document, complete_event) -> Iterator[Completion]:
            text = document.text_before_cursor
            command, space, rest = text.partition(" ")
            if not text.startswith("/") or "\n" in text:
                return
            if not space:
                for name, explained in session.commands().items():
                    if name.startswith(text[1:]):
                        yield Completion(name, 1 - len(text), display_meta=explained)
            elif command == "/set" and " " not in rest:
                yield from (Completion(name + " ", -len(rest), name) for name in SETTINGS if name.startswith(rest))
            elif command[1:] in FILE_COMMANDS:
                yield from files.get_completions(Document(rest), complete_event)

    return LineCompleter()


def _history():
    """The input history: in the user's cache folder; in memory if that cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    folder = user_cache_folder("chat")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "history"
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def say_dim(line: str) -> None:
    """Prints a line that is not an answer, dimmed, in a terminal."""
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False).print(Text(line, style="dim"))
