"""What a request gives: a ``Completion``, or its pieces one by one."""

from __future__ import annotations

import html
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from exl.errors import ExlError
from exl.streams import Stream, Ticket
from exl.text.logprobs import TokenLogprob
from exl.token_html import tokens_html


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt."""

    text: str
    token_ids: tuple[int, ...]  # without the end-of-sequence id; with the tokens of a stop string
    finish_reason: str  # "stop": end of sequence or a stop string; "length": max_tokens or the context is used up
    num_prompt_tokens: int
    num_reused_tokens: int  # prompt tokens taken from the cache instead of computed
    seed: int  # the seed that was used: the same request with it gives the same text on the same machine
    prompt_seconds: float  # until the first token
    decode_seconds: float  # from the first token to the last
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per entry of token_ids; None unless top_logprobs was given
    limit: str | None = None  # "max_tokens" or "context": which one cut the text off, if finish_reason is "length"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 if there is no second token."""
        return (self.num_tokens - 1) / self.decode_seconds if self.num_tokens > 1 and self.decode_seconds else 0.0

    def __repr__(self) -> str:
        return (
            f"Completion({self.text!r}, {self.num_prompt_tokens}+{self.num_tokens} tokens, "
            f"{self.finish_reason}, {self.tokens_per_second:.1f} tokens/s)"
        )

    def _repr_html_(self) -> str:
        """The text; with ``logprobs`` its tokens, those of a stop string too, coloured by their probability."""
        plain = f'<div style="white-space: pre-wrap">{html.escape(self.text)}</div>'
        limit = f" ({self.limit})" if self.limit is not None else ""
        return (
            f"{tokens_html(self.logprobs) if self.logprobs else plain}"
            f'<div style="opacity: 0.6; font-size: 85%">{self.num_prompt_tokens} + {self.num_tokens} tokens, '
            f"{html.escape(self.finish_reason + limit)}, first after {self.prompt_seconds * 1e3:.0f} ms, "
            f"then {self.tokens_per_second:.1f} tokens/s</div>"
        )


class TextIterator(Stream[str]):
    """Pieces of text as they become final; ``completion`` once it is exhausted.

    ``close()`` stops early, and so does the end of a ``with`` block. ``async for`` works, too.
    """

    def __init__(
        self,
        pieces: Generator[str | Completion, None, None],
        ticket: Ticket,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> None:
        super().__init__(pieces, ticket)
        self._logprobs = logprobs
        self._completion: Completion | None = None
        self._num_pieces = 0

    def __next__(self) -> str:
        piece = super().__next__()
        if isinstance(piece, Completion):
            self._completion = piece
            raise StopIteration
        self._num_pieces += 1
        return piece

    @property
    def completion(self) -> Completion:
        """Available after the last piece; before that, raises ``ExlError``."""
        if self._completion is None:
            raise ExlError("this stream has not ended: take its pieces first, then ask for its completion")
        return self._completion

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """One per token so far, also if its text is not final yet; None unless ``top_logprobs`` was given."""
        return None if self._logprobs is None else tuple(self._logprobs)

    @property
    def num_tokens(self) -> int:
        """So far, also those whose text is not final yet."""
        return self._ticket.num_tokens

    def __repr__(self) -> str:
        if self._completion is not None:
            return f"TextIterator(ended: {self._completion!r})"
        state = "closed" if self._ticket.closed else "unfinished"
        return f"TextIterator({state}, {self._num_pieces} pieces so far)"
