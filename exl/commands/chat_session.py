"""Handles the lines that a user types in a chat. Independent of the terminal, so that anything can provide them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from exl.commands.chat_input import QUOTES, parse_command, unquoted
from exl.commands.chat_partner import AnyChat, AnyCompletion, AnyStream, Partner
from exl.commands.prompt_status import PromptStatus
from exl.commands.standard_streams import OutputError, ReaderGone
from exl.errors import ConfigError, ExlError
from exl.sampling_params import OPTIONS, SamplingParams

SETTINGS = (*OPTIONS, "stop")
_ALWAYS_SHOWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens", "stop")
ALIASES = {"bye": "quit", "exit": "quit", "clear": "reset", "regen": "retry", "?": "help"}
FILE_COMMANDS = ("save", "load")  # what follows is the name of a file


@dataclass
class ChatSession:
    """A chat with commands. ``write`` gets answers piece by piece; ``say`` gets everything else, line by line."""

    partner: Partner
    chat: AnyChat
    write: Callable[[str], None]
    say: Callable[[str], None]
    settings: dict[str, Any] = field(default_factory=dict)  # keys: those of SETTINGS
    overflow: str = "error"  # of chats that /load makes
    interactive: bool = False  # whether Ctrl-C stops only the answer, and a long prompt shows how far it has come
    last: AnyCompletion | None = None
    told_forgotten: bool = False  # that the model is not shown all messages

    def handle(self, line: str) -> bool:
        """Handles a message or a command. Returns False if the user wants to leave. Reports errors and continues.

        A message may stand between triple quotes, and then may begin with a slash.
        """
        try:
            message = unquoted(line)
            command = None if message is not None else parse_command(line)
            if command is None:
                text = line if message is None else message
                if text.strip():
                    self._answer(lambda options: self.chat.stream(text, **options))
                return True
            name, rest = command
            name = ALIASES.get(name, name)
            if name == "quit":
                return False
            known = self._commands().get(name)
            if known is None:
                raise ConfigError(
                    f"/{name}: no such command: /help shows them; a message that begins with / goes between {QUOTES}"
                )
            known[1](rest)
        except (OutputError, ReaderGone):  # nobody can be told
            raise
        except ExlError as error:
            self.say(f"error: {str(error).splitlines()[0]}")
        return True

    def commands(self) -> dict[str, str]:
        """Names of commands, without the slash, and what each does."""
        texts = {name: text for name, (text, _) in self._commands().items()}
        return texts | {alias: f"as /{name}" for alias, name in ALIASES.items()}

    def status(self) -> str:
        """Speed of the last answer, context and memory, on one line."""
        parts = []
        if self.last is not None:
            done = self.last
            parts.append(f"{done.num_tokens} tokens, {done.tokens_per_second:.1f} tokens/s")
            parts.append(f"first after {done.prompt_seconds * 1e3:.0f} ms")
        parts += [*shown_context(self.chat.num_tokens, self.partner.context), *self.partner.memory()]
        if self.last is not None and self.last.limit == "max_tokens":
            parts.append("cut off by max_tokens: /continue goes on")
        return " | ".join(parts)

    def _commands(self) -> dict[str, tuple[str, Callable[[str], None]]]:
        return {
            "reset": ("remove all messages", lambda rest: self._reset()),
            "undo": ("remove your last message and its answer", lambda rest: self._undo()),
            "retry": ("another answer to your last message", lambda rest: self._retry()),
            "continue": ("go on with an answer that was cut off", lambda rest: self._continue()),
            "save": ("FILE: write the conversation", self._save),
            "load": ("FILE: continue a saved conversation", self._load),
            "system": ("[TEXT]: show or change the system prompt", self._set_system),
            "set": ("[NAME VALUE]: show or change a setting; none: the model's own", self._set),
            "stats": ("speed, context, memory", lambda rest: self._stats()),
            "help": ("this list", lambda rest: self._help()),
            "quit": ("leave, as Ctrl-D does", lambda rest: None),
        }

    def _answer(self, begin: Callable[[dict[str, Any]], AnyStream]) -> None:
        self.last = None
        with _interrupts(self.interactive) as interrupted:

            def check() -> None:
                if interrupted():
                    raise _Stopped

            with PromptStatus(check) as status:
                options = self.settings | (self.partner.watched(status) if self.interactive else {})
                try:
                    with closing(begin(options)) as stream:
                        for piece in stream:
                            status.clear()
                            self.write(piece)
                            if interrupted():
                                break
                        else:
                            self.last = stream.completion
                except _Stopped:  # before the first piece: the conversation is as it was
                    pass
        self.write("\n")
        self.say(("stopped | " if self.last is None else "") + self.status())
        self._say_what_was_forgotten()

    def _say_what_was_forgotten(self) -> None:
        if self.chat.num_forgotten and not self.told_forgotten:
            self.told_forgotten = True
            self.say(
                f"the context is full: the model is not shown the oldest {self.chat.num_forgotten} messages any more, "
                "and further ones as the conversation goes on; /save still writes all"
            )

    def _reset(self) -> None:
        self.chat.reset()
        self.told_forgotten = False
        self.say("all messages removed")

    def _undo(self) -> None:
        self.say(f"removed: {self.chat.undo()}")

    def _retry(self) -> None:
        self._answer(lambda options: self.chat.stream_retry(**options))

    def _continue(self) -> None:
        self._answer(lambda options: self.chat.stream_continue(**options))

    def _save(self, path: str) -> None:
        self.chat.save(_file_name(_wanted("save", path)))
        self.say(f"{len(self.chat.messages)} messages written to {path}")

    def _load(self, path: str) -> None:
        path = _file_name(_wanted("load", path))
        self.chat = self.partner.load_chat(path, self.overflow)
        self.told_forgotten = False
        self.say(f"{len(self.chat.messages)} messages from {path}")
        self._say_if(other_model(self.chat, path, self.partner))

    def _say_if(self, line: str | None) -> None:
        if line is not None:
            self.say(line)

    def _set_system(self, text: str) -> None:
        if text:
            self.chat.system = text
        self.say(f"system prompt: {self.chat.system or 'none'}")

    def _set(self, rest: str) -> None:
        if rest:
            name, _, text = rest.partition(" ")
            if name not in SETTINGS:
                raise ConfigError(f"/set: found {name!r}, expected one of {', '.join(SETTINGS)}")
            settings = {key: value for key, value in self.settings.items() if key != name}
            if text.strip() != "none":
                settings[name] = _parsed(name, text.strip())
            SamplingParams(**{"max_tokens": 1, "temperature": 0.0, **settings})  # raises for an invalid value
            self.settings = settings
        shown = [name for name in SETTINGS if name in _ALWAYS_SHOWN or name in self.settings]
        self.say(", ".join(f"{name} {self.settings.get(name, 'none')}" for name in shown))

    def _stats(self) -> None:
        self.say(self.status())
        for line in self.partner.facts():
            self.say(line)

    def _help(self) -> None:
        for name, (text, _) in self._commands().items():
            others = [f"/{alias}" for alias, meant in ALIASES.items() if meant == name]
            self.say(f"/{name:<9} {text}" + (f" ({', '.join(others)})" if others else ""))
        self.say(f"{QUOTES:<10} begins and ends a message of several lines, or one that begins with /")


def shown_context(num_tokens: int | None, context: int | None) -> list[str]:
    """A server may not tell how many tokens there are, or can be."""
    if num_tokens is None:
        return [] if context is None else [f"context {context}"]
    return [f"context {num_tokens}" + ("" if context is None else f" of {context}")]


def other_model(chat: AnyChat, path: str, partner: Partner) -> str | None:
    """What to say of a chat that was loaded from ``path`` if another model wrote it; else None."""
    name = chat.written_with
    if name is None or name == partner.name:
        return None
    return f"{path} was written with {name}: {partner.name} goes on with its messages"


def _wanted(command: str, path: str) -> str:
    if not path:
        raise ConfigError(f"/{command}: expected the name of a file")
    return path


def _file_name(text: str) -> str:
    """A name as the system takes it: what was typed is text, the locale's encoding may lack it."""
    return os.fsdecode(text.encode("utf-8", "surrogatepass"))


def _parsed(name: str, text: str) -> Any:
    if name == "stop":
        return text
    try:
        return OPTIONS[name].kind.parse(text)
    except ValueError:
        raise ConfigError(f"/set {name}: found {text!r}, expected {OPTIONS[name].kind.typed} or none") from None


class _Stopped(Exception):
    """Ctrl-C was pressed while the prompt was computed."""


@contextmanager
def _interrupts(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed. The first press is only recorded, so that the answer so
    far is kept; the second raises ``KeyboardInterrupt``, as the first does if this is not ``wanted``."""
    if not wanted:
        yield lambda: False
        return
    count = 0

    def note(signum: int, frame: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: only that one can handle signals
        yield lambda: False
        return
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)
