"""From token ids to whole characters and tags, cut where the engine cuts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from exl.sampling_params import checked_stop
from exl.text.sink import first_stop, num_open
from exl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tag:
    """A tag that is a token of its own."""

    name: str  # as the format writes it
    text: str  # as the engine's text has it: nothing if the token is special


Item = str | Tag


def own_tokens(tokenizer: Tokenizer, tags: Iterable[str]) -> dict[int, str]:
    """The tags that are added tokens of this vocabulary, special or not, by id.

    Such a tag counts only as that token: spelled in other pieces it is text, since a model that has the token never
    writes it otherwise, and a text about ``<tool_call>`` does. A tag that is no added token counts wherever the text
    has it.
    """
    added = tokenizer.added_ids
    return {added[tag]: tag for tag in tags if tag in added}


class Lexer:
    """Takes the tokens of an answer; gives whole characters, and the tags that are tokens of their own.

    The texts of all items join to what ``TextSink`` gives for the same tokens, prompt and stop strings: special tokens
    have no text, and a stop string may begin before a tag and end after it. What comes from the beginning of a stop
    string on is dropped, tags too. Held back is the longest end of the text that may become a stop string, and from
    there on also the tags.
    """

    def __init__(
        self, tokenizer: Tokenizer, tags: Iterable[str], prompt_ids: Sequence[int] = (), stop: Sequence[str] | str = ()
    ) -> None:
        """``prompt_ids``: tokens before the answer, as for ``TextSink``. Raises ``ConfigError`` for stop strings that
        ``SamplingParams`` also refuses."""
        self.stopped: str | None = None  # the stop string that ended the answer
        self._own = own_tokens(tokenizer, tags)
        self._special = tokenizer.special_ids
        self._decoder = tokenizer.text_decoder()
        self._decoder.skip(prompt_ids)
        self._stop = checked_stop(stop)
        self._held: list[Item] = []

    def push(self, token_ids: Iterable[int]) -> list[Item]:
        """What these tokens make certain. No two neighbours are texts."""
        if self.stopped is not None:
            return []
        items: list[Item] = []
        for token_id in token_ids:
            name = self._own.get(token_id)
            text = self._decoder.push(token_id)
            if name is None:
                _add(items, text)
                continue
            # Bytes of a broken character come before the tag, and so does what the decoder puts between tokens.
            written = name if text.endswith(name) else ""
            _add(items, text.removesuffix(written))
            items.append(Tag(name, written))
        return self._cut(items)

    def finish(self) -> list[Item]:
        """The rest: what was held back, with U+FFFD for the bytes of an incomplete character."""
        if self.stopped is not None:
            return []
        items: list[Item] = []
        _add(items, self._decoder.finish())
        found = self._cut(items)
        if self.stopped is None:
            found, self._held = [*found, *self._held], []
        return found

    def _cut(self, items: list[Item]) -> list[Item]:
        """What of the held items and these comes out now."""
        if not self._stop or not items:
            return items
        for item in items:
            if isinstance(item, str):
                _add(self._held, item)
            else:
                self._held.append(item)
        text = "".join(map(_text, self._held))
        _, start, self.stopped = first_stop(text, self._stop)
        if self.stopped is not None:
            found = self._release(start)
            if self._held and isinstance(tag := self._held[0], Tag):  # cut within the tag, which is text then
                num = start - sum(len(_text(item)) for item in found)
                _add(found, tag.text[:num])
            self._held = []
            return found
        return self._release(len(text) - num_open(text, self._stop))

    def _release(self, num_chars: int) -> list[Item]:
        """Takes the items of the first characters out of the held ones, and no part of a tag."""
        found: list[Item] = []
        for at, item in enumerate(self._held):
            text = _text(item)
            if len(text) > num_chars:
                if isinstance(item, str):
                    _add(found, item[:num_chars])
                    item = item[num_chars:]
                self._held = [item, *self._held[at + 1 :]]
                return found
            found.append(item)
            num_chars -= len(text)
        self._held = []
        return found


def _text(item: Item) -> str:
    return item if isinstance(item, str) else item.text


def _add(items: list[Item], text: str) -> None:
    """Text at the end of items, joined to a text before it."""
    if not text:
        return
    if items and isinstance(items[-1], str):
        items[-1] += text
    else:
        items.append(text)
