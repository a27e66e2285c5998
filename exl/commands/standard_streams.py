"""Standard input, output and error as the ``exl`` command uses them, whatever the caller made of them.

Any of the three may be closed (``exl ... >&-``, a service, ``pythonw.exe``), may have an encoding that lacks what a
model writes, or may fail when it is written to: a full disk, a reader that has gone (``exl ... | head``).
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from exl.errors import ConfigError, ExlError
from exl.user_text import decode_text

_REPLACE = "exl.replace"
_INPUT = "standard input"


class OutputError(ExlError):
    """Standard output cannot be written."""


class ReaderGone(Exception):
    """Nobody reads standard output any more. No ``BrokenPipeError``, which rich would turn into exit code 1."""


class _Output:
    """Standard output, or nothing in its place. Its failures are told apart from those of other files."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._failed = False  # and that was told

    def write(self, text: str) -> int:
        if self._stream is None:
            raise OutputError("standard output: closed, so that there is nowhere to write to")
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed = True
            _raise_output_error(error)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._stream is None or self._failed:
            return
        try:
            self._stream.flush()
        except OSError as error:
            self._failed = True
            _raise_output_error(error)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _ErrorOutput:
    """Standard error. What cannot be written there is lost: a program does not end because nobody hears its remarks."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _raise_output_error(error: OSError) -> NoReturn:
    # Windows reports a closed pipe as an invalid argument.
    if isinstance(error, BrokenPipeError) or (sys.platform == "win32" and error.errno == errno.EINVAL):
        raise ReaderGone from None
    raise OutputError(f"standard output: cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Inside, ``sys.stdin``, ``sys.stdout`` and ``sys.stderr`` can be used without further thought.

    A character that an encoding lacks is replaced. Standard input is read as UTF-8. At the end, standard output is
    flushed: raises ``OutputError`` or ``ReaderGone`` then, too.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    _occupy_descriptors()
    codecs.register_error(_REPLACE, _replaced)
    # On Windows pipes and files have a code page by default, which lacks most of what a model writes.
    piped = {"encoding": "utf-8"} if sys.platform == "win32" else {}
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_REPLACE, **({} if stream.isatty() else piped))
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    absent = None if sys.stderr is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stdout, sys.stderr = _Output(sys.stdout), _ErrorOutput(sys.stderr or absent)  # type: ignore[assignment]
    try:
        yield
        sys.stdout.flush()
    finally:
        _discard_the_rest(before[1])
        sys.stdin, sys.stdout, sys.stderr = before
        if absent is not None:
            absent.close()


def _occupy_descriptors() -> None:
    """Opens the null device where a standard stream is closed. Otherwise the next file that anybody opens gets the
    stream's number, and a library that prints writes into that file."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one


def _discard_the_rest(stream: Any) -> None:
    """Python flushes standard output once more when it ends, and would complain about what could not be written."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """A question mark for a character that the encoding lacks; the bytes of a file name as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = ord(error.object[error.start])
    is_byte = 0xDC80 <= character <= 0xDCFF  # as os.fsdecode gives a byte that is no text
    return bytes([character - 0xDC00]) if is_byte else "?", error.start + 1


def read_input(what: str) -> str:
    """All of standard input, without the newline at its end. Raises ``ConfigError``; ``what``: what it should hold."""
    raw = _read(what, lambda stream: (stream.buffer if hasattr(stream, "buffer") else stream).read())
    text = decode_text(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogateescape"), _INPUT)
    return text.removesuffix("\n")


def input_lines(what: str) -> Iterator[str]:
    """The lines of standard input as they come, without their newlines. Raises ``ConfigError``."""
    first = True
    while line := _read(what, lambda stream: stream.readline()):
        line = line.removesuffix("\n")
        if not _is_text(line):
            decode_text(line.encode("utf-8", "surrogateescape"), _INPUT)
        yield line.removeprefix("\ufeff") if first else line
        first = False


def _read(what: str, read: Callable[[Any], Any]) -> Any:
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError(f"standard input: closed, expected {what}")
    try:
        return read(sys.stdin)
    except OSError as error:
        raise ConfigError(f"standard input: cannot be read: {error.strerror or error}") from None


def read_argument(text: str, name: str) -> str:
    """A text of the command line: its bytes read as UTF-8 if they are that, else as the locale says.

    Raises ``ConfigError`` if they are neither. Not for the names of files, which need not be text.
    """
    with contextlib.suppress(UnicodeError):
        return os.fsencode(text).decode("utf-8")
    if not _is_text(text):
        raw = os.fsencode(text)
        raise ConfigError(f"{name}: found {raw[:40]!r}, expected text in UTF-8")
    return text


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def write(text: str) -> None:
    """Writes a piece of an answer to standard output, unbuffered."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: object) -> None:
    """One line of JSON on standard output; characters that its encoding lacks are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)
