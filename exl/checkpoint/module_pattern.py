"""Matches regular expressions from untrusted files against module names, in bounded time.

``re`` backtracks: a pattern of twenty characters in a downloaded file can keep it busy for years. Here the matcher
tracks the set of all positions that a pattern can reach, one bit per position in one integer, so that it never needs
to backtrack. The result is that of ``re.match``: the pattern must match from the start of the name, but need not reach
its end.

Not supported, and refused by name: back references, which need the text of a match; lookbehind, atomic groups and
possessive repeats; and flags.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from exl.errors import ConfigError

if sys.version_info >= (3, 11):  # the standard library's parser; between versions only the module's name differs
    from re import _constants as ops
    from re import _parser as parser
else:
    import sre_constants as ops
    import sre_parse as parser

MAX_PATTERN_CHARS = 512
MAX_NESTED_REPEATS = 3  # each level can multiply the number of steps by the name's length

_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT)  # lazy and greedy repeats match the same names
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    ops.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    ops.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}


@dataclass(frozen=True)
class ModulePattern:
    """A parsed pattern. ``literal``: a text that every match contains. ``exact``: the only match, or None."""

    text: str
    tree: Any = field(compare=False, repr=False)
    literal: str
    exact: str | None

    @classmethod
    def parse(cls, text: str) -> ModulePattern:
        """Raises ``ConfigError`` that says what is wrong with the pattern; the caller adds file and key."""
        if len(text) > MAX_PATTERN_CHARS:
            raise ConfigError(f"a pattern of {len(text)} characters, expected at most {MAX_PATTERN_CHARS}")
        try:
            tree = parser.parse(text)
        except (re.error, ValueError, OverflowError, RecursionError, Warning) as error:
            raise ConfigError(f"not a regular expression: {error}") from None
        if tree.state.flags & ~re.UNICODE:
            raise ConfigError("flags in a pattern, which exl does not support")
        _check_supported(tree, 0)
        runs, items = [""], list(tree)
        for op, value in items:
            if op is ops.LITERAL:
                runs[-1] += chr(value)
            else:
                runs.append("")
        closed = items[-1:] == [(ops.AT, ops.AT_END)] and all(op is ops.LITERAL for op, _ in _without_start(items)[:-1])
        return cls(text, tree, max(runs, key=len), "".join(runs) if closed else None)


def _without_start(items: list[Any]) -> list[Any]:
    return items[1:] if items[:1] in ([(ops.AT, ops.AT_BEGINNING)], [(ops.AT, ops.AT_BEGINNING_STRING)]) else items


def _check_supported(tree: Any, num_repeats: int) -> None:
    for op, value in tree:
        if op in _REPEATS:
            if num_repeats == MAX_NESTED_REPEATS:
                raise ConfigError(
                    f"more than {MAX_NESTED_REPEATS} repeats inside each other, which exl does not support"
                )
            _check_supported(value[2], num_repeats + 1)
        elif op is ops.SUBPATTERN:
            if value[1] or value[2]:
                raise ConfigError("flags in a pattern, which exl does not support")
            _check_supported(value[3], num_repeats)
        elif op is ops.BRANCH:
            for branch in value[1]:
                _check_supported(branch, num_repeats)
        elif op in (ops.ASSERT, ops.ASSERT_NOT) and value[0] == 1:
            _check_supported(value[1], num_repeats)
        elif op not in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN, ops.AT):
            raise ConfigError(f"{str(op).lower()} in a pattern, which exl does not support")


class ModuleMatcher:
    """Matches many patterns against one module name. In a set of positions, bit i means: after the first i characters.

    ``max_steps`` limits all patterns together, because a file may hold thousands.
    """

    def __init__(self, name: str, max_steps: int) -> None:
        self.name = name
        self._steps_left = max_steps
        self._end = 1 << len(name)
        self._chars: dict[str, int] = {}  # character -> set of its positions
        for i, char in enumerate(name):
            self._chars[char] = self._chars.get(char, 0) | 1 << i

    def found(self, pattern: ModulePattern) -> bool:
        """Whether ``re.search`` finds the pattern: anywhere in the name. Raises as :meth:`matches`."""
        return pattern.literal in self.name and self._reach(pattern.tree, self._end * 2 - 1) != 0

    def matches(self, pattern: ModulePattern) -> bool:
        """Raises ``ConfigError`` if the steps are used up."""
        if pattern.exact is not None:  # "$" also matches before a final line break
            return self.name in (pattern.exact, pattern.exact + "\n")
        return pattern.literal in self.name and self._reach(pattern.tree, 1) != 0

    def _reach(self, tree: Any, starts: int) -> int:
        """The positions at which a match of ``tree`` can end if it begins at one of ``starts``."""
        for op, value in tree:
            self._steps_left -= 1
            if self._steps_left < 0:
                raise ConfigError("patterns that take too many steps to match")
            if not starts:
                return 0
            if op in _REPEATS:
                starts = self._repeat(*value, starts)
            elif op is ops.SUBPATTERN:
                starts = self._reach(value[3], starts)
            elif op is ops.BRANCH:
                branches, starts_of_all = value[1], starts
                starts = 0
                for branch in branches:
                    starts |= self._reach(branch, starts_of_all)
            elif op in (ops.ASSERT, ops.ASSERT_NOT):
                starts = self._assert(op is ops.ASSERT, value[1], starts)
            elif op is ops.AT:
                starts &= self._places(value)
            else:
                starts = (starts & self._standing(op, value)) << 1
        return starts

    def _repeat(self, low: int, high: int, body: Any, starts: int) -> int:
        count, reached = 0, starts
        while count < low:  # required rounds; if one round changes nothing, the others do not either
            following = self._reach(body, reached)
            count += 1
            if following in (0, reached):
                reached = following
                break
            reached = following
        frontier, count = reached, low
        while frontier and count < high:
            frontier = self._reach(body, frontier) & ~reached
            reached |= frontier
            count += 1
        return reached

    def _assert(self, wanted: bool, body: Any, starts: int) -> int:
        kept, bit = 0, 1
        while bit <= starts:
            if starts & bit and (self._reach(body, bit) != 0) == wanted:
                kept |= bit
            bit <<= 1
        return kept

    def _places(self, where: Any) -> int:
        if where in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return 1
        if where is ops.AT_END_STRING:
            return self._end
        if where is ops.AT_END:
            return self._end | (self._end >> 1 if self.name.endswith("\n") else 0)
        boundary, before = 0, False
        for i in range(len(self.name) + 1):
            after = i < len(self.name) and _CATEGORIES[ops.CATEGORY_WORD](self.name[i])
            boundary |= (before != after) << i
            before = after
        return boundary if where is ops.AT_BOUNDARY else (self._end * 2 - 1) & ~boundary

    def _standing(self, op: Any, value: Any) -> int:
        """The positions of characters that the item accepts."""
        if op is ops.LITERAL:
            return self._chars.get(chr(value), 0)
        found = 0
        for char, places in self._chars.items():
            if _stands(op, value, char):
                found |= places
        return found


def _stands(op: Any, value: Any, char: str) -> bool:
    if op is ops.ANY:
        return char != "\n"
    if op is ops.NOT_LITERAL:
        return ord(char) != value
    wanted = value[0][0] is not ops.NEGATE
    return any(_in_item(kind, item, char) for kind, item in value if kind is not ops.NEGATE) == wanted


def _in_item(kind: Any, item: Any, char: str) -> bool:
    if kind is ops.LITERAL:
        return ord(char) == item
    if kind is ops.RANGE:
        return item[0] <= ord(char) <= item[1]
    return _CATEGORIES[item](char)
