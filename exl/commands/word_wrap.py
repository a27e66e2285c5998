"""Text that comes piece by piece, wrapped at word borders of a terminal.

A word is written as soon as its first piece is there. If a later piece makes it too long for the line, it is taken back
with backspaces, which every terminal understands, and written again on the next line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unicodedata import category

from wcwidth import iter_graphemes, wcswidth

_FENCES = ("```", "~~~")
_VERBATIM = ("    ", "\t", "|")  # Markdown's indented code, and its tables
_CLOSING = ("Po", "Pe", "Pf", "Lm")  # Unicode categories that never begin a line beside wide characters
_OPENING = ("Ps", "Pi")  # that never end one
_NARROWEST = 20  # columns; in less, words are left to the terminal
_DEFAULT_COLUMNS = 80


class WordWrap:
    """Writes text to a terminal so that no word is split at the right margin.

    Widths are counted in columns: a CJK character or an emoji takes two, a combining mark none; lines may also break
    beside such wide characters. Code (fenced, or indented by four spaces) and tables are left alone. Control characters
    other than newline and tab are replaced: a model's text must not command the terminal.
    """

    def __init__(self, write: Callable[[str], object], columns: Callable[[], int]) -> None:
        """``columns``: the terminal's width, asked for again for each word, because it may change."""
        self._write, self._columns = write, columns
        self._fenced = False
        self._begin_line()

    def _begin_line(self) -> None:
        self._line = ""  # what has come of this line, whatever was wrapped
        self._column = 0  # of the cursor
        self._word = ""
        self._word_column = 0  # where the word begins

    def write(self, text: str) -> None:
        for grapheme in iter_graphemes(_printable(text)):
            if grapheme == "\n":
                self._fenced ^= _is_fence(self._line)
                self._write("\n")
                self._begin_line()
            else:
                self._add(grapheme)
                self._line += grapheme

    def end(self) -> None:
        """The text has ended: what comes next stands on a new line and is no code."""
        self._fenced = False
        self._begin_line()

    def _add(self, grapheme: str) -> None:
        if self._is_verbatim(grapheme):
            self._write(grapheme)
            return
        limit = self._columns() - 1  # a terminal behaves in its own way in the last column
        if grapheme.isspace():
            self._word = ""
            if self._column < limit:
                self._write(grapheme)
                self._column = (self._column // 8 + 1) * 8 if grapheme == "\t" else self._column + 1
            return
        if self._begins_word(grapheme):
            self._word, self._word_column = "", self._column
        self._word += grapheme
        width = _width(self._word)
        if self._word_column + width <= limit or self._word_column == 0 or limit < _NARROWEST:
            self._write(grapheme)
        else:
            back = self._column - self._word_column
            self._write("\b" * back + " " * back + "\n" + self._word)
            self._word_column = 0
        self._column = self._word_column + width
        if self._word_column == 0 and self._column > limit:  # a word longer than a line: the terminal goes on
            self._column %= limit + 1

    def _is_verbatim(self, grapheme: str) -> bool:
        start = (self._line + grapheme)[:16]
        return self._fenced or start.startswith(_VERBATIM) or start.lstrip().startswith(_FENCES)

    def _begins_word(self, grapheme: str) -> bool:
        if not self._word:
            return True
        last = self._word[-1]
        if category(grapheme[0]) in _CLOSING or category(last) in _OPENING or last == "\u200d" or _width(grapheme) == 0:
            return False
        return _width(grapheme) == 2 or _width(last) == 2


def _is_fence(line: str) -> bool:
    """Whether a line begins or ends a block of code: three backquotes or tildes, and not a whole ```span```."""
    line = line.lstrip()
    return line.startswith(_FENCES) and line[0] not in line.lstrip(line[0])


def _width(text: str) -> int:
    return max(0, wcswidth(text))


def _printable(text: str) -> str:
    text = text.replace("\r\n", "\n")
    return "".join(
        character if character in "\n\t" or not (ord(character) < 32 or 127 <= ord(character) < 160) else "\ufffd"
        for character in text
    )


def terminal_columns(stream: object) -> int:
    """The present width of the terminal that ``stream`` writes to."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or _DEFAULT_COLUMNS  # type: ignore[attr-defined]
    except (OSError, ValueError, AttributeError):
        return _DEFAULT_COLUMNS


def columns() -> int:
    """The present width of the terminal on standard output."""
    return terminal_columns(sys.stdout)


@contextmanager
def dimmed() -> Iterator[None]:
    """What is written to standard output inside is dimmed, if the terminal can do that."""
    from rich.console import Console

    console = Console()
    able = console.color_system is not None and not console.legacy_windows
    sys.stdout.write("\x1b[2m" if able else "")
    try:
        yield
    finally:
        sys.stdout.write("\x1b[22m" if able else "")
