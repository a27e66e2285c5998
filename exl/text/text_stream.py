"""Streams text from tokens: whole characters only, and never a character that a stop string would cut off."""

from __future__ import annotations

from collections.abc import Sequence

from exl.sampling_params import checked_stop
from exl.text.tokenizer import Tokenizer


class TextStream:
    """The text that continues a prompt, piece by piece.

    The pieces join to the decoded text of prompt + continuation, without the prompt's text, up to the first stop
    string. So a space between prompt and continuation is kept if the tokens have one, and without a prompt the text
    is decoded as the start of a text. A character that the prompt left incomplete belongs to the continuation.

    The first stop string is the one that is complete first; of several that end at the same place, the longest. So the
    result does not depend on how the text is cut into tokens. The stop string itself is not part of the text.

    The cost per token does not grow with the length of the text. Held back are at most three bytes of an incomplete
    character, and the longest end of the text that may still become a stop string.
    """

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
        self.stopped: str | None = None  # the stop string that ended the text
        self._stop = checked_stop(stop)
        self._max_held = max(map(len, self._stop), default=1) - 1
        self._held = ""
        self._finished = False
        self._decoder = tokenizer.text_decoder(skip_special_tokens=skip_special_tokens)
        self._decoder.skip(prompt_ids)

    def push(self, token_id: int) -> str:
        """The text that this token makes final, often empty; always empty after a stop string."""
        if self.stopped is not None or self._finished:
            return ""
        return self._cut(self._decoder.push(token_id))

    def finish(self) -> str:
        """The rest: what was held back, with U+FFFD for the bytes of an incomplete character. Ends the stream."""
        if self.stopped is not None or self._finished:
            return ""
        self._finished = True
        text = self._cut(self._decoder.finish())
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _cut(self, new: str) -> str:
        """Held-back text + new text, up to the first stop string; else up to what may still become one."""
        text = self._held + new
        matches = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if matches:
            _, start, self.stopped = min(matches)
            self._held = ""
            return text[:start]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def _num_held(self, text: str) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        for start in range(max(len(text) - self._max_held, 0), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return len(text) - start
        return 0
