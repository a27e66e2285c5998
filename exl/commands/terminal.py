"""A chat in a terminal, or in a pipe."""

from __future__ import annotations

import sys

from exl.commands.chat_session import ChatSession
from exl.user_cache import user_cache_folder
from exl.user_text import decoded_lines


def is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def run_piped(session: ChatSession) -> None:
    """Reads one message or command per line from standard input; writes answers to standard output."""
    for line in decoded_lines(sys.stdin.buffer, "standard input"):
        if not session.handle(line):
            return


def run_terminal(session: ChatSession) -> None:
    """Reads lines with history and line editing until /quit or Ctrl-D. Ctrl-C clears the line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import FormattedText

    prompt = PromptSession(history=_history(), key_bindings=_keys(), multiline=True)
    while True:
        try:
            line = prompt.prompt(FormattedText([("bold", "> ")]), prompt_continuation="  ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        try:
            if not session.handle(line.strip()):
                return
        except KeyboardInterrupt:  # Ctrl-C was pressed twice, while a long prompt was computed
            session.say("stopped")


def _keys():
    """Enter sends; Alt-Enter, and Enter after a backslash, begin a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event) -> None:
        event.current_buffer.insert_text("\n")

    return keys


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


def write(text: str) -> None:
    """Writes a piece of an answer to standard output, unbuffered."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say_dim(line: str) -> None:
    """Prints a line that is not an answer, dimmed, in a terminal."""
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False).print(Text(line, style="dim"), soft_wrap=True)


def say_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
