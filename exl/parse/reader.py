"""What machines read: characters and tags, one after the other, however they were cut.

A machine is a generator that yields whenever it has read all there is and needs more; whoever drives it feeds the
reader and resumes it. So a machine is written as if the whole answer were there, and where it is cut changes nothing.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from enum import Enum
from typing import TypeVar

from exl.parse.lexer import Item, Tag

T = TypeVar("T")
Wait = Generator[None, None, T]  # a machine, or a part of one, that gives a T at its end


class End(Enum):
    """The answer has no more."""

    END = "end"


END = End.END


class Malformed(Exception):
    """What was read is no call. What the reader has not yet taken is read again, as something else."""


class Tags:
    """Some tags to look for. Those that are tokens of their own are met as such, the others in the text."""

    def __init__(self, names: Collection[str], own: Collection[str]) -> None:
        """``own``: the tags that are tokens of their own; other tags than ``names`` may be among them."""
        self.names = frozenset(names)
        self._written = sorted((name for name in self.names if name not in own), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._written)) or "(?!)")
        firsts = "".join(sorted({re.escape(name[0]) for name in self._written}))
        self._firsts = re.compile(f"[{firsts}]" if firsts else "(?!)")
        self._longest = max(map(len, self._written), default=0)

    def search(self, text: str, start: int) -> re.Match[str] | None:
        return self._pattern.search(text, start)

    def match(self, text: str, start: int) -> re.Match[str] | None:
        return self._pattern.match(text, start)

    def may_begin(self, text: str, start: int) -> bool:
        """Whether the rest of the text is a beginning of a tag, and not all of it."""
        rest = text[start : start + self._longest]
        if not rest or start + len(rest) < len(text):
            return False
        return any(len(rest) < len(tag) and tag.startswith(rest) for tag in self._written)

    def open_start(self, text: str, start: int) -> int:
        """Where the longest end of a text begins that may become a tag; the text's length if there is none."""
        at = max(len(text) - self._longest + 1, start)
        while (found := self._firsts.search(text, at)) is not None:
            if self.may_begin(text, found.start()):
                return found.start()
            at = found.end()
        return len(text)


class Reader:
    """A queue of characters and tags, with a place in it.

    ``taken``, if it is a list, gets all text that is taken: whoever tries to read something that may turn out to be
    text puts a list there before.
    """

    def __init__(self) -> None:
        self.taken: list[str] | None = None
        self._text = ""  # the text at the front, of which the first _at characters are taken
        self._at = 0
        self._later: deque[Item] = deque()  # what follows it, beginning with a tag
        self._closed = False

    def feed(self, items: Iterable[Item]) -> None:
        for item in items:
            if isinstance(item, str) and not self._later:
                self._text = self._text[self._at :] + item
                self._at = 0
            else:
                self._later.append(item)

    def close(self) -> None:
        """Nothing more will be fed."""
        self._closed = True

    @property
    def text(self) -> str:
        return self._text

    @property
    def at(self) -> int:
        """``text[at:]`` comes next."""
        return self._at

    @property
    def may_grow(self) -> bool:
        """Whether the text at the front may get longer."""
        return not self._later and not self._closed

    def take(self, num_chars: int) -> str:
        """The next characters of the text at the front."""
        taken = self._text[self._at : self._at + num_chars]
        self._at += num_chars
        if self.taken is not None:
            self.taken.append(taken)
        return taken

    def take_tag(self, tag: Tag) -> None:
        """The tag that ``next`` has given."""
        self._later.popleft()
        if self.taken is not None:
            self.taken.append(tag.text)

    def next(self) -> Wait[str | Tag | End]:
        """The next character, a tag, or the end. Takes nothing."""
        while True:
            if self._at < len(self._text):
                return self._text[self._at]
            if self._later:
                if isinstance(item := self._later[0], Tag):
                    return item
                self._text, self._at = item, 0
                self._later.popleft()
            elif self._closed:
                return END
            else:
                yield

    def run(self, pattern: re.Pattern[str]) -> str:
        """As much of the text at the front as a pattern matches; the rest of such text may come later."""
        match = pattern.match(self._text, self._at)
        return self.take(len(match[0])) if match else ""

    def expect(self, chars: str) -> Wait[str]:
        """The next character, if it is one of these. Raises ``Malformed`` for anything else."""
        found = yield from self.next()
        if not isinstance(found, str) or found not in chars:
            raise Malformed
        return self.take(1)

    def space(self) -> Wait[str]:
        """White space, all that comes next."""
        found = []
        while isinstance(char := (yield from self.next()), str) and char.isspace():
            found.append(self.take(1))
        return "".join(found)

    def accept(self, tags: Tags) -> Wait[str | None]:
        """The tag that comes next, if it is one of these; takes it."""
        while True:
            found = yield from self.next()
            if isinstance(found, Tag):
                if found.name not in tags.names:
                    return None
                self.take_tag(found)
                return found.name
            if found is END:
                return None
            if self.may_grow and tags.may_begin(self._text, self._at):
                yield
                continue
            match = tags.match(self._text, self._at)
            return None if match is None else self.take(len(match[0]))

    def require(self, tags: Tags) -> Wait[str]:
        """The tag that comes next, taken, which is one of these. Raises ``Malformed`` for anything else; a tag that the
        answer's end has cut off is taken then."""
        found = yield from self.accept(tags)
        if found is None:
            if self._closed and not self._later and tags.may_begin(self._text, self._at):
                self.take(len(self._text) - self._at)
            raise Malformed
        return found

    def scan(self, tags: Tags, emit: Callable[[str], None]) -> Wait[str | None]:
        """Gives out text up to the first of these tags, takes that, and returns it; None at the end.

        Text is held back only while it may begin one of the tags. Other tags are text, as the engine's text has them.
        """
        while True:
            found = yield from self.next()
            if found is END:
                return None
            if isinstance(found, Tag):
                self.take_tag(found)
                if found.name in tags.names:
                    return found.name
                if found.text:
                    emit(found.text)
                continue
            match = tags.search(self._text, self._at)
            if match and self.may_grow and tags.may_begin(self._text, match.start()):  # a longer one
                stop, match = match.start(), None
            elif match:
                stop = match.start()
            else:
                stop = tags.open_start(self._text, self._at) if self.may_grow else len(self._text)
            if stop > self._at:
                emit(self.take(stop - self._at))
            if match:
                return self.take(len(match[0]))
            if stop < len(self._text):
                yield
