"""What the machines of all formats share: a call's way from what the model wrote to parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from exl.parse.lexer import Tag
from exl.parse.output import Output
from exl.parse.reader import End, Malformed, Reader, Tags, Wait
from exl.parse.tools import Tools

MAX_NESTING = 64  # of brackets in values that are not JSON
MAX_NAME = 256  # characters of a function's name, a call's id or a parameter's name
_NAME = re.compile(r"[^\s<>{}\[\]\"'()`,;=\ud800-\udfff]+")


def is_name(text: str) -> bool:
    """Whether a function may be called so, in all formats."""
    return len(text) <= MAX_NAME and _NAME.fullmatch(text) is not None


@dataclass
class Calls:
    """Where the machine of a format reads and writes."""

    reader: Reader
    output: Output
    tools: Tools
    own: Collection[str]  # the tags that are tokens of their own
    special: Collection[str] = ()  # those of them that the engine's text leaves out
    _tags: dict[frozenset[str], Tags] = field(default_factory=dict, init=False)

    def tags(self, *names: str) -> Tags:
        key = frozenset(filter(None, names))
        if key not in self._tags:
            self._tags[key] = Tags(key, self.own)
        return self._tags[key]

    def begin(self, name: str, call_id: str | None = None) -> None:
        """A call begins: what was taken so far is certainly part of it. Raises ``Malformed`` for what cannot be a
        function's name."""
        if not is_name(name):
            raise Malformed
        self.output.begin(name, call_id or None)
        self.settle()

    def write(self, text: str) -> None:
        """More of the arguments, which stand for all that was taken."""
        self.output.arguments(text)
        self.settle()

    def end(self) -> None:
        self.output.end()
        self.settle()

    def settle(self) -> None:
        """Whatever comes, what was taken so far is not needed again."""
        if self.reader.taken is not None:
            self.reader.taken.clear()

    def name(self, ends: Tags, also: str = "") -> Wait[tuple[str, str]]:
        """A name up to one of these tags, which is taken, or to one of the characters of ``also``, which is not;
        without white space at its ends. Raises ``Malformed`` as soon as it can be no name."""
        reader = self.reader
        yield from reader.space()
        name = ""
        while True:
            if (found := (yield from reader.accept(ends))) is not None:
                return name, found
            char = yield from reader.next()
            if not isinstance(char, str):
                raise Malformed
            if char in also:
                return name, char
            if char.isspace():
                yield from reader.space()
                if (found := (yield from reader.accept(ends))) is not None:
                    return name, found
                char = yield from reader.next()
                if isinstance(char, str) and char in also:
                    return name, char
                raise Malformed
            if len(name) == MAX_NAME or not _NAME.fullmatch(char):
                raise Malformed
            name += reader.take(1)

    def members(self, brackets: str, close: str, read: Callable[[], Wait[None]], begins: str = "") -> Wait[None]:
        """Writes a JSON list or object for what stands between brackets, of which the first was taken: ``read`` reads
        and writes each member; between two of them is a comma.

        ``brackets``: JSON's, which are written; ``close``: the last one as the model writes it. ``begins``: what a
        member must begin with; anything if it is empty. Raises ``Malformed``.
        """
        reader = self.reader
        self.write(brackets[0])
        separator = ""
        while (char := (yield from self._behind_space())) != close:
            if begins and not (isinstance(char, str) and char in begins):
                raise Malformed
            self.write(separator)
            separator = ", "
            yield from read()
            if (yield from self._behind_space()) != close:
                yield from reader.expect(",")
        reader.take(1)
        self.write(brackets[1])

    def _behind_space(self) -> Wait[str | Tag | End]:
        """What comes next behind white space, which is taken."""
        yield from self.reader.space()
        return (yield from self.reader.next())

    def close(self, tags: Tags) -> Wait[str | None]:
        """Takes white space and one of these tags, if they come next; nothing if no such tag comes."""
        if not tags.names:
            return None
        yield from self.reader.space()
        return (yield from self.reader.accept(tags))
