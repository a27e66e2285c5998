"""Streams text from tokens: whole characters only, and never a character that a stop string would cut off."""

from __future__ import annotations

from collections.abc import Sequence

from exl.text.sink import TextSink
from exl.text.tokenizer import Tokenizer


class TextStream:
    """The text that continues a prompt, piece by piece: a ``TextSink`` that never takes a token back."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        """``prompt_ids``: tokens before the continuation; empty if there is no prompt.

        Raises ``ConfigError`` for stop strings that ``SamplingParams`` also refuses.
        """
        self._sink = TextSink(tokenizer, prompt_ids, stop, skip_special_tokens=skip_special_tokens)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._sink.stopped

    def push(self, token_id: int) -> str:
        """The text that this token makes final, often empty; always empty after a stop string."""
        return self._sink.push(token_id).text

    def finish(self) -> str:
        """The rest: what was held back, with U+FFFD for the bytes of an incomplete character. Ends the stream."""
        return self._sink.finish()
