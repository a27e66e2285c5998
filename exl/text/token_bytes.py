"""What text tokens stand for: the bytes of each, and whole characters from a run of them.

A tokenizer's decoder is read once and turned into bytes a token. Text is then made byte by byte, in whatever pieces the
tokens come, so that a stream and a decode of everything at once cannot differ.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exl.errors import UnsupportedModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_OPEN_BYTES = 3  # of a UTF-8 character that is not complete


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("exl.replace_each_byte", _replace_each_byte)


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte (OpenAI's GPT-2 ``encoder.py``, ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


@dataclass(frozen=True)
class DecodingRules:
    """A tokenizer.json's decoder. Those of byte-level BPE and of SentencePiece models are known, and no decoder.

    Where tokens hold bytes that are no UTF-8, byte-level text has one U+FFFD for each maximal broken sequence, as
    the tokenizers library writes. With byte fallback there is one for each broken byte, and sound characters beside
    it stay, as SentencePiece writes; the library instead turns the whole run of byte tokens into U+FFFD, which no
    stream could do without taking back what it has shown.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    dropped_at_start: str = ""  # a character that the first token loses wherever it stands (Metaspace)
    strip_char: str = ""  # taken from the start of the text, up to strip_count times
    strip_count: int = 0
    separator: str = ""  # stands before every token

    @classmethod
    def of(cls, decoder: Any | None, source: str) -> DecodingRules:
        """Reads a ``tokenizers`` decoder; ``UnsupportedModelError`` names one that is not known."""
        if decoder is None:
            return cls(separator=" ", strip_char=" ", strip_count=1)
        described = json.loads(decoder.__getstate__())
        steps = described["decoders"] if described["type"] == "Sequence" else [described]
        rules: dict[str, Any] = {}
        fused = False
        for step in steps:
            change = _step(step, fused, len(steps) == 1)
            if change is None:
                raise UnsupportedModelError(
                    f"{source}: found a decoder with {json.dumps(step)[:200]}; expected ByteLevel, Metaspace,"
                    " or a sequence of Replace, ByteFallback, Fuse and, after it, Strip at the start"
                )
            rules["replacements"] = (*rules.get("replacements", ()), *change.pop("replacements", ()))
            rules |= change
            fused |= step["type"] == "Fuse"
        return cls(**rules)

    def token_bytes(self, token: str) -> bytes:
        """Bytes that a token adds inside a text."""
        if self.byte_level:
            if all(char in _BYTE_OF for char in token):
                return bytes(_BYTE_OF[char] for char in token)
            return token.encode()  # an added token, written as it is read
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return (self.separator + token).encode()


def _step(step: dict[str, Any], fused: bool, alone: bool) -> dict[str, Any] | None:
    """What one step of a decoder changes in the rules; None if it is not known there."""
    match step:
        case {"type": "ByteLevel"} if alone:
            return {"byte_level": True}
        case {"type": "Metaspace", "replacement": str(char), "prepend_scheme": scheme} if not fused:
            return {"replacements": ((char, " "),), "dropped_at_start": "" if scheme == "never" else char}
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if not fused:
            return {"replacements": ((pattern, content),)}
        case {"type": "ByteFallback"} if not fused:
            return {"byte_fallback": True}
        case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0} if fused:
            return {"strip_char": char, "strip_count": start}
        case {"type": "Fuse"}:
            return {}
    return None


class TextDecoder:
    """Turns tokens into text as they come: every character as soon as its last byte is there.

    ``token_of`` gives a token's string, or None for one that has no text. At most three bytes are held back.
    """

    def __init__(self, rules: DecodingRules, token_of: Callable[[int], str | None]) -> None:
        self._rules = rules
        self._token_of = token_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(
            "exl.replace_each_byte" if rules.byte_fallback else "replace"
        )
        self._at_start = True
        self._to_strip = rules.strip_count

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._text(self._bytes(token_id))

    def finish(self) -> str:
        """U+FFFD for the bytes of a character that never came to its end."""
        return self._text(b"", final=True)

    def skip(self, token_ids: Sequence[int]) -> None:
        """Has seen these tokens, and shows none of their text; the last character may be incomplete.

        Reads the first tokens, until nothing more is stripped from the start, and the last bytes.
        """
        done = 0
        while done < len(token_ids) and (self._at_start or self._to_strip):
            self.push(token_ids[done])
            done += 1
        tail = b""
        for token_id in reversed(token_ids[done:]):
            tail = self._bytes(token_id) + tail
            if len(tail) >= _MAX_OPEN_BYTES:  # a character that is still open began within these
                break
        self._utf8.decode(tail)

    def _bytes(self, token_id: int) -> bytes:
        token = self._token_of(token_id)
        if token is None:
            return b""
        if self._at_start:
            self._at_start = False
            token = token.replace(self._rules.dropped_at_start, "") if self._rules.dropped_at_start else token
        return self._rules.token_bytes(token)

    def _text(self, data: bytes, final: bool = False) -> str:
        text = self._utf8.decode(data, final)
        while self._to_strip and text:
            if text[0] != self._rules.strip_char:
                self._to_strip = 0
                break
            text, self._to_strip = text[1:], self._to_strip - 1
        return text
