"""Requests to a scheduler over a ``FakeDevice``, and the whole around it, without a seat: whoever calls drives."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from exl.batch import PAGE_SIZE
from exl.cache.page_pool import PagePool
from exl.cache.window_pool import WindowPool
from exl.engine.admission import Pages
from exl.engine.answers import Answers
from exl.engine.drafts import Drafts, MeasuredCosts
from exl.engine.grouped_pages import GroupedPages
from exl.engine.prompt_lookup import PromptLookup
from exl.engine.request import TokenRequest
from exl.engine.scheduler import Scheduler
from exl.engine.ticket import Answer, Event, Ticket
from exl.errors import ConstraintError
from exl.philox import child_seed
from exl.text.sink import Rewind, Verdict
from tests.unit.engine.fake_device import EOS, FakeDevice, V

CONTEXT = 4 * PAGE_SIZE


def char(token_id: int) -> str:
    return chr(ord("a") + token_id)


@functools.lru_cache
def _starts(strings: tuple[str, ...]) -> tuple[frozenset[str], int]:
    """Their beginnings, and the length of the longest one."""
    return frozenset(s[:n] for s in strings for n in range(1, len(s))), max(map(len, strings), default=1) - 1


@dataclass
class CharSink:
    """A text of one character a token, with stop strings and banned strings."""

    stops: tuple[str, ...] = ()
    banned: tuple[str, ...] = ()
    fails_at: int | None = None  # tokens after which it raises; -1: when it is finished
    ids: list[int] = field(default_factory=list)
    num_given: int = 0
    ended: bool = False

    @property
    def num_final_tokens(self) -> int:
        return len(self.ids) - (0 if self.ended else self._num_open(self.banned))

    def _num_open(self, strings: Sequence[str]) -> int:
        """Tokens that one of the strings may begin with; so may those before, if these are taken back."""
        text = "".join(map(char, self.ids))
        starts, longest = _starts(tuple(strings))
        end = len(text)
        while found := next((n for n in range(min(longest, end), 0, -1) if text[end - n : end] in starts), 0):
            end -= found
        return len(text) - end

    def push(self, token_id: int) -> Verdict:
        if len(self.ids) == self.fails_at:
            raise ZeroDivisionError("sink")
        self.ids.append(token_id)
        text = "".join(map(char, self.ids))
        for banned in self.banned:
            if text.endswith(banned):
                rewind = Rewind(len(banned), self.ids[-len(banned)])
                del self.ids[-len(banned) :]
                return Verdict(rewind=rewind)
        for stop in self.stops:
            if text.endswith(stop):
                self.ended = True
                return Verdict(self._given(len(self.ids) - len(stop)), stopped=stop)
        return Verdict(self._given(len(self.ids) - self._num_open((*self.stops, *self.banned))))

    def finish(self) -> str:
        if self.fails_at == -1:
            raise ZeroDivisionError("finish")
        return "" if self.ended else self._given(len(self.ids))

    def _given(self, stop: int) -> str:
        start, self.num_given = self.num_given, max(stop, self.num_given)
        return "".join(map(char, self.ids[start:stop]))


@dataclass
class StepMatcher:
    """A constraint: a token follows another one only if it differs from it by 1, 2, 5 or 7 (modulo V). After
    ``most`` tokens the text is complete."""

    most: int = 1000
    fails_at: int | None = None
    ids: list[int] = field(default_factory=list)

    def _allowed(self, ids: Sequence[int]) -> list[int]:
        last = ids[-1] if ids else 0
        return sorted({(last + step) % V for step in (1, 2, 5, 7)})

    def _fill(self, ids: Sequence[int], out: np.ndarray) -> None:
        for token_id in self._allowed(ids):
            out[token_id // 32] |= np.uint32(1 << token_id % 32)

    def mask(self, out: np.ndarray) -> bool:
        if len(self.ids) == self.fails_at:
            raise ConstraintError("matcher")
        self._fill(self.ids, out)
        return True

    def masks_ahead(self, drafts: Sequence[int], out: np.ndarray) -> int:
        if len(self.ids) == self.fails_at:
            raise ConstraintError("matcher")
        ids = list(self.ids)
        for j in range(len(drafts) + 1):
            self._fill(ids, out[j])
            if j == len(drafts) or drafts[j] not in self._allowed(ids):
                return j
            ids.append(drafts[j])
        raise AssertionError

    def consume(self, token_id: int) -> None:
        assert token_id in self._allowed(self.ids)
        self.ids.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        assert num_tokens <= len(self.ids)
        del self.ids[len(self.ids) - num_tokens :]

    @property
    def is_finished(self) -> bool:
        return len(self.ids) >= self.most


def tickets_of(request: TokenRequest) -> Ticket:
    """As ``Generator.submit`` makes it."""
    seed, ranked = request.params.seed, request.top_logprobs is not None
    answers = [
        Answer(i, None if seed is None else child_seed(seed, i), ranked=[] if ranked else None)
        for i in range(request.num_choices)
    ]
    return Ticket(request, answers, None)


class UsualCosts(MeasuredCosts):
    """Nothing is measured: how many drafts there are does not depend on the machine."""

    def measured(self, num_rows: int, seconds: float) -> None:
        pass

    def drafted(self, longest: int, seconds: float) -> None:
        pass


class World:
    """A scheduler with all that belongs to it."""

    def __init__(self, device: FakeDevice, context: int = CONTEXT, *, passes: bool = False) -> None:
        """``passes``: pages that the device's window does not reach any more are given back."""
        self.device, self.context = device, context
        windows = WindowPool(device.num_windows, device.reach, device.zero_windows) if device.num_windows else None
        self.pool = PagePool(device.num_pages, null=passes, zero=device.zero_pages, windows=windows)
        device.num_holders = self.pool.num_holders
        if windows is not None:
            device.window_holders = windows.num_holders
        pages = self._pages(device, passes)
        most = -(-context // PAGE_SIZE) + 1 if passes else device.num_pages
        fits = None if windows is None else pages.fits_together
        self.answers = Answers(context, V, most, PAGE_SIZE, device.max_sequences, self.pool.num_usable, fits)
        self.answers.eos_ids = frozenset({EOS})
        drafts = Drafts({"prompt": PromptLookup((2, 1))}, device.decode_rows, device.max_decode_rows - 1)
        drafts.costs = UsualCosts()
        self.scheduler = Scheduler(device, pages, self.answers, drafts)
        self.tickets: list[Ticket] = []
        self.events: dict[Ticket, list[Event]] = {}

    def _pages(self, device: FakeDevice, passes: bool) -> Pages:
        def always(num_tokens: int) -> bool:
            return True

        pool, budget = self.pool, device.step_tokens
        if pool.windows is not None:
            copies = device.copy_pages, device.copy_windows
            return GroupedPages(pool, pool.windows, device.rules, *copies, always, budget)
        window = device.window if passes else None
        return Pages(pool, device.rules, device.copy_pages, always, window, budget, device.turn_pages)

    @property
    def stats(self):
        return self.scheduler.stats

    def submit(self, request: TokenRequest, *, most_unread: int | None = None) -> Ticket:
        """``most_unread``: its reader takes events as they come, and may be so many tokens behind."""
        self.answers.check(request)
        ticket = tickets_of(request)
        if most_unread is not None:
            ticket.iterated, ticket.max_unread = True, most_unread
        self.tickets.append(ticket)
        self.events[ticket] = []
        try:
            self.scheduler.submit(ticket)
        except Exception as error:  # as Seat does
            self.scheduler.fail(ticket, error)
        return ticket

    def take(self, ticket: Ticket) -> None:
        """The reader takes all there is."""
        while not ticket.outbox.empty():
            event = ticket.outbox.get_nowait()
            if event is not None:
                self.events[ticket].append(event)
                ticket.num_taken += event.num_tokens

    def held(self) -> list[list[int]]:
        return [sequence.held_pages for sequence in self.scheduler.live]

    def check(self) -> None:
        self.pool.check(self.held(), [sequence.window_pages for sequence in self.scheduler.live])

    def run(self, most_steps: int = 5000) -> None:
        """To rest. Readers take all they get."""
        for _ in range(most_steps):
            worked = self.scheduler.step()
            self.check()
            for ticket in self.tickets:
                self.take(ticket)
            if not worked and not self.scheduler.live:
                return
        raise AssertionError("the scheduler makes no progress")


def told(events: Sequence[Event], choice: int) -> tuple[list[int], str]:
    """What events said of a choice: its tokens and its text."""
    mine = [event for event in events if event.choice == choice]
    return list(itertools.chain.from_iterable(e.token_ids for e in mine)), "".join(e.text for e in mine)


def results(world: World, ticket: Ticket) -> list[tuple]:
    """All that a request's caller gets."""
    return [
        (
            *(answer.token_ids, "".join(answer.pieces), answer.outcome, answer.ranked, *told(world.events[ticket], i)),
            answer.prompt_ranked,
            None if answer.embedding is None else answer.embedding.tolist(),
        )
        for i, answer in enumerate(ticket.answers)
    ]


def alone(request: TokenRequest, like: FakeDevice, context: int = CONTEXT) -> list[tuple]:
    """What a request gives on a device of its own that reads each token at once."""
    device = FakeDevice(
        max(like.num_pages, -(-context // PAGE_SIZE)),
        invariant_rows=like.invariant_rows,
        chunk=like.chunk,
        max_decode_prompt=like.max_decode_prompt,
        max_decode_rows=like.max_decode_rows,
        window=like.window,
    )
    world = World(device, context)
    found = []
    together = request.num_beams > 1  # the choices of a search, else each by itself
    for choice in range(1 if together else request.num_choices):
        seed = None if request.params.seed is None else child_seed(request.params.seed, choice)
        own = replace(
            request,
            params=replace(request.params, seed=seed),
            num_choices=request.num_choices if together else 1,
            reuse_prefix=False,
            speculate=None,
            prompt_progress=None,
        )
        ticket = world.submit(own)
        world.run()
        if ticket.error is not None:
            raise ticket.error
        found += results(world, ticket)
    return found
