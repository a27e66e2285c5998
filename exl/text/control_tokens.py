"""Separates what people write from what a chat template writes.

A control token, such as ``<|im_end|>``, steers a model: only the template may write one. Text in a message that looks
like one must reach the model as plain text. So before rendering, every such text in the template's input is replaced
by a placeholder: one character that occurs nowhere in the input. After rendering, the tokenizer puts the text back and
encodes it as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from exl.errors import ConfigError

# Private-use planes 15 and 16: these characters have no meaning and no case and are not white space. As a placeholder
# is one character, a template that trims, changes case or slices its input cannot break it.
_PLACEHOLDERS = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


@dataclass(frozen=True)
class RenderedPrompt:
    """A chat template's output in which placeholders stand for plain text."""

    text: str
    plain: Mapping[str, str] = field(default_factory=dict)  # placeholder -> the text it stands for

    def resolve(self) -> tuple[str, list[tuple[int, int]]]:
        """The text with placeholders replaced, and the spans of the replacements: (start, stop), ascending."""
        parts, spans, length = [], [], 0
        if not self.plain:
            return self.text, spans
        for part in re.split(f"([{re.escape(''.join(self.plain))}])", self.text):
            if part in self.plain:
                part = self.plain[part]
                spans.append((length, length + len(part)))
            parts.append(part)
            length += len(part)
        return "".join(parts), spans


class ControlTokens:
    """A set of control tokens, with searches for them in text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = frozenset(filter(None, tokens))
        # If two tokens match at one position, the longer one wins, as in the tokenizers library.
        either = "|".join(re.escape(token) for token in sorted(self.tokens, key=len, reverse=True)) or "(?!)"
        self._pattern = re.compile(either)
        self._overlapping = re.compile(f"(?=({either}))")
        self._longest = max(map(len, self.tokens), default=0)
        self._beginnings = {token[:n] for token in self.tokens for n in range(1, len(token))}
        self._endings = {token[n:] for token in self.tokens for n in range(1, len(token))}

    def found_in(self, text: str) -> bool:
        return self._pattern.search(text) is not None

    def find(self, text: str, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Spans of the tokens between ``start`` and ``stop``, from left to right, without overlap."""
        return [match.span() for match in self._pattern.finditer(text, start, len(text) if stop is None else stop)]

    def touched_by(self, text: str, start: int, stop: int) -> bool:
        """Whether any token in ``text`` overlaps the range ``start`` to ``stop``."""
        first = max(start - self._longest + 1, 0)
        matches = self._overlapping.finditer(text, first, min(stop + self._longest - 1, len(text)))
        return any(match.start() < stop and match.end(1) > start for match in matches)

    def pieces(self, text: str) -> Iterator[tuple[bool, str]]:
        """Splits a string into (is suspicious, part). Suspicious: whole tokens, and parts of a token at either end.

        A template may join strings: ``<|im_`` at the end of one and ``end|>`` at the beginning of the next would make a
        token. White space at the ends is ignored, because a template may trim it.
        """
        spans = self.find(text)
        if (ending := self._ending(text)) and (not spans or ending[1] <= spans[0][0]):
            spans.insert(0, ending)
        if (beginning := self._beginning(text)) and (not spans or beginning[0] >= spans[-1][1]):
            spans.append(beginning)
        done = 0
        for start, stop in spans:
            yield False, text[done:start]
            yield True, text[start:stop]
            done = stop
        yield False, text[done:]

    def _ending(self, text: str) -> tuple[int, int] | None:
        start = len(text) - len(text.lstrip())
        for stop in range(min(start + self._longest - 1, len(text)), start, -1):
            if text[start:stop] in self._endings:
                return start, stop
        return None

    def _beginning(self, text: str) -> tuple[int, int] | None:
        stop = len(text.rstrip())
        for start in range(max(stop - self._longest + 1, 0), stop):
            if text[start:stop] in self._beginnings:
                return start, stop
        return None


class Placeholders:
    """Hands out placeholders that occur nowhere in the strings of ``inputs``, neither raw nor as JSON escapes."""

    def __init__(self, inputs: Any) -> None:
        text = "\n".join(_strings(inputs))
        self._free = (chr(code) for code in _PLACEHOLDERS if chr(code) not in text and _escaped(chr(code)) not in text)
        self._by_text: dict[str, str] = {}

    def protect(self, value: Any, control: ControlTokens) -> Any:
        """A copy of plain data in which placeholders replace everything that may become a control token.

        Not replaced: the values of ``role`` and ``type``, which templates compare. In keys, only whole tokens are
        replaced, not parts of tokens.
        """
        if isinstance(value, str):
            return "".join(self._of(part) if suspicious else part for suspicious, part in control.pieces(value))
        if isinstance(value, dict):
            return {
                self._protect_key(key, control): item if key in ("role", "type") else self.protect(item, control)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return type(value)(self.protect(item, control) for item in value)
        return value

    def rendered(self, text: str) -> RenderedPrompt:
        """A template's output, in which placeholders that it wrote as JSON escapes are characters again."""
        plain = {placeholder: found for found, placeholder in self._by_text.items()}
        for placeholder in plain:
            text = text.replace(_escaped(placeholder), placeholder)
        return RenderedPrompt(text, plain)

    def _protect_key(self, key: str, control: ControlTokens) -> str:
        spans = control.find(key)
        for start, stop in reversed(spans):
            key = key[:start] + self._of(key[start:stop]) + key[stop:]
        return key

    def _of(self, text: str) -> str:
        if text not in self._by_text:
            placeholder = next(self._free, None)
            if placeholder is None:
                raise ConfigError("messages: every private-use character is taken, expected at least one to be free")
            self._by_text[text] = placeholder
        return self._by_text[text]


def _escaped(char: str) -> str:
    return json.dumps(char)[1:-1]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
