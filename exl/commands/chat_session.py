"""Handles the lines that a user types in a chat. Independent of the terminal, so that anything can provide them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from exl.chat import Chat
from exl.completion import Completion, TextIterator
from exl.errors import ConfigError, ExlError
from exl.llm import LLM
from exl.sampling_params import OPTIONS, SamplingParams
from exl.units import format_bytes

SETTINGS: dict[str, type] = {name: option.kind for name, option in OPTIONS.items()}


@dataclass
class ChatSession:
    """A chat with commands. ``write`` gets answers piece by piece; ``say`` gets everything else, line by line."""

    llm: LLM
    chat: Chat
    write: Callable[[str], None]
    say: Callable[[str], None]
    settings: dict[str, Any] = field(default_factory=dict)  # keys: those of SETTINGS
    last: Completion | None = None

    def handle(self, line: str) -> bool:
        """Handles a message or a command. Returns False if the user wants to leave. Reports errors and continues."""
        try:
            if not line.startswith("/"):
                if line.strip():
                    self._answer(lambda: self.chat.stream(line, **self.settings))
                return True
            name, _, rest = line[1:].strip().partition(" ")
            if name in ("quit", "exit"):
                return False
            command = self._commands().get(name)
            if command is None:
                raise ConfigError(f"/{name}: no such command: /help shows them")
            command[1](rest.strip())
        except ExlError as error:
            self.say(f"error: {str(error).splitlines()[0]}")
        return True

    def status(self) -> str:
        """Speed of the last answer, context and memory, on one line."""
        parts = []
        if self.last is not None:
            done = self.last
            parts.append(f"{done.num_tokens} tokens, {done.tokens_per_second:.1f} tokens/s")
            parts.append(f"first after {done.prompt_seconds * 1e3:.0f} ms")
        parts.append(f"context {self.chat.num_tokens} of {self.llm.context}")
        parts.append(f"memory {format_bytes(self.llm.plan.num_bytes)}")
        return " | ".join(parts)

    def _commands(self) -> dict[str, tuple[str, Callable[[str], None]]]:
        return {
            "reset": ("remove all messages", lambda rest: self._reset()),
            "undo": ("remove your last message and its answer", lambda rest: self._undo()),
            "retry": ("another answer to your last message", lambda rest: self._retry()),
            "save": ("FILE: write the conversation", self._save),
            "load": ("FILE: continue a saved conversation", self._load),
            "system": ("[TEXT]: show or change the system prompt", self._set_system),
            "set": ("[NAME VALUE]: show or change a setting; none: the model's own", self._set),
            "stats": ("speed, context, memory", lambda rest: self._stats()),
            "help": ("this list", lambda rest: self._help()),
            "quit": ("leave, as Ctrl-D does", lambda rest: None),
        }

    def _answer(self, begin: Callable[[], TextIterator]) -> None:
        stream = begin()
        self.last = None
        with _interrupts() as interrupted:
            for piece in stream:
                self.write(piece)
                if interrupted():
                    stream.close()
                    break
            else:
                self.last = stream.completion
        self.write("\n")
        self.say(("stopped | " if self.last is None else "") + self.status())

    def _reset(self) -> None:
        self.chat.reset()
        self.say("all messages removed")

    def _undo(self) -> None:
        self.say(f"removed: {self.chat.undo()}")

    def _retry(self) -> None:
        self._answer(lambda: self.chat.stream_retry(**self.settings))

    def _save(self, path: str) -> None:
        self.chat.save(_wanted("save", path))
        self.say(f"{len(self.chat.messages)} messages written to {path}")

    def _load(self, path: str) -> None:
        self.chat = Chat.load(self.llm, _wanted("load", path))
        self.say(f"{len(self.chat.messages)} messages from {path}")

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
        shown = [f"{name} {self.settings.get(name, 'none')}" for name in SETTINGS]
        self.say(", ".join(shown))

    def _stats(self) -> None:
        self.say(self.status())
        for line in self.llm.plan.table().splitlines():
            self.say(line)

    def _help(self) -> None:
        for name, (text, _) in self._commands().items():
            self.say(f"/{name:<7} {text}")


def _wanted(command: str, path: str) -> str:
    if not path:
        raise ConfigError(f"/{command}: expected the name of a file")
    return path


def _parsed(name: str, text: str) -> float | int:
    kind = SETTINGS[name]
    try:
        return kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise ConfigError(f"/set {name}: found {text!r}, expected {expected} or none") from None


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed. The first press is only recorded, so that the answer so
    far is kept; the second raises ``KeyboardInterrupt``."""
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
