"""What a request gives: a ``Completion``, or its pieces one by one."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from exl.errors import ExlError
from exl.streams import Stream
from exl.text.logprobs import TokenLogprob
from exl.token_html import tokens_html

if TYPE_CHECKING:
    from exl.engine.handle import Handle
    from exl.engine.request import TokenRequest
    from exl.engine.ticket import Answer, Event
    from exl.request_options import Request
    from exl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt."""

    text: str
    token_ids: tuple[int, ...]  # without the end-of-sequence id; with the tokens of a stop string
    # "stop": end of sequence or a stop string; "length": max_tokens or the context is used up; "cancelled": its caller
    # has ended it
    finish_reason: str
    num_prompt_tokens: int
    num_reused_tokens: int  # prompt tokens taken from the cache instead of computed
    seed: int  # the seed that was used: the same request with it gives the same text on the same machine
    prompt_seconds: float  # until the first token
    decode_seconds: float  # from the first token to the last
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per entry of token_ids; None unless top_logprobs was given
    # What cut the text off: "max_tokens" or "context", if finish_reason is "length"; "deadline", if it is "cancelled".
    limit: str | None = None
    choices: tuple[Completion, ...] = ()  # all n of a request with n= or best_of=, this one first; else ()
    mean_logprob: float | None = None  # of its tokens, with best_of=: the choices are ordered by it
    beam_score: float | None = None  # with num_beams=: log-probability / length ** length_penalty; choices go by it
    num_drafted: int = 0  # tokens that were guessed, with speculate=; and those of them that the model drew
    num_accepted: int = 0
    # One per token of the prompt, None for the first; None unless prompt_logprobs was given.
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    stop_reason: int | str | None = None  # what ended it, if finish_reason is "stop": a token's id, a string, "grammar"

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
        start: Callable[[bool], Handle[Completion]],
        logprob_of: Callable[[tuple[tuple[int, float], ...]], TokenLogprob] | None = None,
        keep: Callable[[str, Completion | None], None] | None = None,
    ) -> None:
        """``logprob_of`` makes an entry of ``logprobs``; None: they were not asked for. ``keep`` is called once at the
        end, however that comes, with the text that was handed out, and with the completion if there is one."""
        super().__init__(start, self._text_of, self._ended)
        self._logprob_of, self._keep = logprob_of, keep
        self._logprobs: list[TokenLogprob] = []
        self._completion: Completion | None = None
        self._pieces: list[str] = []

    def _text_of(self, event: Event) -> str | None:
        if not event.text or event.choice != 0:
            return None
        self._pieces.append(event.text)
        return event.text

    def _ended(self) -> None:
        handle = self._handle
        if not self._closed and self._ended_by is None and handle is not None and handle.is_complete:
            self._completion = handle.result()
        if self._keep is not None:
            self._keep("".join(self._pieces), self._completion)

    @property
    def completion(self) -> Completion:
        """Available after the last piece; before that, raises ``ExlError``."""
        if self._completion is None:
            raise ExlError("this stream has not ended: take its pieces first, then ask for its completion")
        return self._completion

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """One per token so far, also if its text is not final yet; None unless ``top_logprobs`` was given."""
        if self._logprob_of is None:
            return None
        ranked = () if self._handle is None else self._handle.answers[0].ranked
        self._logprobs += map(self._logprob_of, ranked[len(self._logprobs) :])
        return tuple(self._logprobs)

    @property
    def num_tokens(self) -> int:
        """So far, also those whose text is not final yet."""
        return 0 if self._handle is None else len(self._handle.answers[0].token_ids)

    def __repr__(self) -> str:
        if self._completion is not None:
            return f"TextIterator(ended: {self._completion!r})"
        state = "closed" if self._closed or self._done else "unfinished"
        return f"TextIterator({state}, {len(self._pieces)} pieces so far)"


def completion_of(tokenizer: Tokenizer, asked: TokenRequest, request: Request, answers: list[Answer]) -> Completion:
    """What a request's answers are to its user: the first choice, with all of them if there are several."""
    prompt, made = _prompt_logprobs(tokenizer, answers[0]), [_choice(tokenizer, asked, request, a) for a in answers]
    made = [replace(one, prompt_logprobs=prompt) for one in made]
    if len(made) == 1:
        return made[0]
    if request.best_of is not None:
        made.sort(key=lambda one: math.inf if one.mean_logprob is None else -one.mean_logprob)
    made = made[: request.n]
    return replace(made[0], choices=tuple(made))


def _prompt_logprobs(tokenizer: Tokenizer, answer: Answer) -> tuple[TokenLogprob | None, ...] | None:
    if answer.prompt_ranked is None:
        return None
    return tuple(None if ranked is None else TokenLogprob.of(ranked, tokenizer) for ranked in answer.prompt_ranked)


def _choice(tokenizer: Tokenizer, asked: TokenRequest, request: Request, answer: Answer) -> Completion:
    mean, logprobs = None, None
    if request.best_of is not None and answer.ranked:
        mean = math.fsum(ranked[0][1] for ranked in answer.ranked) / len(answer.ranked)
    if request.top_logprobs is not None:
        logprobs = tuple(TokenLogprob.of(ranked, tokenizer) for ranked in answer.ranked)
    return Completion(
        text="".join(answer.pieces),
        token_ids=tuple(answer.token_ids),
        finish_reason=answer.outcome.finish_reason,
        num_prompt_tokens=len(asked.prompt_ids),
        num_reused_tokens=answer.num_reused,
        seed=answer.seed,
        prompt_seconds=max(0.0, answer.first - answer.began),
        decode_seconds=answer.last - answer.first,
        logprobs=logprobs,
        limit=answer.outcome.limit,
        mean_logprob=mean,
        beam_score=answer.beam_score,
        num_drafted=answer.num_drafted,
        num_accepted=answer.num_accepted,
        stop_reason=answer.outcome.stop_reason,
    )
