"""Grammars in llguidance's Lark, made piece by piece (docs/syntax.md of guidance-ai/llguidance)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from exl.json_schema import JSON_SPACE
from exl.text.tokenizer import Tokenizer

_ANY = "(?s:.*)"


class Lark:
    """Rules of one grammar. Methods return expressions that other rules may hold.

    A tag that is a token of its own is written as that token, so that the grammar means what the parser reads; free
    text then has it in no other spelling either, where its bytes could be taken for text. A tag that is none is text.
    """

    def __init__(self, tokenizer: Tokenizer, tags: Collection[str]) -> None:
        self._own = {tag: tokenizer.added_ids[tag] for tag in tags if tag in tokenizer.added_ids}
        self._special = tokenizer.special_ids
        self._rules: list[str] = []
        self._names: dict[str, str] = {}  # by what they stand for

    def is_own(self, tag: str) -> bool:
        return tag in self._own

    def text(self, *pieces: str) -> str:
        """Tags and texts, one behind the other, as they are written."""
        merged: list[str] = []
        written = ""
        for piece in pieces:
            if piece in self._own:
                merged += [json.dumps(written)] * bool(written) + [f"<[{self._own[piece]}]>"]
                written = ""
            else:
                written += piece
        return " ".join([*merged, *([json.dumps(written)] if written else [])])

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON of a schema."""
        own = schema.get("x-guidance")
        options = {"whitespace_pattern": JSON_SPACE, **(own if isinstance(own, Mapping) else {})}
        return self.rule("%json " + json.dumps({**schema, "x-guidance": options}, allow_nan=False))

    def regex(self, pattern: str) -> str:
        """A regular expression, in Rust's syntax, that does not match the empty text."""
        return self._terminal("/" + pattern.replace("/", "\\/") + "/")

    def free(self, without: Collection[str], not_first: str = "") -> str:
        """Some text, at least a character, in which these tags do not occur, and which does not begin with one of the
        characters of ``not_first``, white space before them aside."""
        start = f"[^{re.escape(not_first)}\\s]" if not_first else "(?s:.)"
        return self._terminal(f"/{start}{_ANY}/{self._not_holding(without)}")

    def until(self, tag: str, without: Collection[str] = ()) -> str:
        """Any text, up to the first occurrence of a tag, and the tag. ``without``: other tags that must not occur."""
        if tag in self._own:
            return f"({self.free((tag, *without))})? {self.text(tag)}"
        terminal = self._terminal(f"/{_ANY}{_escaped(tag)}/{self._not_holding(without)}")
        return self._defined("r", f"[lazy]: {terminal}")

    def one_of(self, choices: Sequence[str]) -> str:
        return self.rule(" | ".join(choices))

    def rule(self, body: str) -> str:
        return self._defined("r", f": {body}")

    def source(self, start: str) -> str:
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules, ""])

    def _not_holding(self, tags: Collection[str]) -> str:
        """What makes a terminal exclude texts that hold one of these tags. One negation for all: each costs much.
        Special tokens are no text anyway."""
        avoided = sorted({tag for tag in tags if self._own.get(tag) not in self._special})
        return f" & ~/{_ANY}({'|'.join(map(_escaped, avoided))}){_ANY}/" if avoided else ""

    def _terminal(self, body: str) -> str:
        return self._defined("T", f": {body}")

    def _defined(self, kind: str, definition: str) -> str:
        """The name of what is defined so. ``kind``: "r", a rule, or "T", a terminal."""
        if definition not in self._names:
            self._names[definition] = f"{kind}{len(self._rules)}"
            self._rules.append(self._names[definition] + definition)
        return self._names[definition]


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", "\\/")
