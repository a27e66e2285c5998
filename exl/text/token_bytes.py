"""The bytes of each token, and whole characters from a sequence of tokens.

A tokenizer's decoder is read once and turned into a rule for the bytes per token. Text is then decoded incrementally
from these bytes, so that streaming and decoding everything at once cannot differ.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from exl.errors import UnsupportedModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_OPEN_BYTES = 3  # an incomplete UTF-8 character has at most this many


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
    """The decoder of a tokenizer.json. Known: those of byte-level BPE and of SentencePiece models, and no decoder.

    If tokens hold bytes that are not UTF-8, byte-level text has one U+FFFD per maximal broken sequence, as in the
    tokenizers library. With byte fallback there is one per broken byte, and valid characters next to it stay, as in
    SentencePiece; the tokenizers library instead turns the whole run of byte tokens into U+FFFD, which a stream could
    do only by taking back text that it has already shown.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    dropped_at_start: str = ""  # a character removed from the first token, at every position (Metaspace)
    strip_char: str = ""  # removed from the start of the text, at most strip_count times
    strip_count: int = 0
    separator: str = ""  # put before every token

    @classmethod
    def of(cls, decoder: Any | None, source: str) -> DecodingRules:
        """Reads a ``tokenizers`` decoder. Raises ``UnsupportedModelError`` that names an unknown one."""
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
        """The bytes that a token adds inside a text (not at its start)."""
        if self.byte_level:
            if all(char in _BYTE_OF for char in token):
                return bytes(_BYTE_OF[char] for char in token)
            return token.encode()  # an added token: plain text, not in the byte-level alphabet
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return (self.separator + token).encode()


def _step(step: dict[str, Any], fused: bool, alone: bool) -> dict[str, Any] | None:
    """The fields of the rules that one decoder step sets; None if the step is not known at this place."""
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


@dataclass(frozen=True)
class DecoderState:
    """A place in a text: ``TextDecoder.state``."""

    pending: bytes
    at_start: bool
    to_strip: int


class TextDecoder:
    """Turns tokens into text one by one: each character is returned as soon as its last byte has arrived.

    ``token_of`` returns a token's string, or None if it has no text. At most three bytes are held back.
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
        return self.text_of(self.bytes_of(token_id))

    def finish(self) -> str:
        """U+FFFD for the bytes of a character that is still incomplete."""
        return self.text_of(b"", final=True)

    def state(self) -> DecoderState:
        """What ``restore`` goes back to."""
        return DecoderState(self._utf8.getstate()[0], self._at_start, self._to_strip)

    def restore(self, state: DecoderState) -> None:
        self._utf8.setstate((state.pending, 0))
        self._at_start, self._to_strip = state.at_start, state.to_strip

    @property
    def pending(self) -> bytes:
        """The bytes of a character that is still incomplete."""
        return self._utf8.getstate()[0]

    def skip(self, token_ids: Sequence[int]) -> None:
        """Takes these tokens as already decoded, without returning their text. The last character may be incomplete.

        Decodes only the first tokens, until nothing more is stripped from the start, and the last bytes.
        """
        done = 0
        while done < len(token_ids) and (self._at_start or self._to_strip):
            self.push(token_ids[done])
            done += 1
        tail = b""
        for token_id in reversed(token_ids[done:]):
            tail = self.bytes_of(token_id) + tail
            if len(tail) >= _MAX_OPEN_BYTES:  # a character that is still incomplete starts within these
                break
        self._utf8.decode(tail)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that the next token adds here; ``text_of`` must get them next."""
        token = self._token_of(token_id)
        if token is None:
            return b""
        if self._at_start:
            self._at_start = False
            token = token.replace(self._rules.dropped_at_start, "") if self._rules.dropped_at_start else token
        return self._rules.token_bytes(token)

    def text_of(self, data: bytes, final: bool = False) -> str:
        """The characters that these bytes complete."""
        text = self._utf8.decode(data, final)
        while self._to_strip and text:
            if text[0] != self._rules.strip_char:
                self._to_strip = 0
                break
            text, self._to_strip = text[1:], self._to_strip - 1
        return text

    def char_starts(self, state: DecoderState, data: bytes) -> list[int]:
        """Where the characters begin that ``data`` completes from a state on: offsets in ``state.pending + data``.

        One more at the end: where the bytes begin that complete none, or the length. Characters that are stripped from
        the start of the text are not among them.
        """
        data = state.pending + data
        text, sizes, done = "", [], 0
        while done < len(data):
            utf8 = codecs.getincrementaldecoder("utf-8")("strict")
            try:
                whole, broken = utf8.decode(data[done:]), 0
            except UnicodeDecodeError as error:
                whole, broken = data[done : done + error.start].decode(), error.end - error.start
            text += whole
            sizes += [len(char.encode()) for char in whole]
            if not broken:
                break
            replaced = [1] * broken if self._rules.byte_fallback else [broken]
            text += "\ufffd" * len(replaced)
            sizes += replaced
            done = sum(sizes)
        stripped = text[: state.to_strip]
        num_stripped = len(stripped) - len(stripped.lstrip(self._rules.strip_char)) if stripped else 0
        return [0, *accumulate(sizes)][num_stripped:]
