"""What the engine and a request's caller share: events on their way, and what has come of each choice so far."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from exl.engine.prompt_rows import PromptRows, prompt_rows
from exl.engine.request import Outcome, TokenRequest

if TYPE_CHECKING:
    from exl.engine.sequence import Sequence


class Event(NamedTuple):
    """News of one choice of a request. Its tokens' text may come with a later event, when it is final."""

    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    ranked: tuple[tuple[tuple[int, float], ...], ...] | None = None  # for each token: (id, log-probability), see Answer
    outcome: Outcome | None = None  # of the choice's last event
    logits: torch.Tensor | None = None  # f32 [n, V] on the host, of the next n tokens of the prompt

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) if self.logits is None else len(self.logits)


@dataclass(eq=False)
class Answer:
    """One choice of a request, as far as it has come."""

    choice: int
    seed: int
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    ranked: list[tuple[tuple[int, float], ...]] | None = None  # per token: itself, then the likeliest
    prompt_ranked: list[tuple[tuple[int, float], ...] | None] | None = None  # per token of the prompt; all choices' own
    embedding: NDArray[np.float32] | None = None  # [C], with ``TokenRequest.pooling``
    outcome: Outcome | None = None
    num_told: int = 0  # tokens that events have told of: no banned string can take these back
    num_drafted: int = 0  # tokens that were guessed, see ``exl.engine.drafts``; and those of them that were drawn
    num_accepted: int = 0
    beam_score: float | None = None  # of a beam search: by which its choices are ordered
    num_reused: int = 0  # tokens of the prompt that were in the cache
    began: float = 0.0  # seconds of ``time.perf_counter``: admitted, first token, last token
    first: float = 0.0
    last: float = 0.0


class Ticket:
    """A request on its way. Its fields are written by whoever drives the engine, but for ``taken``, ``iterated``,
    ``cancelled`` and ``waiter``, which are its caller's.

    Callers never see an event late: every event is put into ``outbox`` before ``ended`` is set.
    """

    def __init__(self, request: TokenRequest, answers: list[Answer], party: object, lora: int = -1) -> None:
        """``party``: whose request it is; requests of one party may be driven by its own thread. None: by nobody's but
        the engine's. ``lora``: the number of its adapter, -1: none."""
        self.request, self.answers, self.party, self.lora = request, answers, party, lora
        self.outbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()  # None: look at ``ended``
        self.rows: PromptRows | None = prompt_rows(self)  # its choices share them
        self.sequences: list[Sequence] = []
        self.num_put = self.num_taken = 0  # tokens
        self.max_unread = 1 if request.wants_all else request.max_unread
        self.deadline = None if request.deadline is None else time.monotonic() + request.deadline
        self.iterated = False  # somebody takes events as they come; else they are only collected
        self.cancelled = False
        self.ended = False
        self.error: BaseException | None = None  # that ended it
        self.waiter: tuple[asyncio.AbstractEventLoop, Callable[[], None]] | None = None  # to be woken in its loop
        self.woken: list[tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = []  # the seat's: to be woken soon

    @property
    def lags(self) -> bool:
        """Whether its reader is so far behind that it gets no more for now."""
        behind = self.num_put - self.num_taken  # also by events that an interrupt has lost on their way
        return self.iterated and behind >= self.max_unread and not self.outbox.empty()

    @property
    def began(self) -> bool:
        """Whether a choice has begun to run."""
        return any(answer.began for answer in self.answers)

    def put(self, event: Event) -> None:
        self.num_put += event.num_tokens
        self._put(event)

    def put_logits(self, logits: torch.Tensor) -> None:
        """Those after the next tokens of the prompt, f32 [n, V] on the host."""
        self.put(Event(0, logits=logits))

    def end(self, error: BaseException | None = None) -> None:
        """No more events come. Called once; every reader that waits is woken."""
        if not self.ended:
            self.error, self.ended = error, True
            self._put(None)

    def _put(self, event: Event | None) -> None:
        self.outbox.put(event)
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            self.woken.append(waiter)
