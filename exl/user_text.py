"""Text that people write, as their editors and shells save it.

A byte order mark at the start of a UTF-8 text says how the text is encoded; it is no part of the text, so no model sees
it. Line ends become ``\\n``, as in Python's text files: Windows writes ``\\r\\n``, and a model that has never seen one
reads it as noise. UTF-16, which some shells of Windows write, is refused with a message that says so.
"""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from exl.errors import ConfigError

# UTF-32 begins like UTF-16, so it comes first.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode_utf8(raw: bytes | bytearray) -> str:
    """The text of a whole file's bytes. Raises ``ValueError`` in words that fit after the file's name and a colon."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(_wrong(error)) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode_text(raw: bytes | bytearray, source: str) -> str:
    """Like ``decode_utf8``; raises ``ConfigError`` that names ``source``."""
    try:
        return decode_utf8(raw)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def read_text(path: str | os.PathLike[str], source: str) -> str:
    """The text of a file. Raises ``ConfigError`` that names ``source`` if it cannot be read or is not UTF-8."""
    try:
        raw = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise _unreadable(source, error) from None
    return decode_text(raw, source)


def read_lines(path: str | os.PathLike[str], source: str) -> Iterator[str]:
    """A file's lines, without their ends, read only as far as they are taken. Raises as ``read_text`` does."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from None
    with file:
        yield from decoded_lines(file, source)


def decoded_lines(stream: BinaryIO, source: str) -> Iterator[str]:
    """The lines of a stream, each as soon as it is complete, without their ends. The stream stays open."""
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")
    try:
        for line in reader:
            yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: {_wrong(error)}") from None
    except OSError as error:
        raise _unreadable(source, error) from None
    finally:
        reader.detach()


def _wrong(error: UnicodeDecodeError) -> str:
    for mark, name in _OTHER_MARKS.items():
        if error.object.startswith(mark):
            return f"not UTF-8: found the byte order mark of {name}; save the text as UTF-8"
    return f"not UTF-8: byte 0x{error.object[error.start]:02x}: {error.reason}"


def _unreadable(source: str, error: OSError | ValueError) -> ConfigError:
    return ConfigError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}")
